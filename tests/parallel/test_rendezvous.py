"""parallel/peers/: several peers of strategy `local` exchange within this process; some leave, die or do not fit.

`test_peer_engine.py` tests engines and `train.py` with them.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from http.client import HTTPConnection
from types import SimpleNamespace

import programs
import pytest
import torch
from peers import facts_for, free_pair, wait_for_pair

from cluster.simulated_hosts import wait_until
from common.errors import RunError, SettingsError
from config.differences import leaves
from parallel.diloco import OuterStep
from parallel.peers import endpoint, failures, heartbeat, rendezvous
from parallel.peers.link_cost import enough_steps, lines_of_cost, seconds_over
from parallel.peers.membership import Member, PeerState, choose_leader, ring_bytes, without_unreachable
from parallel.peers.rendezvous import PeerGroup
from parallel.peers.setup import agreement, data_seed, join_command, meeting_of, peer_number
from parallel.strategies import engine_class

if sys.version_info >= (3, 14) or tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7):
    pytest.skip("torchft is not available for this Python or this PyTorch", allow_module_level=True)
endpoint.coordination()  # before anything else imports torchft: it is quiet then

HERE = "127.0.0.1"
LIMIT_SECONDS = 60  # of one exchange

# --- exchanges in this process -------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """Shorter time limits than over the internet."""
    monkeypatch.setattr(endpoint, "HEARTBEAT_SECONDS", 1.5)
    monkeypatch.setattr(heartbeat, "SILENT_SECONDS", 1.0)
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(failures, "CONNECT_SECONDS", 2.0)
    monkeypatch.setattr(failures, "PROBE_SECONDS", 0.3)


@pytest.fixture
def circle(quick):
    """Make peers: `circle(n)` opens n of them, `circle(1, join)` one more, and `port` gives a first one its port."""
    opened: list[PeerGroup] = []

    def make(
        count: int,
        join: PeerGroup | None = None,
        port: int | None = None,
        facts: dict | None = None,
        patience: float = 5.0,
        resumed: bool = False,
    ) -> list[PeerGroup]:
        for _ in range(count):
            first = join or (opened[0] if opened and port is None else None)
            meeting = PeerGroup(
                HERE,
                port or free_pair(),
                first.endpoint.text if first else None,
                len(opened),
                patience,
                say=lambda text: None,
            )
            meeting.open(facts or {"seed": 0}, resumed)
            opened.append(meeting)
        return opened[-count:]

    yield make
    for meeting in opened:
        meeting.leave()


def standing(value: float, count: int = 3, share: float = 1.0, outer: float = 7.0) -> PeerState:
    return PeerState(count, 4 * count, share, torch.full((5,), value), torch.full((10,), outer))


def announcement(peer: PeerGroup, state: PeerState, **changes) -> dict:
    """What a peer with this state announces, with changes."""
    return {**peer._announce(state).announcement(), "since": time.time(), **changes}


def status(peer: PeerGroup) -> str:
    """The page on which the lighthouse of a peer lists who sends heartbeats to it."""
    connection = HTTPConnection(HERE, peer.endpoint.port + 1, timeout=LIMIT_SECONDS)
    connection.request("GET", "/status")
    return connection.getresponse().read().decode()


def ask(peer: PeerGroup, id: str, count: int = 3, data: dict | None = None, where: str = f"{HERE}:9") -> None:
    """Ask the lighthouse of a peer for a quorum, as a stranger that then does nothing. Return when it lists the id."""
    client = endpoint.coordination().LighthouseClient(
        endpoint.lighthouse_of(peer.endpoint.text), connect_timeout=timedelta(seconds=2)
    )
    stranger = threading.Thread(
        target=lambda: client.quorum(
            id,
            timeout=timedelta(seconds=30),
            address="",
            store_address=where,
            step=count,
            world_size=1,
            shrink_only=False,
            data=data,
        ),
        daemon=True,
    )
    stranger.start()
    wait_until(lambda: id in status(peer), LIMIT_SECONDS)


def exchange(meetings: list[PeerGroup], standings: list[PeerState]) -> list:
    """Exchange with all of them at the same time."""
    with ThreadPoolExecutor(len(meetings)) as pool:
        return [
            future.result(LIMIT_SECONDS)
            for future in [
                pool.submit(meeting.exchange, standing) for meeting, standing in zip(meetings, standings, strict=True)
            ]
        ]


def test_all_get_the_same_mean_weighted_by_what_each_has_trained(circle):
    outcomes = exchange(circle(3), [standing(1.0), standing(2.0, share=0.5), standing(9.0, share=0.0)])
    for outcome in outcomes:
        assert outcome.worked and outcome.outer is None and len(outcome.members) == 3
        assert torch.equal(outcome.mean, outcomes[0].mean) and torch.allclose(outcome.mean, torch.full((5,), 2.0 / 1.5))


def test_a_single_peer_keeps_its_weights(circle):
    (outcome,) = exchange(circle(1), [standing(1.7)])
    assert torch.equal(outcome.mean, torch.full((5,), 1.7)) and outcome.num_bytes == 0 and outcome.worked


def test_a_peer_that_is_behind_takes_the_outer_state_and_its_steps_do_not_count(circle):
    outcomes = exchange(circle(3), [standing(1.0), standing(3.0), standing(100.0, count=2, outer=5.0)])
    assert [outcome.outer is None for outcome in outcomes] == [True, True, False]
    assert torch.equal(outcomes[2].outer, torch.full((10,), 7.0)) and outcomes[2].count == 3 and outcomes[2].step == 12
    assert all(torch.equal(outcome.mean, torch.full((5,), 2.0)) for outcome in outcomes)


def test_a_peer_with_the_same_count_but_another_state_takes_the_majoritys(circle):
    """A network partition leads to this: each side continued on its own."""
    outcomes = exchange(circle(3), [standing(4.0, outer=1.0), standing(1.0), standing(3.0)])
    assert torch.equal(outcomes[0].outer, torch.full((10,), 7.0)) and outcomes[1].outer is None
    assert all(torch.equal(outcome.mean, torch.full((5,), 2.0)) for outcome in outcomes)


def test_if_nobody_has_trained_all_take_the_leaders_weights_without_an_outer_step(circle):
    outcomes = exchange(circle(2), [standing(1.0, share=0.0), standing(3.0, share=0.0)])
    assert all(torch.equal(outcome.mean, torch.full((5,), 1.0)) and not outcome.worked for outcome in outcomes)


def test_a_peer_that_leaves_is_not_waited_for(circle):
    peers = circle(3)
    exchange(peers, [standing(float(i)) for i in range(3)])
    peers[1].leave()
    outcomes = exchange([peers[0], peers[2]], [standing(1.0, count=4), standing(3.0, count=4)])
    assert all(torch.equal(outcome.mean, torch.full((5,), 2.0)) and len(outcome.members) == 2 for outcome in outcomes)


def test_a_peer_that_dies_during_an_exchange_costs_only_a_second_attempt(circle):
    peers, said = circle(2), []
    for peer in peers:
        peer.say = said.append
    ask(peers[0], "dead", data=announcement(peers[0], standing(0.0)))  # it is never heard of again
    outcomes = exchange(peers, [standing(1.0), standing(3.0)])
    assert all(torch.equal(outcome.mean, torch.full((5,), 2.0)) and len(outcome.members) == 2 for outcome in outcomes)
    assert said and "an exchange of 3 failed" in said[0]


def test_a_peer_that_hangs_is_left_out_after_the_patience(circle):
    peers = circle(2, patience=1.0)
    exchange(peers, [standing(1.0), standing(3.0)])
    began = time.monotonic()  # the second one sends heartbeats but never asks for an exchange
    (outcome,) = exchange(peers[:1], [standing(1.0, count=4)])
    assert len(outcome.members) == 1 and time.monotonic() - began > 1.0


def test_exchanges_outlive_the_first_peer_and_return_to_its_lighthouse_when_it_is_back(circle):
    peers = circle(3)
    exchange(peers, [standing(float(i)) for i in range(3)])
    home, others = peers[0].endpoint.port, peers[1:]
    peers[0].close()
    outcomes = exchange(others, [standing(1.0, count=4), standing(3.0, count=4)])
    assert all(torch.equal(outcome.mean, torch.full((5,), 2.0)) and len(outcome.members) == 2 for outcome in outcomes)
    (late,) = circle(1, join=others[1])  # any of them can be joined
    assert late._meeting_endpoint() == others[0].endpoint.text
    wait_for_pair(home)
    (back,) = circle(1, port=home)
    wait_until(lambda: all(peer.id in status(back) for peer in (*others, late)), LIMIT_SECONDS)
    standings = [
        standing(2.0, count=5),
        standing(4.0, count=5),
        standing(0.0, count=0, outer=0.0),
        standing(50.0, count=3, outer=2.0),
    ]
    outcomes = exchange([*others, late, back], standings)
    assert all(len(outcome.members) == 4 and torch.equal(outcome.mean, torch.full((5,), 3.0)) for outcome in outcomes)
    assert all(peer._meeting_endpoint() == back.endpoint.text for peer in (*others, late, back))


def test_a_first_peer_that_is_restarted_hears_the_others_before_it_exchanges(circle, monkeypatch):
    """The heartbeat of the other peer reaches the new lighthouse a second after it listens."""
    peers = circle(2)
    home = peers[0].endpoint
    exchange(peers, [standing(1.0), standing(3.0)])
    peers[0].close()
    peers[1].beats[home.text].ended.set()
    monkeypatch.setattr(heartbeat, "SILENT_SECONDS", 5.0)
    wait_for_pair(home.port)
    (back,) = circle(1, port=home.port, resumed=True)
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(back.exchange, standing(2.0, count=4))
        time.sleep(0.8)
        peers[1].beats[home.text] = heartbeat.Heartbeat(home.text, peers[1].id, lambda: True)
        peers[1].beats[home.text].start()
        outcomes = [peers[1].exchange(standing(4.0, count=4)), pending.result(LIMIT_SECONDS)]
    assert all(len(outcome.members) == 2 and torch.equal(outcome.mean, torch.full((5,), 3.0)) for outcome in outcomes)


def test_a_lighthouse_that_ends_after_it_was_asked_is_left(circle):
    """torchft's keeps the connections of a lighthouse that was shut down: heartbeats are answered, the quorum never."""
    peers = circle(2, patience=1.0)
    with ThreadPoolExecutor(1) as pool:
        peers[0].touch()  # it trains
        pending = pool.submit(peers[1].exchange, standing(2.0))
        time.sleep(0.4)  # the second one has asked and waits for the first
        assert not pending.done()
        peers[0].close()
        outcome = pending.result(LIMIT_SECONDS)
    assert len(outcome.members) == 1 and torch.equal(outcome.mean, torch.full((5,), 2.0))


