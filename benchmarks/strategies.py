"""Every way of sharing the work over processes, at the same global batch: where an epoch's seconds go, and what more hosts would do.

    python benchmarks/strategies.py --out results/strategies                       all of them, on all GPUs or on two CPU processes
    python benchmarks/strategies.py --strategies "ddp,zero 1" --steps 8 --rounds 1                              a quick look
    python benchmarks/strategies.py --processes 1,2,4 --preset spt-lsa --set bf16.enabled=true --link-gbps 2,25

In: a prepared dataset. Out: two tables on the screen and, in --out, strategies.json, strategies.md, epoch.png and hosts.png.

Every measurement has processes of its own, the engines and batches of train.py, a time limit, and --warm-up steps before the
--steps that count; all take turns, --rounds times. On a CPU each process keeps to the same number of cores, whichever row it
belongs to, as each would have a GPU of its own. A row that cannot run says why, and the others go on.

What an epoch consists of: `data` is the wait for batches, `communication` the time in which something was exchanged and nothing
computed, waiting for slower processes included, `training` the rest; together they are `running`. Communication is that
share of further steps under PyTorch's profiler (`exchange.py`), in the first round; what of it lay behind the computation
costs nothing and is in the JSON (`under_way_share`). The bytes are counted in PyTorch's dispatcher.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.lib import strategy_report
from benchmarks.lib.link_model import Link
from benchmarks.lib.options import add_data, add_settings, keep, origin, several, some_of
from benchmarks.lib.process_groups import Failed, Fresh, Start, device_environment, run_group
from benchmarks.lib.timing import alternate, machine, ratios
from common.errors import DatasetError, SettingsError
from common.machine import visible_gpus
from config.command_line import Parser, at_least_one, run_cli
from config.settings import ParallelSettings, Settings, resolve
from image_data.dataset import Dataset
from image_data.preparation.decoding import available_cores

WORKER = "benchmarks/lib/strategy_worker.py"
ONE_PROCESS = "one process"  # plain PyTorch: what all others are compared with


@dataclass(frozen=True)
class Case:
    """A strategy with the settings that make it that row of the table."""

    strategy: str
    overrides: tuple[str, ...] = ()
    alone: bool = False  # also worth a row on one process
    one_program: bool = False  # one process drives all the GPUs


CASES = {
    "ddp": Case("ddp"),
    **{f"zero {stage}": Case("zero", (f"zero_optimization.stage={stage}",), alone=stage == 1) for stage in range(4)},
    "fsdp": Case("fsdp"),
    # With fewer than about four micro-batches a stage, stages mostly wait.
    "pipeline": Case("pipeline", ("parallel.stages=2", "gradient_accumulation_steps=8")),
    "gossip": Case("gossip"),
    "local": Case("local"),
    "dp": Case("dp", one_program=True),
}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    case: Case
    processes: int  # or GPUs of the one program
    settings: Settings

    @property
    def topology(self) -> str | None:
        return self._setting("topology", None)

    @property
    def stages(self) -> int:
        return self._setting("stages", 1)

    @property
    def period(self) -> int:
        """Steps after which the same exchanges come again."""
        from parallel.topologies import rounds_of

        rounds = len(rounds_of(self.topology, self.processes, self.processes)) if self.topology else 1
        return self._setting("local_steps", rounds)

    def _setting(self, name: str, otherwise: Any) -> Any:
        """A setting of `[parallel]` where the strategy has one of this name."""
        from parallel.strategies import engine_class

        return (
            getattr(self.settings.parallel, name)
            if name in engine_class(self.case.strategy).used_settings
            else otherwise
        )


def plan(options: argparse.Namespace, num_gpus: int) -> list[Row]:
    """The rows, the reference first. Raises SettingsError for a preset or a setting that does not exist."""

    def row(name: str, case: Case, processes: int) -> Row:
        chosen = [override for override in options.set if concerns(override, case.strategy)]
        return Row(name, case, processes, resolve(options.preset, [*chosen, *case.overrides], strategy=case.strategy))

    rows = [row(ONE_PROCESS, CASES["ddp"], 1)]
    for processes in options.processes:
        for name in options.strategies:
            case = CASES[name]
            if (processes > 1 or case.alone) and not (case.one_program and num_gpus < 2):
                rows.append(row(name, case, processes))
    return rows


def concerns(override: str, strategy: str) -> bool:
    """Whether a `--set` is for this strategy: `parallel.stages` is for the pipeline's row only, which would be refused by the others."""
    from parallel.strategies import engine_class

    group, _, name = override.partition("=")[0].strip().partition(".")
    if group == "parallel" and name in {field.name for field in fields(ParallelSettings)}:
        return name in engine_class(strategy).used_settings
    return group != "zero_optimization" or engine_class(strategy).uses_full_ds_config


