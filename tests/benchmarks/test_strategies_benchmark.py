"""benchmarks/strategies.py: every strategy does the same work and has its row; bytes and seconds add up. No speeds.

pytest tests/benchmarks/test_strategies_benchmark.py
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import programs
import pytest
from small_runs import TEST_PER_CLASS

from benchmarks import strategies
from benchmarks.lib import process_groups, strategy_report
from benchmarks.lib.communication_trace import Exchange, length, merge, subtract
from benchmarks.lib.link_model import RING, Layout, Link, on_the_wire, project, sent_by_process
from benchmarks.lib.process_groups import Failed, run_group
from parallel.topologies import TOPOLOGIES

STEPS, WARM_UP, ROUNDS = 2, 1, 1
EXACT = ["ddp", "zero 0", "zero 1", "zero 2", "zero 3", "fsdp", "pipeline"]  # train the same steps as one process
OTHERS = ["gossip", "local"]


class Forked:
    """A process of a group that is forked with PyTorch in memory, instead of a new one."""

    def __init__(self, program: str, words: list[str], environment: dict[str, str]):
        self.program = programs.start(program, *words, **environment)

    def poll(self) -> int | None:
        return self.program.process.exitcode

    def kill(self) -> None:
        self.program.process.kill()
        self.program.process.join()

    def said(self) -> str:
        return self.program.said("err")


@pytest.fixture(scope="module")
def measured(shapes, tiny, tmp_path_factory) -> tuple[dict, Path]:
    """The JSON and the folder of a small run of all strategies. 8 micro-batches of the pipeline need 64 images."""
    folder = tmp_path_factory.mktemp("strategies")
    code = strategies.main(
        [
            "--data-dir",
            str(shapes),
            "--preset",
            str(tiny),
            "--set",
            "model.dropout=0.0",
            "--set",
            "parallel.local_steps=2",
            "--steps",
            str(STEPS),
            "--warm-up",
            str(WARM_UP),
            "--rounds",
            str(ROUNDS),
            "--processes",
            "1,2",
            "--limit-seconds",
            "120",
            "--out",
            str(folder),
        ],
        start=Forked,
    )
    assert code == 0
    return json.loads((folder / "strategies.json").read_text()), folder


def rows(report: dict, processes: int = 2) -> dict[str, dict]:
    return {row["name"]: row for row in report["rows"] if row["processes"] == processes}


def payload(row: dict, kind: str) -> float:
    """Return bytes per step in exchanges of one kind, without flags and norms."""
    return sum(x.payload for x in strategy_report.exchanges_of(row) if x.kind == kind and not x.control)


def test_every_strategy_has_one_row(measured):
    report, _ = measured
    assert [(row["name"], row["processes"]) for row in report["rows"]] == [
        ("one process", 1),
        ("zero 1", 1),
        *((name, 2) for name in strategies.CASES if name != "dp"),
    ]
    assert {row["name"]: row["failed"] for row in report["rows"]} == dict.fromkeys(
        [row["name"] for row in report["rows"]]
    )


def test_all_strategies_do_the_same_work(measured):
    report, _ = measured
    assert {(row["batch"]["total"], row["steps"], row["num_parameters"], row["source"]) for row in report["rows"]} == {
        (64, STEPS, report["rows"][0]["num_parameters"], "tensor")
    }
    assert {row["counts"]["seen"] for row in report["rows"]} == {10 * TEST_PER_CLASS}


def test_strategies_that_train_the_same_steps_have_the_same_loss(measured):
    report, _ = measured
    alone = report["rows"][0]
    for name in EXACT:
        row = rows(report)[name]
        assert row["loss"] == pytest.approx(alone["loss"], rel=1e-5), name
        assert row["counts"]["loss"] == pytest.approx(alone["counts"]["loss"], rel=1e-5), name
        assert abs(row["counts"]["correct"] - alone["counts"]["correct"]) <= 1, name
    for name in OTHERS:
        assert rows(report)[name]["counts"]["loss"] == pytest.approx(alone["counts"]["loss"], rel=0.2)


def test_an_epoch_is_the_sum_of_its_parts(measured):
    report, _ = measured
    for row in report["rows"]:
        parts = strategy_report.epoch_seconds(row)
        assert min(parts.values()) >= 0
        assert sum(parts.values()) == pytest.approx(2 * parts["running"])
        assert parts["running"] == pytest.approx(
            statistics.median(row["running_seconds"]) * row["steps_per_epoch"] / STEPS
        )
        assert 0 <= row["exposed_share"] <= row["under_way_share"] <= 1
        assert row["speed_up"] == [
            a / b for a, b in zip(report["rows"][0]["running_seconds"], row["running_seconds"], strict=True)
        ]
    assert report["rows"][0]["under_way_share"] == 0
    assert all(row["under_way_share"] > 0 for row in rows(report).values())


def test_the_bytes_are_those_of_each_strategy(measured):
    report, _ = measured
    parameters = 4 * report["rows"][0]["num_parameters"]  # bytes, in fp32
    found = rows(report)
    for name, kind, share in (
        ("ddp", "all_reduce", 1),
        ("gossip", "all_reduce", 1),
        ("local", "all_reduce", 1 / 2),
        ("zero 0", "all_reduce", 1),
    ):
        assert payload(found[name], kind) == share * parameters, name
        assert sent_by_process(strategy_report.exchanges_of(found[name])) == pytest.approx(share * parameters, abs=200)
    # Shards are padded to equal sizes: a few bytes more. fully_shard gathers each layer twice, and so does ZeRO 3
    # unless the layer is still gathered.
    for name in ("zero 1", "zero 2"):
        assert parameters <= payload(found[name], "all_gather") < 1.01 * parameters
    assert 2 * parameters <= payload(found["fsdp"], "all_gather") < 2.1 * parameters
    for name in ("zero 3", "fsdp"):
        assert parameters <= payload(found[name], "reduce_scatter") < 1.05 * parameters
    # Activations of 16 tokens, or 17 with the CLS token, and their gradients: to the other stage and back.
    tokens = payload(found["pipeline"], "send") / (64 * 32 * 4)
    assert tokens in (16, 17) and payload(found["pipeline"], "receive") == payload(found["pipeline"], "send")


def test_the_report_has_text_tables_and_plots(measured, capsys):
    report, folder = measured
    text, markdown = strategy_report.as_text(report), (folder / "strategies.md").read_text()
    for row in report["rows"]:
        assert row["name"] in text and f"| {row['name']} |" in markdown
    for name in ("epoch.png", "hosts.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG") and name in markdown
    assert str(folder.parent) not in json.dumps(report) + markdown  # no path of this machine


def test_the_projection_names_the_fastest(measured):
    report, _ = measured
    assert [part["gigabits"] for part in report["projection"]] == [1.0, 10.0]
    for part in report["projection"]:
        assert set(part["step_seconds"]) == {*EXACT, *OTHERS}
        for i, name in enumerate(part["best"]):
            known = [times[i] for times in part["step_seconds"].values() if times[i] is not None]
            assert len(known) >= len(EXACT) and part["step_seconds"][name][i] == min(known)


def test_the_json_gives_the_page_that_was_written(measured):
    report, folder = measured
    markdown = strategy_report.as_markdown(report)
    assert markdown == (folder / "strategies.md").read_text()
    for part in report["projection"]:
        for name, times in part["step_seconds"].items():
            line = next(
                line
                for line in markdown.split(f"### {part['gigabits']:g} Gbit/s")[1].split("\n")
                if line.startswith(f"| {name} |")
            )
            assert [cell.strip(" *") for cell in line.split("|")[2:-1]] == [
                "-" if time is None else f"{1e3 * time:,.1f}" for time in times
            ]


def test_rows_that_fail_report_the_reason_and_the_others_continue(shapes, tiny, tmp_path, capsys):
    """Two errors: of the engine in its processes, and of an unknown topology before they are started."""
    code = strategies.main(
        [
            "--data-dir",
            str(shapes),
            "--preset",
            str(tiny),
            "--strategies",
            "zero 0,gossip",
            "--processes",
            "2",
            "--steps",
            "1",
            "--set",
            "train_batch_size=63",
            "--set",
            "parallel.topology=rign",
            "--warm-up",
            "1",
            "--rounds",
            "2",
            "--out",
            str(tmp_path),
        ],
        start=Forked,
    )
    report, printed = json.loads((tmp_path / "strategies.json").read_text()), capsys.readouterr()
    alone, zero, gossip = report["rows"]
    assert code == 0
    assert alone["failed"] is None and len(alone["running_seconds"]) == 2
    for row, reason in ((zero, "train_batch_size=63 is not divisible by 2"), (gossip, "did you mean 'ring'?")):
        assert reason in row["failed"] and reason in printed.out and reason in (tmp_path / "strategies.md").read_text()


def test_an_unknown_setting_is_an_error_before_anything_starts(shapes, capsys):
    assert strategies.main(["--data-dir", str(shapes), "--set", "model.widht=3"]) == 1
    assert "did you mean 'model.width'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strategies", "zero1"], "did you mean 'zero 1'?"),
        (["--processes", "1,x"], "--processes: needs numbers above 0, such as 1,2; got 1,x"),
        (["--link-gbps", "0"], "--link-gbps: needs numbers above 0"),
        (["--rounds", "0"], "--rounds: must be at least 1"),
    ],
)
def test_invalid_flags_are_rejected(arguments, message, capsys):
    with pytest.raises(SystemExit):
        strategies.main(arguments)
    assert message in capsys.readouterr().err


def test_a_missing_dataset_is_named(tmp_path, capsys):
    assert strategies.main(["--data-dir", str(tmp_path / "none")]) == 1
    assert "holds no prepared dataset" in capsys.readouterr().err


# --- groups of processes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "limit_seconds", "reason"),
    [
        ("import time; time.sleep(600)", 1, "still running after 1 s"),
        ("raise RuntimeError('bad luck')", 60, "RuntimeError: bad luck"),
        (
            "import os, time; os._exit(3) if os.environ['RANK'] == '1' else time.sleep(600)",
            60,
            "process 1 ended with exit code 3",
        ),
        ("import os; os.kill(os.getpid(), 9)", 60, "process 0 ended with exit code -9"),
    ],
)
def test_a_group_that_does_not_answer_is_ended(tmp_path, monkeypatch, body, limit_seconds, reason):
    monkeypatch.setattr(process_groups, "GRACE_SECONDS", 0.1)
    program = tmp_path / "worker.py"
    program.write_text(body)
    with pytest.raises(Failed, match=reason):
        run_group(str(program), {}, processes=2, limit_seconds=limit_seconds)


# --- arithmetic -------------------------------------------------------------------------------------------------------


def simulate_ring(kind: str, processes: int) -> tuple[int, float]:
    """Return rounds, and what each process sends of a payload of 1, of a simulated ring that passes chunks on."""
    have = {
        p: {c: {p} for c in range(processes)} for p in range(processes)
    }  # chunk -> the processes whose summands it contains
    everyone, rounds, sent = set(range(processes)), 0, 0.0
    for phase in {"all_reduce": 2, "reduce_scatter": 1}[kind] * [None]:
        del phase
        for _ in range(processes - 1):
            moving = [
                ((p + 1) % processes, (p - rounds) % processes, have[p][(p - rounds) % processes])
                for p in range(processes)
            ]
            for to, chunk, summands in moving:
                have[to][chunk] = have[to][chunk] | summands
            rounds, sent = rounds + 1, sent + 1 / processes
    complete = [sum(have[p][c] == everyone for c in range(processes)) for p in range(processes)]
    assert min(complete) == (processes if kind == "all_reduce" else 1)
    return rounds, sent


@pytest.mark.parametrize("processes", [2, 3, 5])
@pytest.mark.parametrize("kind", ["all_reduce", "reduce_scatter"])
def test_the_ring_formulas_equal_a_simulated_ring(kind, processes):
    rounds, sent = simulate_ring(kind, processes)
    assert RING[kind](processes) == (rounds, pytest.approx(sent))


def test_a_ring_of_all_processes_leaves_each_host_once():
    gradients = [Exchange("all_reduce", 2, calls=1, payload=1e6)]
    for per_host in (1, 2, 4):
        layout = Layout(4, per_host)
        num_bytes, rounds = on_the_wire(gradients, Layout(1, per_host), layout)
        assert num_bytes == pytest.approx(2e6 * (4 * per_host - 1) / (4 * per_host)) and rounds == 2 * (
            4 * per_host - 1
        )


@pytest.mark.parametrize("topology", [name for name in TOPOLOGIES if name != "complete"])
def test_the_traffic_of_gossip_does_not_grow_with_the_hosts(topology):
    """Over a full period, and with one worker per host; the complete graph is an all-reduce."""
    weights = [Exchange("all_reduce", 2, calls=1, payload=1e6)]
    sent = {
        hosts: on_the_wire(weights, Layout(1, 1, topology=topology), Layout(hosts, 1, topology=topology))[0]
        for hosts in (2, 4, 8, 16)
    }
    assert max(sent.values()) <= 1e6
    assert on_the_wire(weights, Layout(1, 1, topology="complete"), Layout(16, 1, topology="complete"))[0] > 1.8e6


def test_a_pipeline_sends_the_full_batch_once_between_two_stages():
    activations = [Exchange("send", 2, calls=8, payload=1e6), Exchange("receive", 2, calls=8, payload=1e6)]
    for hosts in (2, 4):
        num_bytes, rounds = on_the_wire(activations, Layout(1, 2, stages=2), Layout(hosts, 2, stages=2))
        assert num_bytes == pytest.approx(1e6 / (hosts / 2)) and rounds == 8


def test_flags_go_to_all_processes_even_in_gossip():
    flags = [Exchange("all_reduce", 2, calls=1, payload=8, control=True)]
    _, rounds = on_the_wire(flags, Layout(1, 2, topology="ring"), Layout(4, 2, topology="ring"))
    assert rounds == 2 * 7


def test_a_projection_divides_the_computation_and_adds_the_link():
    gradients = [Exchange("all_reduce", 1, calls=1, payload=1e9 / 8)]
    seconds = [
        project(gradients, Layout(1, 1), hosts, compute_seconds=8.0, exposed_seconds=0.5, link=Link(1.0, 0.25))
        for hosts in (1, 2, 4)
    ]
    assert seconds == [8.5, 4 + 0.5 + 1.0 + 2 * 0.25, 2 + 0.5 + 1.5 + 6 * 0.25]


def test_intervals_are_united_cut_and_subtracted():
    union = merge([(5, 7), (1, 3), (2, 4), (9, 20)], within=(2, 10))
    assert union == [(2, 4), (5, 7), (9, 10)] and length(union) == 5
    assert subtract(union, [(3, 6), (9, 9.5)]) == [(2, 3), (6, 7), (9.5, 10)]
    assert subtract([(0, 10)], [(2, 3), (4, 5)]) == [(0, 2), (3, 4), (5, 10)]
    assert subtract(union, []) == union and subtract([], union) == []