def test_a_slow_peer_is_waited_for_though_the_lighthouse_is_asked_more_than_once(circle, monkeypatch):
    peers, asked = circle(2, patience=0.4), []
    ask_once = peers[0]._ask
    monkeypatch.setattr(peers[0], "_ask", lambda *arguments: (asked.append(arguments), ask_once(*arguments))[1])
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(peers[0].exchange, standing(1.0))
        until = time.monotonic() + 4.0
        while time.monotonic() < until:
            peers[1].touch()  # it trains
            time.sleep(0.05)
        assert len(asked) >= 2 and not pending.done()
        outcomes = [peers[1].exchange(standing(3.0)), pending.result(LIMIT_SECONDS)]
    assert all(len(outcome.members) == 2 and torch.equal(outcome.mean, torch.full((5,), 2.0)) for outcome in outcomes)


def test_a_peer_that_joins_does_not_train_alone_without_consent(circle):
    (first,) = circle(1)
    (late,) = circle(1, patience=1.5)
    first.close()
    with pytest.raises(
        RunError, match="no other peer of the run at .* can be reached any more. Start this one with --host-peers"
    ):
        late.exchange(standing(1.0), joining=True)


# --- peers that do not fit, fail or cannot be reached -------------------------------------------------------------


def exchange_beside(circle, strange: dict | None, count: int = 3) -> tuple[list, list[str]]:
    """Two peers exchange while a stranger with this announcement is in the quorum: (results, lines for the user)."""
    peers, said = circle(2), []
    peers[0].most_outer_steps = peers[1].most_outer_steps = 100
    for peer in peers:
        peer.say = said.append
    data = None if strange is None else announcement(peers[0], standing(0.0), **strange)
    ask(peers[0], "stranger", count, data, where=f"{HERE}:{free_pair()}")
    return exchange(peers, [standing(1.0), standing(3.0)]), said