class Turn:
    """One row's part of the rounds: each call is a measurement, until one has failed."""

    def __init__(self, row: Row, options: argparse.Namespace, start: Start):
        self.row, self.options, self.start = row, options, start
        self.failed: str | None = None
        self.measured: list[list[dict[str, Any]]] = []  # for each round the answers of the processes

    def __call__(self) -> str:
        """Measure once; a few words on it for the screen."""
        if self.failed:
            return "left out"
        options, row = self.options, self.row
        programs = 1 if row.case.one_program else row.processes
        environment = device_environment(options.threads)
        if row.case.one_program:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible_gpus()[: row.processes])
        try:
            request = {
                "settings": row.settings.as_dict(),
                "data_dir": str(options.data_dir.resolve()),
                "source": options.source,
                "threads": options.threads,
                "pin": bool(environment.get("DS_ACCELERATOR")) and options.pin,
                "warm_up": options.warm_up,
                "steps": options.steps,
                "look": not self.measured,
                "period": row.period,
            }
            answers = run_group(WORKER, request, programs, options.limit_seconds, environment, self.start)
        except (Failed, SettingsError) as reason:  # the latter: a graph that does not go with so many processes
            self.failed = str(reason)
            return f"failed: {self.failed}"
        self.measured.append(answers)
        return (
            f"{options.steps * answers[0]['batch']['total'] / max(a['running_seconds'] for a in answers):,.0f} images/s"
        )


def summarise(turn: Turn, steps: int) -> dict[str, Any]:
    """What all rounds of a row say. Seconds are those of the slowest process; `communication` is the mean share of all processes."""
    row = turn.row
    facts: dict[str, Any] = {
        "name": row.name,
        "strategy": row.case.strategy,
        "processes": row.processes,
        "overrides": list(row.case.overrides),
        "failed": turn.failed,
        "stages": row.stages,
        "topology": row.topology,
    }
    if turn.failed:
        return facts
    first = turn.measured[0]
    main = first[0]  # the main process: the first stage of a pipeline
    running = [max(answer["running_seconds"] for answer in answers) for answers in turn.measured]
    shares = {key: sum(answer["timing"][key] for answer in first) / len(first) for key in main["timing"]}
    return {
        **facts,
        **shares,
        "describe": main["describe"],
        "running_seconds": running,
        "data_seconds": [sum(answer["data_seconds"] for answer in answers) / len(answers) for answers in turn.measured],
        "images_per_second": [steps * main["batch"]["total"] / seconds for seconds in running],
        "start_seconds": [max(answer["start_seconds"] for answer in answers) for answers in turn.measured],
        "memory_bytes": max(answer["memory_bytes"] for answer in first),
        "num_parameters": main["num_parameters"],
        "batch": main["batch"],
        "steps": steps,
        "steps_per_epoch": main["steps_per_epoch"],
        "device": main["device"],
        "source": main["source"],
        "counts": main["counts"],
        "exchanges": main["exchanges"],
        "loss": sum(answer["losses"][-1] for answer in first) / len(first),
    }


