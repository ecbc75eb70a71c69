"""What a training step costs: images a second, the share of the device's peak, milliseconds by part; against a bare loop, timm, Lightning.

    python benchmarks/training_step.py                                  one process: the GPU, or the CPU
    python benchmarks/training_step.py --preset spt-lsa --precision bf16 --compile both --json step.json --markdown step.md
    python benchmarks/training_step.py --strategies "zero 1" --peers bare --steps 20 --synthetic                a quick look, without data

In: a prepared dataset. Out: tables on the screen, and in --json and --markdown.

All contenders (`contenders.py`, `step_peers.py`) train the same network on the same batches, each in a process of its own, and
take turns: --warm-up steps once, then --rounds times --steps steps. The peers have AdamW, so it takes the place of
a preset's other optimiser, unless --set optimizer.type names one or there are no peers. A ratio is taken round by round against the bare loop
with the same arithmetic. FLOPs are those of the matrix products of a forward pass as PyTorch counts them, three times (the
backward pass has two for each); elementwise work and what a GPU recomputes are not in it. The peak is the data sheet's
(`peaks.py`) and, beside it, what a large product of matrices reached in this very run.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import statistics
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.lib import step_report
from benchmarks.lib.options import add_data, add_reports, add_settings, keep, origin, some_of
from benchmarks.lib.peak_flops import measured_flops, peak_flops
from benchmarks.lib.process_groups import Failed, device_environment, free_port
from benchmarks.lib.timing import alternate, machine
from benchmarks.strategies import CASES, concerns
from common.errors import DatasetError, SettingsError
from common.machine import visible_gpus
from config.catalog import table_names
from config.command_line import Parser, at_least_one, run_cli
from config.settings import Settings, resolve
from image_data.dataset import Dataset
from image_data.preparation.decoding import available_cores

STRATEGIES = ("ddp", "zero 0", "zero 1", "zero 2", "zero 3", "fsdp")


class Contender:
    """The near end of a contender: its processes, and what they have measured."""

    def __init__(self, name: str, bf16: bool, compiled: bool, options: argparse.Namespace):
        self.name, self.bf16, self.compiled, self.options = name, bf16, compiled, options
        self.left_out: str | None = None
        self.facts: dict[str, Any] = {}
        self.turns: list[dict[str, Any]] = []
        self.children: list[tuple[Any, Any]] = []

    @property
    def label(self) -> str:
        return f"{self.name}{', bf16' if self.bf16 and self.name != 'bare, bf16 weights' else ''}{', compiled' if self.compiled else ''}"

    def start(self, context: Any) -> None:
        """Begin its processes, which make their networks meanwhile."""
        from benchmarks.lib.step_contenders import serve

        options = self.options
        try:
            request = {
                "name": self.name,
                "settings": self.settings().as_dict(),
                "data_dir": str(options.data_dir.resolve()),
                **{key: getattr(options, key) for key in ("source", "synthetic", "threads", "pin", "processes")},
                "compile": self.compiled,
            }
        except SettingsError as error:
            self.left_out = str(error)
            return
        world = {
            "WORLD_SIZE": str(options.processes),
            "LOCAL_WORLD_SIZE": str(options.processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        for rank in range(options.processes):
            near, far = context.Pipe()
            child = context.Process(
                target=serve, args=(far, request, {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)}), daemon=True
            )
            child.start()
            far.close()
            self.children.append((child, near))

    def warm_up(self) -> None:
        """Wait for its processes, and let them make the steps that do not count; alone, for some of it is tuned by the clock."""
        if not self.left_out:
            self.facts = self._answers()[0]
        self.ask("warm up", self.options.warm_up)

    def settings(self) -> Settings:
        """Raises SettingsError for a preset or a setting that does not exist."""
        case, options = CASES.get(self.name, CASES["ddp"]), self.options
        chosen = [override for override in options.set if concerns(override, case.strategy)]
        ours = [f"bf16.enabled={str(self.bf16).lower()}", f"compile={'on' if self.compiled else 'off'}"]
        return resolve(options.preset, [*chosen, *case.overrides, *ours], strategy=case.strategy)

    def ask(self, what: str, count: int) -> list[dict[str, Any]]:
        """The answers of all its processes; an empty list where it is left out."""
        if not self.left_out:
            for _, near in self.children:
                near.send((what, count))
        return self._answers() if not self.left_out else []

    def _answers(self) -> list[dict[str, Any]]:
        try:
            return [self._answer(child, near) for child, near in self.children]
        except Failed as reason:
            self.left_out = str(reason)
            self.end()
            return [{}]

    def _answer(self, child: Any, near: Any) -> dict[str, Any]:
        limit = self.options.limit_seconds
        try:
            if not near.poll(limit):
                raise Failed(f"still at work after {limit:g} s")
            answer = near.recv()
        except (EOFError, OSError):
            child.join(5)
            raise Failed(f"its process ended with exit code {child.exitcode}; what it said stands above") from None
        if "left_out" in answer:
            raise Failed(answer["left_out"])
        return answer

    def turn(self) -> str:
        answers = self.ask("turn", self.options.steps)
        if self.left_out:
            return f"left out: {self.left_out}"
        seconds = max(answer["seconds"] for answer in answers)
        self.turns.append(
            {
                "seconds": seconds,
                "data_seconds": statistics.mean(answer["data_seconds"] for answer in answers),
                "loss": statistics.mean(answer["losses"][-1] for answer in answers),
            }
        )
        return f"{1e3 * seconds / self.options.steps:.2f} ms a step"

    def end(self) -> None:
        for _, near in self.children:
            if not self.left_out:
                near.send(None)
            near.close()
        for child, _ in self.children:
            child.join(20)
            if child.is_alive():
                child.kill()
                child.join()
        self.children = []


def run(options: argparse.Namespace, context: Any) -> dict[str, Any]:
    """Measure all contenders. Raises DatasetError without a dataset, SettingsError for a setting that does not exist."""
    import torch

    if not Dataset.is_prepared(options.data_dir):
        raise DatasetError(
            f"{options.data_dir} holds no prepared dataset; make one with prepare_dataset.py, or name another with --data-dir"
        )
    device = torch.device("cuda" if visible_gpus() else "cpu")
    options.threads = options.threads or max(1, available_cores() // options.processes)
    options.pin = device.type == "cpu" and options.processes * options.threads <= available_cores()
    contenders = [
        Contender(name, bf16, compiled, options)
        for bf16 in options.precision
        for compiled in options.compile
        for name in [*options.strategies, *options.peers]
        if name != "bare, bf16 weights" or bf16
    ]
    contenders[0].settings()
    try:
        with device_of_children(options.threads):
            for contender in contenders:
                contender.start(context)
        for contender in contenders:
            contender.warm_up()
            note(f"{contender.label}: {'left out: ' + contender.left_out if contender.left_out else 'ready'}")
        active = [contender for contender in contenders if not contender.left_out]
        alternate(
            {contender.label: contender.turn for contender in active},
            options.rounds,
            lambda number, name, said: note(f"round {number + 1} of {options.rounds}: {name}: {said}"),
        )
        rows = [measured(contender) for contender in contenders]
    finally:
        for contender in contenders:
            contender.end()
    torch.set_num_threads(options.threads)
    kept = ("set", "processes", "steps", "warm_up", "rounds", "threads", "pin", "synthetic")
    settings = {"preset": Path(options.preset).stem, **{key: getattr(options, key) for key in kept}}
    report = {
        **origin(),
        "machine": machine(device, (*PACKAGES, "timm", "lightning", "pytorch-lightning")),
        "settings": settings,
        "peaks": peaks(device, options.precision),
        "flops_per_image": flops(contenders[0], options.data_dir),
        "rows": rows,
    }
    step_report.complete(report)
    return report


PACKAGES = ("torch", "deepspeed", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali-cuda110")


def measured(contender: Contender) -> dict[str, Any]:
    """Everything that was found out about one contender."""
    looks = contender.ask("look", contender.options.steps)
    row: dict[str, Any] = {
        "label": contender.label,
        "name": contender.name,
        "bf16": contender.bf16,
        "compiled": contender.compiled,
        "left_out": contender.left_out,
    }
    if contender.left_out:
        return row
    batch = contender.settings().engine["train_batch_size"]
    seconds = [turn["seconds"] for turn in contender.turns]
    shares = {
        key: statistics.mean(look[key] for look in looks)
        for key in ("exposed_share", "under_way_share")
        if key in looks[0]
    }
    return {
        **row,
        **contender.facts,
        **shares,
        "batch": batch,
        "seconds": seconds,
        "steps": contender.options.steps,
        "images_per_second": [contender.options.steps * batch / value for value in seconds],
        "data_seconds": [turn["data_seconds"] for turn in contender.turns],
        "loss": contender.turns[-1]["loss"],
        "memory_bytes": max(look["memory_bytes"] for look in looks),
        "parts": looks[0].get("parts"),
        "no_parts": looks[0].get("no_parts"),
    }


def flops(contender: Contender, data_dir: Path) -> int:
    """Of one image's forward pass."""
    from benchmarks.lib.workload import Subject
    from models.cost import count_flops

    subject = Subject(contender.settings(), data_dir)
    return count_flops(subject.build().eval(), subject.side, "cpu")