@pytest.mark.parametrize(
    ("strange", "count", "said"),
    [
        (None, 3, "announces nothing"),
        ({"protocol": 1}, 3, "has protocol 1, this one 2"),
        ({"protocol": "\x00" * 500}, 3, "has protocol"),
        ({"share": float("1e9")}, 3, "announces share=1000000000.0"),
        ({"since": "yesterday"}, 3, "announces since='yesterday'"),
        ({"step": True}, 3, "announces step=True"),
        ({"sizes": [7, 10]}, 3, "has vectors of 7 and 10 values, here 5 and 10"),
        ({"sizes": "many"}, 3, "announces sizes='many'"),
        ({"code": "0" * 16}, 3, "runs other code (00000000, here "),
        ({"state_hash": {}}, 3, "announces state_hash={}"),
        ({"unreachable": [1]}, 3, "announces unreachable=[1]"),
        ({}, 101, "announces outer step 101 and step 12, which this run does not have"),
    ],
)
def test_a_peer_that_does_not_fit_is_left_out_and_named(circle, strange, count, said):
    outcomes, lines = exchange_beside(circle, strange, count)
    assert all(torch.equal(outcome.mean, torch.full((5,), 2.0)) and len(outcome.members) == 2 for outcome in outcomes)
    assert len(lines) == 2 and all("is left out: it" in line and said in line for line in lines)


