"""parallel/peers/: peers train like a plain loop; then `train.py` itself, with peers that are killed or join late."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import programs
import pytest
import torch
from peers import facts_for, free_pair
from programs import _check
from reference import BATCH, SAVED_AT, STEPS, data, largest_difference, make_engine, network, save, settings_for, train
from small_runs import STOPPED
from torch.nn import functional as F

from benchmarks.lib.forked_programs import Program, start
from parallel.peers import endpoint
from parallel.peers.heartbeat import Heartbeat
from parallel.peers.membership import ring_bytes
from parallel.peers.rendezvous import PeerGroup
from parallel.peers.setup import data_seed
from parallel.strategies import engine_class
from records.run_folder import RunFolder

if sys.version_info >= (3, 14) or tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7):
    pytest.skip("torchft is not available for this Python or this PyTorch", allow_module_level=True)
endpoint.coordination()  # before anything else imports torchft: it is quiet then

HERE = "127.0.0.1"

# --- engines in forked processes -----------------------------------------------------------------------------------


DILOCO = ["parallel.local_steps=3"]
AVERAGING = [
    "optimizer.type=SGD",
    "gradient_clipping=0.0",
    "parallel.local_steps=1",
    "parallel.outer_lr=1.0",
    "parallel.outer_momentum=0.0",
]


def peer_engine(settings, port: int, join: str | None = None, number: int = 0):
    meeting = PeerGroup(HERE, port, join, number, patience_seconds=20.0)
    return make_engine_of(partial(engine_class("local", peers=True), meeting=meeting), settings)


def make_engine_of(make, settings):
    from optim.lr_schedule import Schedule

    torch.set_num_threads(1)
    return make(lambda: network(settings), settings, Schedule(settings.schedule, 20), 3)


def test_a_peer_that_failed_does_not_wait_for_the_other_processes(monkeypatch):
    from parallel import process_group
    from parallel.peers.engine import Engine

    left: list[str] = []
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr(process_group, "destroy_process_group", lambda: left.append("process group"))
    engine = Engine.__new__(Engine)
    engine.is_main, engine.meeting = True, SimpleNamespace(close=lambda: left.append("meeting"))
    engine.close(failed=True)
    assert left == ["meeting"]
    engine.close()
    assert left == ["meeting", "meeting", "process group"]


def job_of_two_hosts(out: str) -> None:
    """A process whose own host would give the peer another number."""
    rank = int(os.environ["RANK"])
    engine = peer_engine(settings_for(*DILOCO), 0, number=7 + rank)
    Path(out, f"seed-{rank}").write_text(f"{engine.data_seed} {engine.random_stream() - engine.data_shard[0]}")
    engine.close()


def test_all_processes_of_a_peer_have_the_data_order_of_the_main_process(tmp_path):
    programs.run_ranks(2, job_of_two_hosts, str(tmp_path))
    assert (tmp_path / "seed-0").read_text() == (tmp_path / "seed-1").read_text() == f"{data_seed(3, 7)} {4096 * 7}"


def averaging_settings(*overrides: str):
    settings = settings_for(*AVERAGING, *overrides)
    settings.engine["optimizer"]["params"] = {"lr": 0.05, "weight_decay": 0.05}
    return settings


def job_alone(out: str, port: int) -> None:
    """Train one peer alone and one worker of `local`, for each stage; also resume, and load its state in `zero`."""
    import torch.distributed as dist

    results: dict = {}
    for stage in (0, 1, 3):
        settings = settings_for(*DILOCO, f"zero_optimization.stage={stage}")
        engine = peer_engine(settings, port)
        engine.begin(facts_for())
        folder = Path(out, f"stage-{stage}")
        folder.mkdir()
        losses = train(engine, SAVED_AT)
        save(engine, folder)
        losses += train(engine)
        results[stage] = {
            "losses": losses,
            "weights": engine.weights(),
            "state": engine.gather_state(),
            "facts": engine.epoch_facts(),
        }
        engine.meeting.close()
        engine = peer_engine(settings, port)
        engine.load(folder)
        engine.begin(facts_for())
        results[f"{stage} resumed"] = {"losses": train(engine), "state": engine.gather_state()}
        engine.meeting.close()
    engine = make_engine("local", settings_for(*DILOCO))
    results["local"] = {"losses": train(engine), "weights": engine.weights()}
    engine = make_engine("zero", settings_for())
    engine.load(Path(out, "stage-1"))
    results["zero"] = engine.step
    torch.save(results, Path(out, "results"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("alone")
    _check(Program(job_alone, (str(out), free_pair()), {}).end(), 0)
    return torch.load(out / "results", weights_only=False)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_single_peer_trains_like_one_worker_of_local(alone, stage):
    assert alone[stage]["losses"] == pytest.approx(alone["local"]["losses"], abs=1e-5)
    assert largest_difference(alone[stage]["weights"], alone["local"]["weights"]) < 1e-5
    assert (
        alone[stage]["facts"]["peers"] == 1
        and alone[stage]["facts"]["outer_steps"] == 3
        and alone[stage]["facts"]["exchange_bytes"] == 0
    )


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_stopped_peer_resumes_with_the_same_bits(alone, stage):
    assert alone[f"{stage} resumed"]["losses"] == alone[stage]["losses"][SAVED_AT:]
    assert largest_difference(alone[f"{stage} resumed"]["state"], alone[stage]["state"]) == 0
    assert alone["zero"] == SAVED_AT  # its checkpoint is one of zero plus the outer state


def job_averaging(out: str, port: int, join: str | None, stage: int, go: str) -> None:
    """Train on half of every batch; the first peer waits for the file `go` before its first step."""
    import torch.distributed as dist

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)  # as train.py's console does
    engine = peer_engine(
        averaging_settings(f"train_batch_size={BATCH // 2}", f"zero_optimization.stage={stage}"),
        port,
        join,
        number=int(bool(join)),
    )
    engine.begin(facts_for())
    images, labels = data()
    half = slice(BATCH // 2, BATCH) if join else slice(0, BATCH // 2)
    which, size = engine.data_shard[0], engine.batch_sizes.micro
    assert engine.step == int(bool(join))  # the second peer joins at the first exchange
    while not os.path.exists(go):
        time.sleep(0.02)
    stream = (
        (images[step, half][which * size : (which + 1) * size], labels[step, half][which * size : (which + 1) * size])
        for step in range(engine.step, STEPS)
    )
    while engine.step < STEPS:
        engine.train_batch(stream)
    weights = engine.weights()
    if engine.is_main:
        torch.save({"weights": weights, "facts": engine.epoch_facts(), "outer": engine.outer.state()}, out)
    dist.barrier()
    engine.close()


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_peers_of_one_and_of_two_processes_that_average_every_step_train_as_one_loop_on_both_halves(tmp_path, stage):
    """The first peer makes the first step alone; the second joins after it, untrained."""
    port, go = free_pair(), tmp_path / "go"
    first = Program(job_averaging, (str(tmp_path / "a"), port, None, 1, str(go)), {})
    first.wait_for("listening at")
    arguments = (str(tmp_path / "b"), free_pair(), f"{HERE}:{port}", stage, str(go))
    second = programs.ranks(2, job_averaging, *arguments)
    second[0].wait_for("waiting for the others' next exchange")
    go.touch()
    for program in (first, *second):
        _check(program.end(), 0)
    a, b = (torch.load(tmp_path / name, weights_only=False) for name in "ab")
    assert largest_difference(a["weights"], b["weights"]) == 0 and largest_difference(a["outer"], b["outer"]) == 0
    assert a["facts"]["peers"] == b["facts"]["peers"] == 2 and a["facts"]["exchange_bytes"] == 4 * sum(
        v.numel() for v in a["weights"].values()
    )

    torch.manual_seed(3)
    settings = averaging_settings()
    model = network(settings)
    from optim.lr_schedule import Schedule
    from optim.optimizers import build_optimizer

    optimizer, schedule = (
        build_optimizer(settings.engine["optimizer"], model, fused=False),
        Schedule(settings.schedule, 20),
    )
    for step, (images, labels) in enumerate(zip(*data(), strict=True)):
        seen = slice(0, BATCH // 2) if step == 0 else slice(0, BATCH)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * schedule(step)
        optimizer.zero_grad()
        F.cross_entropy(model(images[seen]), labels[seen]).backward()
        optimizer.step()
    assert largest_difference(a["weights"], model.state_dict()) < 1e-6


# --- train.py -----------------------------------------------------------------------------------------------------


def peer(training: list, name: str, *arguments, **environment) -> Program:
    return start(
        "train.py",
        *training,
        "--name",
        name,
        "--strategy",
        "local",
        "--set",
        "parallel.local_steps=5",
        "--set",
        "parallel.patience_seconds=30",
        *arguments,
        **environment,
    )


def listens_at(program: Program) -> str:
    program.wait_for("listening at")
    return program.said().split("listening at ")[1].split(";")[0]


def bytes_of(runs: Path, name: str) -> bytes:
    return (runs / name / "weights.safetensors").read_bytes()


def test_the_run_survives_a_killed_a_late_and_a_stopped_peer(training, runs):
    """The killed peer is the first, whose lighthouse all use. The remaining peers end with equal weights."""
    long = ("--set", "train_batch_size=20", "--epochs", "30")  # 15 steps an epoch
    first = peer(training, "peer-a", "--host-peers", f"{HERE}:{free_pair()}", *long)
    place = listens_at(first)
    first.wait_for("accuracy")  # of an epoch, with which it writes its weights
    second = peer(training, "peer-b", "--join", place, *long)
    second.wait_for("2 including this one")
    first.send(signal.SIGKILL)
    third = peer(training, "peer-c", "--join", listens_at(second), *long)
    second.wait_for(f"{place} left")
    third.wait_for("took over the state of the others")
    third.wait_for("accuracy")
    third.send(signal.SIGTERM)
    assert third.end().code == STOPPED
    again = peer(training, "peer-c", "--join", listens_at(second), *long)
    again.wait_for("2 including this one")
    for program in (second, again):
        _check(program.end(), 0)
    assert first.end().code == -signal.SIGKILL
    assert bytes_of(runs, "peer-b") == bytes_of(runs, "peer-c") != bytes_of(runs, "peer-a")
    lines = {name: RunFolder(runs / name).metrics() for name in ("peer-b", "peer-c")}
    assert lines["peer-b"][-1]["train_loss"] < lines["peer-b"][0]["train_loss"] - 0.2
    for name in lines:
        last = lines[name][-1]
        assert last["step"] == 450 and last["epoch"] == 30 and last["peers"] == 2 and last["outer_steps"] == 90
        assert last["exchange_bytes"] == ring_bytes(last["exchange_bytes"] // 4, 2) > 0 and last["exchange_seconds"] > 0
    assert lines["peer-b"][-1]["test_correct"] == lines["peer-c"][-1]["test_correct"]
    assert lines["peer-c"][0]["epoch"] > 1 and "outer/progress" in json.dumps(list(load_state(runs / "peer-b")))


def load_state(run: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(RunFolder(run).newest_checkpoint() / "state.safetensors")


def test_a_peer_that_waits_to_join_can_be_stopped(training):
    """The first peer makes so many local steps that the second would wait for minutes."""
    long = ("--set", "parallel.local_steps=100000", "--epochs", "100000")
    first = peer(training, "peer-long", "--host-peers", f"{HERE}:{free_pair()}", *long)
    second = peer(training, "peer-waits", "--join", listens_at(first), *long)
    second.wait_for("waiting for the others' next exchange")
    second.send(signal.SIGTERM)
    done = second.end()
    assert done.code == STOPPED and "Traceback" not in done.err
    first.send(signal.SIGTERM)
    assert first.end().code == STOPPED


def test_a_peer_that_is_stopped_before_the_last_exchange_exchanges_and_finishes_after_a_resume(training, runs):
    """The other peer is alive, but does not finish its steps while the test runs."""
    long = ("--set", "parallel.local_steps=100000", "--epochs", "10")
    words = (training, "peer-last", "--host-peers", f"{HERE}:{free_pair()}", *long)
    first = peer(*words)
    other = Heartbeat(listens_at(first), "other", lambda: True)
    other.start()
    first.wait_for("the last exchange follows")
    first.send(signal.SIGTERM)
    done = first.end()
    other.ended.set()
    assert done.code == STOPPED and "stopped while waiting for an exchange" in done.out, done.text
    assert [line["epoch"] for line in RunFolder(runs / "peer-last").metrics()] == list(range(1, 10))
    _check(peer(*words).end(), 0)
    last = RunFolder(runs / "peer-last").metrics()[-1]
    assert last["epoch"] == 10 and last["outer_steps"] == 1 and RunFolder(runs / "peer-last").is_finished()