def peaks(device: Any, precisions: Sequence[bool]) -> dict[str, dict[str, Any]]:
    """By arithmetic: operations a second of the data sheet, and those of a product of matrices just now."""
    result = {}
    for bf16 in precisions:
        paper, source = peak_flops(device, bf16)
        result["bf16" if bf16 else "fp32"] = {
            "data_sheet": paper,
            "source": source,
            "measured": measured_flops(device, bf16),
        }
    return result


@contextmanager
def device_of_children(threads: int) -> Any:
    """The environment that processes started meanwhile find."""
    before, words = dict(os.environ), device_environment(threads)
    os.environ.update(words)
    try:
        yield
    finally:
        for name in words:
            os.environ.pop(name)
        os.environ.update(before)


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    gpus = len(visible_gpus())
    peers = [name for name in table_names("benchmarks/lib/step_baselines.py", "PEERS") if "," not in name]
    parser = Parser(
        "python benchmarks/training_step.py",
        "What a training step costs: images a second, share of the peak, milliseconds by part; against a bare loop, timm, Lightning.",
        example="python benchmarks/training_step.py --preset spt-lsa --precision fp32,bf16 --compile both --json step.json\n"
        'python benchmarks/training_step.py --strategies "zero 1" --peers bare --steps 20 --synthetic',
    )
    data = add_data(parser)
    data.add_argument("--synthetic", action="store_true", help="one batch of noise on the device instead of the data")
    settings = add_settings(parser, "spt-lsa" if gpus else "cpu")
    settings.add_argument(
        "--batch", type=at_least_one, metavar="N", help="images of a global batch (default: the preset's)"
    )
    what = parser.add_argument_group("what is compared")
    what.add_argument(
        "--strategies",
        type=some_of("strategy", STRATEGIES, none=True),
        default="ddp,zero 1",
        metavar="A,B",
        help=f"of {', '.join(STRATEGIES)}, or none (default: %(default)s)",
    )
    what.add_argument(
        "--peers",
        type=some_of("peer", peers, none=True),
        default=",".join(peers),
        metavar="A,B",
        help=f"of {', '.join(peers)}, or none; bare brings its bf16 form along (default: all)",
    )
    what.add_argument(
        "--precision",
        type=some_of("precision", ("fp32", "bf16")),
        default="bf16" if gpus else "fp32",
        metavar="A,B",
        help="fp32, bf16 or both: fp32,bf16 (default: bf16 on a GPU, else fp32)",
    )
    what.add_argument("--compile", default="off", choices=["off", "on", "both"], help="torch.compile (default: off)")
    how = parser.add_argument_group("how it is measured")
    how.add_argument("--processes", type=at_least_one, default=1, metavar="N", help="of each contender (default: 1)")
    how.add_argument(
        "--steps",
        type=at_least_one,
        default=50 if gpus else 10,
        metavar="N",
        help="of a turn (default: 50 on a GPU, else 10)",
    )
    how.add_argument(
        "--warm-up",
        type=at_least_one,
        default=20 if gpus else 3,
        metavar="N",
        help="steps of each contender that do not count (default: 20 on a GPU, else 3)",
    )
    how.add_argument(
        "--rounds",
        type=at_least_one,
        default=7 if gpus else 5,
        metavar="N",
        help="turns of each (default: 7 on a GPU, else 5)",
    )
    how.add_argument(
        "--threads",
        type=at_least_one,
        metavar="N",
        help="of each process on a CPU (default: the cores by the processes)",
    )
    how.add_argument(
        "--limit-seconds",
        type=float,
        default=300,
        metavar="S",
        help="seconds that a turn or a warm-up may take (default: 300)",
    )
    add_reports(parser)
    options = parser.parse_args(arguments)
    if not options.strategies + options.peers:
        parser.error("there is nothing to measure: --strategies and --peers are both none")
    if "bare" in options.peers:
        options.peers.insert(options.peers.index("bare") + 1, "bare, bf16 weights")
    options.precision = [name == "bf16" for name in options.precision]
    options.compile = {"off": [False], "on": [True], "both": [False, True]}[options.compile]
    if options.batch:
        options.set.append(f"train_batch_size={options.batch}")
    if options.peers and not any(override.startswith("optimizer.type") for override in options.set):
        options.set.insert(0, "optimizer.type=AdamW")
    return options


def main(arguments: Sequence[str] | None = None, context: Any = None) -> int:
    options = parse_arguments(arguments)
    return run_cli(lambda: measure_and_report(options, context or multiprocessing.get_context("spawn")))


def measure_and_report(options: argparse.Namespace, context: Any) -> int:
    """Returns the exit code: 1 when no contender could run."""
    report = run(options, context)
    print(step_report.as_text(report))
    keep((options.json, json.dumps(report, indent=1) + "\n"), (options.markdown, step_report.as_markdown(report)))
    return int(all(row["left_out"] for row in report["rows"]))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that the processes at work are ended
    sys.exit(main())