def test_a_peer_that_never_arrives_is_left_out_after_its_second_failure(circle):
    """It answers on its ports and announces what a peer would, with the most outer steps, so it would lead."""
    peers, said, listener = circle(2), [], socket.create_server((HERE, 0))
    peers[0].say = said.append
    port = listener.getsockname()[1]
    data = announcement(peers[0], standing(0.0), probe_port=port)
    with ThreadPoolExecutor(1) as pool:
        beats = heartbeat.Heartbeat(peers[0].endpoint.text, "ghost", lambda: True)
        beats.start()

        def ask_again():
            """Like a peer."""
            while not beats.ended.is_set():
                ask(peers[0], "ghost", 3, data, f"{HERE}:{port}")
                beats.ended.wait(1)

        pool.submit(ask_again)
        outcomes = exchange(peers, [standing(1.0), standing(3.0)])
        beats.ended.set()
    listener.close()
    assert all(torch.equal(outcome.mean, torch.full((5,), 2.0)) and len(outcome.members) == 2 for outcome in outcomes)
    assert any(f"{HERE}:{port} is left out" in line for line in said), said


def test_a_pair_without_a_path_loses_its_younger_peer_and_the_others_continue(circle):
    peers, said = circle(3), []
    without_path = {1: peers[2].endpoint.probe_port, 2: peers[1].endpoint.probe_port}
    for peer, port in ((peers[i], port) for i, port in without_path.items()):
        peer.failures.connect = lambda address, to, port=port: to != port and failures.can_connect(address, to)
    peers[0].say = said.append
    began = time.monotonic()
    outcomes = exchange(peers, [standing(1.0), standing(3.0), standing(50.0)])
    assert time.monotonic() - began < 10
    assert [len(outcome.members) for outcome in outcomes] == [2, 2, 1]
    assert [outcome.mean[0].item() for outcome in outcomes] == [2.0, 2.0, 50.0]
    assert any(f"{peers[2].endpoint.text} is left out" in line for line in said), said
    for peer in peers[1:]:
        peer.failures.connect = failures.can_connect  # the path is there again
    outcomes = exchange(peers, [standing(1.0, count=4), standing(3.0, count=4), standing(50.0, count=4, outer=5.0)])
    assert all(len(outcome.members) == 3 and outcome.mean[0] == 2.0 for outcome in outcomes)


def test_a_peer_with_nan_weights_does_not_count_and_takes_the_others_state(circle):
    nan = float("nan")
    outcomes = exchange(circle(3), [standing(1.0), standing(3.0), standing(nan, count=9, outer=nan)])
    assert all(torch.equal(outcome.mean, torch.full((5,), 2.0)) and outcome.count == 3 for outcome in outcomes)
    assert torch.equal(outcomes[2].outer, torch.full((10,), 7.0))


def test_a_peer_that_announces_finite_weights_and_sends_nan_does_not_spoil_the_mean(circle, monkeypatch):
    peers, said = circle(3), []
    peers[0].say = said.append
    faulty = peers[2]._announce
    peers[2]._announce = lambda state: replace(faulty(state), finite=True, share=1.0)
    outcomes = exchange(peers, [standing(1.0), standing(3.0), standing(float("nan"))])
    assert all(torch.equal(outcome.mean, torch.full((5,), 2.0)) for outcome in outcomes[:2])
    assert any(f"{peers[2].endpoint.text} sent weights that are not finite" in line for line in said), said


def test_what_answers_at_the_join_address_but_is_no_peer_is_named(quick):
    port = free_pair()
    store = torch.distributed.TCPStore(HERE, port, None, True, timedelta(seconds=5), wait_for_workers=False)
    store.set("facts", "{")
    store.set("places", b"\xff")
    with pytest.raises(RunError, match=f"the program at {HERE}:{port} is not a peer"):
        PeerGroup(HERE, free_pair(), f"{HERE}:{port}", 1).open({})