def run(options: argparse.Namespace, start: Start = Fresh) -> dict[str, Any]:
    """Measure every row. Raises SettingsError or DatasetError for what no row could work with."""
    import torch

    if not Dataset.is_prepared(options.data_dir):
        raise DatasetError(
            f"{options.data_dir} holds no prepared dataset; make one with prepare_dataset.py, or name another with --data-dir"
        )
    gpus = visible_gpus()
    rows = plan(options, len(gpus))
    most = max(options.processes)
    options.threads = options.threads or max(1, available_cores() // most)
    options.pin = options.threads * most <= available_cores()
    turns = {f"{row.name} x {row.processes}": Turn(row, options, start) for row in rows}
    alternate(
        turns,
        options.rounds,
        lambda number, name, said: note(f"round {number + 1} of {options.rounds}: {name}: {said}"),
    )
    table = [summarise(turn, options.steps) for turn in turns.values()]
    reference = table[0].get("running_seconds")
    for line in table:
        if reference and not line["failed"]:
            line["speed_up"] = ratios(reference, line["running_seconds"])
    kept = ("set", "processes", "steps", "warm_up", "rounds", "threads", "pin")
    settings = {"preset": Path(options.preset).stem, **{key: getattr(options, key) for key in kept}}
    report = {
        **origin(),
        "machine": machine(torch.device("cuda" if gpus else "cpu")),
        "settings": settings,
        "rows": table,
    }
    report["projection"] = strategy_report.projection(table, options.hosts, options.links)
    return report


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    gpus = len(visible_gpus())
    parser = Parser(
        "python benchmarks/strategies.py",
        "Where an epoch's seconds go under every strategy, and what more hosts would do.",
        example="python benchmarks/strategies.py --out results/strategies\n"
        'python benchmarks/strategies.py --strategies "ddp,zero 1" --steps 8 --rounds 1',
    )
    add_data(parser)
    add_settings(parser, "spt-lsa" if gpus else "cpu")
    what = parser.add_argument_group("what is compared")
    what.add_argument(
        "--strategies",
        type=some_of("strategy", CASES),
        default=",".join(CASES),
        metavar="A,B",
        help=f"of {', '.join(CASES)} (default: all; dp needs two GPUs)",
    )
    what.add_argument(
        "--processes",
        type=several(int),
        default=f"1,{gpus if gpus > 1 else 2}" if gpus != 1 else "1",
        metavar="N,M",
        help="numbers of processes (default: one and all GPUs; without a GPU 1,2)",
    )
    how = parser.add_argument_group("how it is measured")
    how.add_argument(
        "--steps",
        type=at_least_one,
        default=64,
        metavar="N",
        help="optimiser steps of a measurement (default: %(default)s)",
    )
    how.add_argument(
        "--warm-up", type=at_least_one, default=5, metavar="N", help="steps before them (default: %(default)s)"
    )
    how.add_argument(
        "--rounds", type=at_least_one, default=3, metavar="N", help="measurements of each row (default: %(default)s)"
    )
    how.add_argument(
        "--threads",
        type=at_least_one,
        metavar="N",
        help="of each process on a CPU (default: the cores by the most processes)",
    )
    how.add_argument(
        "--limit-seconds",
        type=float,
        default=600,
        metavar="S",
        help="seconds that a measurement may take (default: %(default)s)",
    )
    more = parser.add_argument_group("projection to more hosts")
    more.add_argument(
        "--hosts", type=several(int), default="2,4,8,16", metavar="N,M", help="numbers of hosts (default: %(default)s)"
    )
    more.add_argument(
        "--link-gbps",
        type=several(float),
        default="1,10",
        metavar="X,Y",
        help="Gbit/s between hosts (default: %(default)s)",
    )
    more.add_argument(
        "--link-latency-us",
        type=float,
        default=50.0,
        metavar="US",
        help="microseconds of a message between hosts (default: 50)",
    )
    kept = parser.add_argument_group("what is kept")
    kept.add_argument(
        "--out", type=Path, metavar="DIR", help="write the report and its pictures here (default: nowhere)"
    )
    options = parser.parse_args(arguments)
    if gpus and max(options.processes) > gpus:
        parser.error(f"--processes: there are {gpus} GPUs, and each process needs one of its own")
    options.links = [Link(gigabits, 1e-6 * options.link_latency_us) for gigabits in options.link_gbps]
    return options


def main(arguments: Sequence[str] | None = None, start: Start = Fresh) -> int:
    options = parse_arguments(arguments)
    return run_cli(lambda: measure_and_report(options, start))


def measure_and_report(options: argparse.Namespace, start: Start) -> int:
    """Returns the exit code: 1 when every row failed."""
    report = run(options, start)
    print(strategy_report.as_text(report))
    if options.out:
        keep(
            (options.out / "strategies.json", json.dumps(report, indent=1) + "\n"),
            (options.out / "strategies.md", strategy_report.as_markdown(report)),
        )
        strategy_report.draw(report, options.out)
    return int(all(row["failed"] for row in report["rows"]))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that the processes at work are ended
    sys.exit(main())
