"""Parallelism strategies at the same global batch size: parts of an epoch, and a projection to more hosts.

    python benchmarks/strategies.py --out results/strategies                       all, on all GPUs or two CPU processes
    python benchmarks/strategies.py --strategies "ddp,zero 1" --steps 8 --rounds 1                         a short run
    python benchmarks/strategies.py --processes 1,2,4 --preset spt-lsa --set bf16.enabled=true --link-gbps 2,25

In: a prepared dataset. Out: two tables on the screen and, in --out, strategies.json, strategies.md, epoch.png and
hosts.png.

Every measurement uses new processes, the engines and batches of train.py, a time limit, and --warm-up steps before the
--steps that count. All rows take turns, --rounds times. On a CPU each process uses the same number of cores in every
row, as each would have its own GPU. A row that cannot run reports the reason, and the others continue.

Parts of an epoch: `data` is the wait for batches. `communication` is the time with an exchange in flight and no
computation, including the wait for slower processes. `training` is the rest. Together they are `running`. The share of
communication comes from additional steps under PyTorch's profiler (`communication_trace.py`) in the first round.
Communication that overlaps with computation costs nothing and is in the JSON (`under_way_share`). Bytes are counted in
PyTorch's dispatcher.
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
from benchmarks.lib.options import (
    add_data,
    add_settings,
    keep,
    note,
    origin,
    output_folder,
    several,
    some_of,
    step_settings,
)
from benchmarks.lib.process_groups import Failed, Fresh, Start, device_environment, run_group
from benchmarks.lib.timing import alternate, machine, ratios
from common.errors import DatasetError, SettingsError
from common.machine import visible_gpus
from config.command_line import Parser, above_zero, at_least_one, run_cli
from config.overrides import path_of
from config.settings import ParallelSettings, Settings
from image_data.dataset import Dataset
from image_data.preparation.decoding import available_cores

WORKER = "benchmarks/lib/strategy_worker.py"
ONE_PROCESS = "one process"  # plain PyTorch: the reference of all other rows


@dataclass(frozen=True)
class Case:
    """A strategy with the settings of its row."""

    strategy: str
    overrides: tuple[str, ...] = ()
    alone: bool = False  # also measured on one process
    one_program: bool = False  # one process drives all the GPUs


CASES = {
    "ddp": Case("ddp"),
    **{f"zero {stage}": Case("zero", (f"zero_optimization.stage={stage}",), alone=stage == 1) for stage in range(4)},
    "fsdp": Case("fsdp"),
    # With fewer than about four micro-batches per stage, stages mostly wait.
    "pipeline": Case("pipeline", ("parallel.stages=2", "gradient_accumulation_steps=8")),
    "gossip": Case("gossip"),
    "local": Case("local"),
    "dp": Case("dp", one_program=True),
}


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    name: str
    case: Case
    processes: int  # or GPUs, where one process drives all of them
    settings: Settings

    @property
    def topology(self) -> str | None:
        return self._setting("topology", None)

    @property
    def stages(self) -> int:
        return self._setting("stages", 1)

    @property
    def period(self) -> int:
        """Steps after which the communication pattern repeats."""
        from parallel.topologies import rounds_of

        rounds = len(rounds_of(self.topology, self.processes, self.processes)) if self.topology else 1
        return self._setting("local_steps", rounds)

    def _setting(self, name: str, otherwise: Any) -> Any:
        """Return a setting of `[parallel]` if the strategy has one of this name."""
        from parallel.strategies import engine_class

        return (
            getattr(self.settings.parallel, name)
            if name in engine_class(self.case.strategy).used_settings
            else otherwise
        )


def plan(options: argparse.Namespace, num_gpus: int) -> list[Row]:
    """Return the rows, the reference first. Raises SettingsError for an unknown preset or setting."""

    def row(name: str, case: Case, processes: int) -> Row:
        chosen = [override for override in options.set if concerns(override, case.strategy)]
        settings = step_settings(options.preset, [*chosen, *case.overrides], strategy=case.strategy)
        return Row(name, case, processes, settings)

    rows = [row(ONE_PROCESS, CASES["ddp"], 1)]
    for processes in options.processes:
        for name in options.strategies:
            case = CASES[name]
            if (processes > 1 or case.alone) and not (case.one_program and num_gpus < 2):
                rows.append(row(name, case, processes))
    return rows


def concerns(override: str, strategy: str) -> bool:
    """Return whether a `--set` applies to this strategy.

    `parallel.stages`, for example, applies to the row of the pipeline only; the other strategies would reject it.
    """
    from parallel.strategies import engine_class

    group, _, name = path_of(override).partition(".")
    if group == "parallel" and name in {field.name for field in fields(ParallelSettings)}:
        return name in engine_class(strategy).used_settings
    return group != "zero_optimization" or engine_class(strategy).uses_full_ds_config


class Turn:
    """Measurements of one row: each call makes one, until one has failed."""

    def __init__(self, row: Row, options: argparse.Namespace, start: Start):
        self.row, self.options, self.start = row, options, start
        self.failed: str | None = None
        self.measured: list[list[dict[str, Any]]] = []  # answers of the processes, by round

    def __call__(self) -> str:
        """Measure once and return a short text for the screen."""
        if self.failed:
            return "skipped"
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
        except (Failed, SettingsError) as reason:  # the latter: a topology that does not allow this number of processes
            self.failed = str(reason)
            return f"failed: {self.failed}"
        self.measured.append(answers)
        return (
            f"{options.steps * answers[0]['batch']['total'] / max(a['running_seconds'] for a in answers):,.0f} images/s"
        )


def summarize(turn: Turn, steps: int) -> dict[str, Any]:
    """Return the results of all rounds of a row.

    Seconds are those of the slowest process; `communication` is the mean share over all processes.
    """
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
    """Measure every row. Raises SettingsError or DatasetError if no row could run."""
    import torch

    if not Dataset.is_prepared(options.data_dir):
        raise DatasetError(
            f"{options.data_dir} holds no prepared dataset. Run prepare_dataset.py, or choose another --data-dir"
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
        lambda number, name, text: note(f"round {number + 1} of {options.rounds}: {name}: {text}"),
    )
    table = [summarize(turn, options.steps) for turn in turns.values()]
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


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    gpus = len(visible_gpus())
    parser = Parser(
        "python benchmarks/strategies.py",
        "Compare parallelism strategies: parts of an epoch, and a projection to more hosts.",
        example="python benchmarks/strategies.py --out results/strategies\n"
        'python benchmarks/strategies.py --strategies "ddp,zero 1" --steps 8 --rounds 1',
    )
    add_data(parser)
    add_settings(parser, "spt-lsa" if gpus else "cpu")
    what = parser.add_argument_group("systems")
    what.add_argument(
        "--strategies",
        type=some_of("strategy", CASES),
        default=",".join(CASES),
        metavar="A,B",
        help=f"strategies to compare: {', '.join(CASES)} (default: all; dp needs two GPUs)",
    )
    what.add_argument(
        "--processes",
        type=several(int),
        default=f"1,{gpus if gpus > 1 else 2}" if gpus != 1 else "1",
        metavar="N,M",
        help="numbers of processes (default: 1 and the number of GPUs; without a GPU 1,2)",
    )
    how = parser.add_argument_group("measurement")
    how.add_argument(
        "--steps",
        type=at_least_one,
        default=64,
        metavar="N",
        help="optimizer steps per measurement (default: %(default)s)",
    )
    how.add_argument(
        "--warm-up",
        type=at_least_one,
        default=5,
        metavar="N",
        help="warm-up steps before each measurement (default: %(default)s)",
    )
    how.add_argument(
        "--rounds", type=at_least_one, default=3, metavar="N", help="measurements per row (default: %(default)s)"
    )
    how.add_argument(
        "--threads",
        type=at_least_one,
        metavar="N",
        help="threads per process on a CPU (default: cores / largest number of processes)",
    )
    how.add_argument(
        "--limit-seconds",
        type=above_zero,
        default=600,
        metavar="S",
        help="time limit of a measurement in seconds (default: %(default)s)",
    )
    more = parser.add_argument_group("projection to more hosts")
    more.add_argument(
        "--hosts",
        type=several(int),
        default="2,4,8,16",
        metavar="N,M",
        help="numbers of hosts to project to (default: %(default)s)",
    )
    more.add_argument(
        "--link-gbps",
        type=several(float),
        default="1,10",
        metavar="X,Y",
        help="link bandwidths between hosts in Gbit/s (default: %(default)s)",
    )
    more.add_argument(
        "--link-latency-us",
        type=float,
        default=50.0,
        metavar="US",
        help="latency between hosts in microseconds (default: 50)",
    )
    kept = parser.add_argument_group("output")
    kept.add_argument(
        "--out", type=output_folder, metavar="DIR", help="folder for the report and its plots (default: none)"
    )
    options = parser.parse_args(arguments)
    if gpus and max(options.processes) > gpus:
        parser.error(
            f"--processes: {max(options.processes)} processes need {max(options.processes)} GPUs, found {gpus}"
        )
    options.links = [Link(gigabits, 1e-6 * options.link_latency_us) for gigabits in options.link_gbps]
    return options


def main(arguments: Sequence[str] | None = None, start: Start = Fresh) -> int:
    options = parse_arguments(arguments)
    return run_cli(lambda: measure_and_report(options, start))


def measure_and_report(options: argparse.Namespace, start: Start) -> int:
    """Measure, print and write the report. Returns the exit code: 1 if every row failed."""
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that running processes are ended
    sys.exit(main())