def test_a_peer_with_other_code_is_rejected(circle, monkeypatch):
    circle(1)
    monkeypatch.setattr(rendezvous, "code_fingerprint", lambda: "1" * 16)
    with pytest.raises(SettingsError, match="the fingerprint of the code is [0-9a-f]{16} there and 1{16} here"):
        circle(1)


def test_whoever_lacks_a_path_to_most_is_left_out():
    members = [member(3, "a", since) for since in range(4)]
    reports = [replace(one, unreachable=frozenset({"2"})) for one in members[:2]] + members[2:]
    assert without_unreachable(reports) == ([reports[0], reports[1], reports[3]], [reports[2]])
    liar = replace(members[0], unreachable=frozenset({"1", "2", "3"}))
    assert without_unreachable([liar, *members[1:]]) == (members[1:], [liar])


def test_a_peer_whose_announcement_fails_without_a_message_is_left_out(monkeypatch):
    def fail(participant):
        raise RuntimeError

    monkeypatch.setattr(rendezvous, "parse_member", fail)
    said = []
    group = PeerGroup(HERE, 0, None, number=0, say=said.append)
    own = replace(member(3, "a", 1.0), id=group.id)
    participants = [SimpleNamespace(replica_id=id, store_address=f"{HERE}:9") for id in (group.id, "other")]
    assert group._select(participants, own) == [own]
    assert said == [f"peers     {HERE}:9 is left out: it fails with RuntimeError"]


def member(count: int, state_hash: str, since: float, **more) -> Member:
    return Member(f"{since}", "", 0, since, count, count, 1.0, state_hash, **more)


@pytest.mark.parametrize(
    ("members", "leader"),
    [
        ([member(3, "a", 1), member(4, "b", 2)], 1),
        ([member(4, "a", 1), member(4, "b", 2), member(4, "b", 3)], 1),
        ([member(4, "a", 2), member(4, "b", 1)], 1),
        ([member(5, "a", 3), member(4, "b", 1), member(4, "b", 2)], 0),
    ],
)
def test_the_furthest_peer_leads_then_the_majority_then_the_oldest(members, leader):
    assert choose_leader(members) is members[leader] and choose_leader(members[::-1]) is members[leader]


# --- errors -------------------------------------------------------------------------------------------------------


def test_a_peer_with_other_settings_is_rejected_and_the_difference_named(circle):
    circle(1, facts={"settings": {"parallel": {"local_steps": 8}}, "seed": 0})
    with pytest.raises(
        SettingsError, match=r"does not fit the run at 127.*settings.parallel.local_steps is 8 there and 16 here"
    ):
        circle(1, facts={"settings": {"parallel": {"local_steps": 16}}, "seed": 0})


def test_nobody_listens_and_a_port_in_use(circle):
    (first,) = circle(1)
    with pytest.raises(
        RunError, match=rf"port {first.port} or {first.port + 1} of {HERE} is in use.*--host-peers {HERE}:PORT"
    ):
        circle(1, port=first.port)
    with pytest.raises(RunError, match=rf"no peer answers at {HERE}:9"):
        PeerGroup(HERE, free_pair(), f"{HERE}:9", 1).open({})


def flags(**given) -> dict:
    """Arguments of `meeting_of`, as without any flag but `given`."""
    return {"host_peers": None, "join": None, "peer_address": None, "name": None, "runs_dir": "runs", **given}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"host_peers": "0.0.0.0"}, "would listen on every network of this machine; give the one address"),
        ({"host_peers": "192.0.2.7"}, "192.0.2.7 is not an address of this machine; it has 127.0.0.1"),
        (
            {"host_peers": "127.0.0.1:99999"},
            "--host-peers 127.0.0.1:99999: the port must be a number from 1024 to 65534",
        ),
        ({"join": "no such name:29600"}, "'no such name' is neither an IPv4 address nor a name that resolves"),
        ({"host_peers": "127.0.0.1", "join": "127.0.0.1"}, "give only one of them"),
        ({"peer_address": "127.0.0.1"}, "add --host-peers or --join"),
    ],
)
def test_wrong_addresses_are_rejected(given, said):
    with pytest.raises(SettingsError, match=said):
        meeting_of(**flags(**given), patience_seconds=120.0)


