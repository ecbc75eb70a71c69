"""Who takes part in an exchange, and the exchange: torchft's lighthouse answers the first, a Gloo group carries the second.

torchft's `Manager` is not used: it listens on every network of the machine, offers whoever asks to end the process, and
unpickles what it is sent. Its lighthouse and the client of it are enough, because an exchange here needs nothing from the last one:

1. The peer asks the lighthouse for a quorum: all peers whose heartbeats it hears, once they have come.
2. The members make a Gloo group for this one exchange. Connections that idle for minutes do not survive the internet.
3. Each member has said how many outer steps it has made, and the hash of its outer state. The one that is the furthest leads;
   whoever stands elsewhere takes the leader's state. So late joiners, restarted peers, and those whose last
   exchange failed half-way are all put right by one rule, and members are equal after every exchange.
4. The mean of the weights goes round, then a word that everyone has it. If a member dies before, the others begin again at 1.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable
from concurrent.futures import wait
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import RunError, SettingsError
from config.differences import leaves
from parallel.peers import heartbeat
from parallel.peers.endpoint import Endpoint, coordination, lighthouse_of, open_store
from parallel.peers.heartbeat import Heartbeat, background
from parallel.peers.membership import ExchangeResult, Member, PeerState, choose_leader, ring_bytes

LOGGER = logging.getLogger("engine")  # train.py shows its lines on the console
CONNECT_SECONDS = 20.0  # for the members of a quorum to connect with one another
FOREVER = timedelta(days=365)


class PeerGroup:
    """This peer among the others. `exchange` is called by one thread at a time.

    Args:
        address, port: where this peer listens.
        join: `address:port` of a peer of the run; None to be the first.
        number: of this peer; tells its data from the others'.
        patience_seconds: longest wait for a peer that is alive but late, or stalls within an exchange.
        say: where lines for the person go.
    """

    def __init__(
        self,
        address: str,
        port: int,
        join: str | None,
        number: int,
        patience_seconds: float = 120.0,
        say: Callable[[str], None] = LOGGER.info,
    ):
        self.address, self.port, self.join, self.number, self.patience_seconds, self.say = (
            address,
            port,
            join,
            number,
            patience_seconds,
            say,
        )
        self.id = uuid.uuid4().hex
        self.beats: dict[str, Heartbeat] = {}
        self.place: Endpoint | None = None
        self._touched = time.monotonic()
        self._exchanging = False

    # --- coming and going -----------------------------------------------------------------------------------------

    def open(self, facts: dict[str, Any]) -> None:
        """Listen, and agree with the run that is joined on the facts of it.

        Raises:
            RunError: nobody answers, or the port is in use.
            SettingsError: this peer's facts differ from the run's.
        """
        places = self._handshake(facts) if self.join else []
        self.place = Endpoint(self.address, self.port, fixed=self.join is None, patience_seconds=self.patience_seconds)
        self.since = time.time()
        self.device = dist.ProcessGroupGloo.create_device(hostname=self.address)
        self.home = places[0] if places else self.place.text
        self.place.store.set("facts", json.dumps(facts))
        self._update_endpoints(places)
        deadline = time.monotonic() + 2 * heartbeat.SILENT_SECONDS
        while not self.beats[self.home].answers and time.monotonic() < deadline:
            time.sleep(
                0.02
            )  # from here on the others wait for this peer: the lighthouse has heard of it (unless home is gone)

    def _handshake(self, facts: dict[str, Any]) -> list[str]:
        """Where the run meets. Raises as `open` does."""
        try:
            store = open_store(self.join, 10.0)
            theirs, places = json.loads(store.get("facts")), json.loads(store.get("places"))
        except (OSError, RuntimeError) as error:
            raise RunError(
                f"no peer answers at {self.join}: is it running, and does no firewall stand between? "
                "The first peer prints the address that others join with"
            ) from error
        theirs, mine = dict(leaves(theirs)), dict(leaves(json.loads(json.dumps(facts))))
        apart = [
            f"{key} is {theirs.get(key)} there and {mine.get(key)} here"
            for key in sorted(theirs.keys() | mine.keys())
            if theirs.get(key) != mine.get(key)
        ]
        if apart:
            more = f"; and {len(apart) - 5} more" if len(apart) > 5 else ""
            raise SettingsError(f"this peer does not fit the run at {self.join}: {'; '.join(apart[:5])}{more}")
        return places

    def _update_endpoints(self, places: list[str]) -> None:
        """From now on meet at the first of these places that answers: home first, and this peer's own at the latest."""
        self.places = list(dict.fromkeys([self.home, *places, self.place.text]))
        self.place.store.set("places", json.dumps(self.places))
        for place in self.beats.keys() - set(self.places):
            self.beats.pop(place).ended.set()
        for place in self.places:
            # At all of them: so each lighthouse knows who must be waited for, should the meeting move there.
            if place not in self.beats:
                self.beats[place] = Heartbeat(place, self.id, self._is_alive)
                self.beats[place].start()

    def touch(self, seconds: float = 0.0) -> None:
        """The training goes on, and so many seconds may pass besides until it says so again.

        A peer that hangs is to be gone for the others, though its process lives.
        """
        self._touched = time.monotonic() + seconds

    def _is_alive(self) -> bool:
        return self._exchanging or time.monotonic() - self._touched < self.patience_seconds

    def leave(self) -> None:
        """Let the others go on without this peer; what it listens with stays until `close`."""
        for beat in self.beats.values():
            beat.ended.set()

    def close(self) -> None:
        self.leave()
        if self.place is not None:
            self.place.close()

    # --- an exchange ----------------------------------------------------------------------------------------------

    def exchange(self, standing: PeerState, joining: bool = False) -> ExchangeResult:
        """Average with everyone who is there, however often it takes; alone, the outcome is what was brought.

        Raises:
            RunError: `joining` a run, and nobody is left to take it from.
        """
        began = time.monotonic()
        self._exchanging = True
        try:
            while True:
                members, name = self._assemble(standing)
                if joining and len(members) == 1:
                    if time.monotonic() - began > self.patience_seconds:
                        raise RunError(
                            f"the peer at {self.join} is gone, and no other was met: start this one with --host-peers to go on alone"
                        )
                    time.sleep(heartbeat.BEAT_SECONDS)
                    continue
                assembled = time.monotonic()
                try:
                    mean, worked, outer = self._average(standing, members, name)
                except (OSError, RuntimeError) as error:
                    reason = (str(error).splitlines() or [type(error).__name__])[0][:150]
                    self.say(
                        f"peers     an exchange of {len(members)} broke off ({reason}); again, with whoever is there"
                    )
                    continue
                leader = choose_leader(members)
                self._update_endpoints(
                    [member.place for member in sorted(members, key=lambda member: (member.since, member.id))]
                )
                return ExchangeResult(
                    mean,
                    worked,
                    leader.count,
                    leader.step,
                    outer,
                    members,
                    assembled - began,
                    time.monotonic() - assembled,
                    ring_bytes(len(mean), len(members)),
                )
        finally:
            self._exchanging = False
            self.touch()

    def _assemble(self, standing: PeerState) -> tuple[list[Member], str]:
        """The members of the next exchange, in an order that all know, and its name, which no other exchange has."""
        mark = standing.mark()
        while True:
            place = self._meeting_place()
            asked = background(self._ask, place, standing, mark)
            while self._meeting_place() == place and not asked.done():
                wait([asked], timeout=0.2)  # the others train
            if asked.done() and not asked.exception():
                quorum = asked.result()
                members = [
                    Member(id=peer.replica_id, place=peer.store_address, count=peer.step, **peer.data)
                    for peer in quorum.participants
                ]
                return members, f"{quorum.created.seconds}.{quorum.created.nanos}"
            if asked.done():  # nobody listens there any more
                self.beats[place].begin_anew()
                time.sleep(heartbeat.BEAT_SECONDS)

    def _meeting_place(self) -> str:
        """The first place that answers; right after the start, the first that is given the time to."""
        for place in self.places:
            beat = self.beats[place]
            while not beat.tried:
                time.sleep(0.02)
            if beat.answers:
                return place
        return self.place.text

    def _ask(self, place: str, standing: PeerState, mark: str) -> Any:
        client = coordination().LighthouseClient(
            lighthouse_of(place), connect_timeout=timedelta(seconds=heartbeat.SILENT_SECONDS)
        )
        about = {
            "number": self.number,
            "since": self.since,
            "step": standing.step,
            "share": standing.share,
            "mark": mark,
        }
        return client.quorum(
            self.id,
            timeout=FOREVER,
            address="",
            store_address=self.place.text,
            step=standing.count,
            world_size=1,
            shrink_only=False,
            data=about,
        )

    def _average(self, standing: PeerState, members: list[Member], name: str) -> tuple[Tensor, bool, Tensor | None]:
        """The mean, whether anybody had worked, and the leader's outer state where this peer needs it.

        Raises:
            OSError, RuntimeError: a member is gone, or stalls.
        """
        leader = choose_leader(members)
        shares = [member.share if member.state == leader.state else 0.0 for member in members]
        worked = sum(shares) > 0
        if not worked:  # all have just come: they take what the leader has
            shares[members.index(leader)] = 1.0
        mine = [member.id for member in members].index(self.id)
        mean = standing.values * shares[mine] if shares[mine] else torch.zeros_like(standing.values)
        outer = None
        if len(members) > 1:
            group = self._connect(leader.place, name, mine, len(members))
            outer = self._sync_outer_state(group, standing, members, leader, mine)
            self._sum(group, mean)
            self._sum(group, torch.ones(1))  # everyone has the mean: nobody keeps what another could not get
        return mean / sum(shares), worked, outer

    def _connect(self, place: str, name: str, rank: int, size: int) -> dist.ProcessGroupGloo:
        options = dist.ProcessGroupGloo._Options()
        options._devices, options._timeout = [self.device], timedelta(seconds=CONNECT_SECONDS)
        return dist.ProcessGroupGloo(dist.PrefixStore(name, open_store(place, CONNECT_SECONDS)), rank, size, options)

    def _sync_outer_state(
        self, group: dist.ProcessGroupGloo, standing: PeerState, members: list[Member], leader: Member, mine: int
    ) -> Tensor | None:
        """Send the outer state to those who stand elsewhere than the leader, or receive it."""
        patience, leads = timedelta(seconds=self.patience_seconds), members.index(leader)
        if mine == leads:
            for rank, member in enumerate(members):
                if member.state != leader.state:
                    group.send([standing.outer], rank, 0).wait(patience)
        elif members[mine].state != leader.state:
            outer = torch.empty_like(standing.outer)
            group.recv([outer], leads, 0).wait(patience)
            return outer
        return None

    def _sum(self, group: dist.ProcessGroupGloo, values: Tensor) -> None:
        options = dist.AllreduceOptions()
        options.timeout = timedelta(seconds=self.patience_seconds)
        group.allreduce([values], options).wait()