def test_nothing_listens_on_a_public_address_without_consent(monkeypatch):
    monkeypatch.setattr(socket.socket, "getsockname", lambda self: ("8.8.4.4", 1))
    with pytest.raises(SettingsError, match="from its public address 8.8.4.4.*give --peer-address 8.8.4.4"):
        meeting_of(**flags(join=HERE), patience_seconds=120.0)


@pytest.mark.parametrize(
    "given", [{"host_peers": "192.0.2.7"}, {"join": "no such name"}, {"join": HERE, "peer_address": "192.0.2.7"}]
)
def test_only_the_host_of_the_main_process_needs_an_address(monkeypatch, given):
    monkeypatch.setenv("RANK", "1")
    meeting = meeting_of(**flags(**given), patience_seconds=120.0)
    assert bool(meeting.join) == ("join" in given)  # every process takes part in a join


def test_peers_are_for_local_only():
    with pytest.raises(SettingsError, match="--host-peers and --join need --strategy local, not zero"):
        engine_class("zero", object())


# --- facts of a peer ----------------------------------------------------------------------------------------------


def test_peers_must_agree_on_everything_but_parallelism_and_precision():
    plain = agreement(facts_for(), 5)
    assert (
        agreement(facts_for("zero_optimization.stage=3", "bf16.enabled=true", "gradient_accumulation_steps=2"), 5)
        == plain
    )
    for other in (
        "parallel.local_steps=5",
        "optimizer.params.lr=1e-4",
        "model.depth=3",
        "train_batch_size=64",
        "augmentation.flip=0.0",
    ):
        assert agreement(facts_for(other), 5) != plain
    assert agreement(facts_for(), 6) != plain and {**facts_for(), "dataset": {"fingerprint": "g"}} != plain
    assert dict(leaves(plain)) == plain


def test_the_join_command_holds_what_must_be_equal():
    assert join_command(facts_for(), "10.0.0.1:29600") == (
        "./launch_local_train.sh --strategy local --join 10.0.0.1:29600 --preset cpu --set a=1 --epochs 3"
    )


def test_every_peer_has_its_own_data_order_which_survives_a_restart():
    numbers = {peer_number(host, name) for host in "abc" for name in ("runs/x", "runs/y")}
    assert len(numbers) == 6 and 0 not in numbers and peer_number("a", "runs/x") in numbers
    assert data_seed(7, 0) == 7 and len({data_seed(seed, number) for seed in (0, 1) for number in numbers}) == 12


def test_the_cost_of_an_exchange():
    assert ring_bytes(1_000_000, 2) == 4_000_000 and ring_bytes(1_000_000, 4) == 6_000_000 and ring_bytes(5, 1) == 0
    assert seconds_over(4_000_000, 0.1) == pytest.approx(0.32)
    steps = enough_steps(0.32, 0.1)
    assert 0.32 / (0.32 + 0.1 * steps) <= 0.05 < 0.32 / (0.32 + 0.1 * (steps - 1))
    lines = lines_of_cost(1_000_000, 32, 0.1, 0.1)
    assert (
        "2 peers: each sends 4.0 MB per outer step, 0.32 s, 9.1% of the time; parallel.local_steps=61 would make it 5%"
        in lines[1]
    )


def test_the_outer_step_equals_pytorchs_nesterov_sgd():
    generator = torch.Generator().manual_seed(0)
    start, means = torch.randn(50, generator=generator), torch.randn(5, 50, generator=generator)
    parameter = start.clone().requires_grad_()
    sgd, outer = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True), OuterStep({"w": start}, 0.7, 0.9)
    for mean in means:
        parameter.grad = parameter.detach() - mean
        sgd.step()
        assert torch.allclose(outer.step([mean])[0], parameter.detach(), atol=1e-5)


def test_a_wrong_command_line_gives_one_clear_sentence(training, circle):
    (other,) = circle(1, facts={"--seed": 5})
    done = programs.run(
        "train.py", *training, "--name", "other", "--strategy", "local", "--join", other.endpoint.text, code=1
    )
    assert (
        done.err.count("\n") == 1
        and f"error: this peer does not fit the run at {other.endpoint.text}: --seed is 5 there and 0 here" in done.err
    )
    nobody = f"{HERE}:{free_pair()}"
    done = programs.run("train.py", *training, "--name", "nobody", "--strategy", "local", "--join", nobody, code=1)
    assert done.err.count("\n") == 1 and f"error: no peer answers at {nobody}" in done.err
    done = programs.run("train.py", *training, "--name", "nobody", "--host-peers", HERE, code=1)
    assert done.err == "error: --host-peers and --join need --strategy local, not zero\n"
