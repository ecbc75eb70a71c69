"""The parts of `benchmarks/gpu_check.py`: commands to run, and what to read from what they leave behind.

Where a part is a property that has a test, the test is run (`tests/gpu/test_gpu.py`); what a CPU cannot do has a form for it, or
is skipped with a sentence. A part that does not reach what it must raises NotReached.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.paths import PROJECT
from image_data.dataset import Dataset

PYTEST = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider"]
FIRST = ("device", "prepare")  # what all others need
# Least test accuracy after the training part. Three epochs of spt-lsa on CIFAR-100 gave 25 % on an H200 (one seed), six of the
# preset cpu on the drawn shapes 52 % on a CPU (one seed); guessing gives 1 % and 10 %.
CIFAR100_ACCURACY, SHAPES_ACCURACY = 0.18, 0.40
CIFAR100_EPOCHS, SHAPES_EPOCHS, CPU_EPOCHS = (
    3,
    6,
    2,
)  # the last: of anything but the drawn shapes on a CPU, where it is enough to learn


class Skipped(Exception):
    """A part that this machine cannot do, or need not; the message says why."""


class NotReached(Exception):
    """A part that failed; the message says how."""


@dataclass(frozen=True)
class Check:
    """What the parts are told."""

    out: Path
    num_gpus: int
    quick: bool
    data_dir: Path | None
    archive: Path | None

    @property
    def data(self) -> Path:
        """The dataset that the parts use."""
        if self.data_dir is not None:
            return self.data_dir.resolve()
        if self.archive is not None:
            return self.out / "dataset"
        own = PROJECT / "data" / "cifar100"
        return own if Dataset.is_prepared(own) and not self.quick else self.out / "shapes"

    def file(self, name: str) -> Path:
        return self.out / name

    def batch(self, images: int) -> str:
        """The setting for a global batch of about so many images, that this machine's GPUs can share evenly."""
        shares = max(1, self.num_gpus)
        return f"train_batch_size={images // shares * shares}"


@dataclass(frozen=True)
class Part:
    """One part; seconds of a large GPU's whole and quick check are far below its limits."""

    what: str
    commands: Callable[[Check], list[list[str]]]
    read: Callable[[Check, str], dict[str, Any]]
    limit_seconds: float
    quick_seconds: float

    def limit(self, check: Check) -> float:
        """A CPU may take four times as long."""
        return (self.quick_seconds if check.quick else self.limit_seconds) * (1 if check.num_gpus else 4)


def program(name: str, *words: object) -> list[str]:
    return [sys.executable, str(PROJECT / name), *map(str, words)]


# --- the machine and the data -----------------------------------------------------------------------------------------


def device_commands(check: Check) -> list[list[str]]:
    return [program("benchmarks/lib/device_facts.py", check.file("device.json"))]


def device_figures(check: Check, log: str) -> dict[str, Any]:
    facts = json.loads(check.file("device.json").read_text())
    if facts.pop("visible to PyTorch") != check.num_gpus:
        raise NotReached(
            f"nvidia-smi lists {check.num_gpus} GPUs that may be used, PyTorch sees another number: the installed torch is for another "
            "driver; environment/setup.sh chooses by it"
        )
    return facts


def prepare_commands(check: Check) -> list[list[str]]:
    if Dataset.is_prepared(check.data):
        raise Skipped(f"{check.data.name} is prepared")
    if check.data_dir is not None:
        raise NotReached(f"{check.data_dir} holds no prepared dataset; give its archive with --archive")
    source = ["--archive", str(check.archive)] if check.archive else ["--dataset", "shapes"]
    return [program("prepare_dataset.py", "--data-dir", check.data, *source)]


def prepare_figures(check: Check, log: str) -> dict[str, Any]:
    dataset = Dataset.open(check.data)
    return {
        "images": f"{len(dataset.splits['train']):,} + {len(dataset.splits['test']):,}",
        "classes": len(dataset.classes),
    }


# --- properties that have tests ---------------------------------------------------------------------------------------


def tests(
    on_gpu: str, on_cpu: str | None, quick: str | None = None, cpu_file: str = "test_dali_pipeline.py"
) -> Callable[[Check], list[list[str]]]:
    """The tests of a part: names in tests/gpu/test_gpu.py, and names in another file for a CPU (None: it has no form there)."""

    def commands(check: Check) -> list[list[str]]:
        if not check.num_gpus:
            if on_cpu is None:
                raise Skipped("needs a GPU")
            return [[*PYTEST, f"tests/{cpu_file}", "-k", on_cpu]]
        return [[*PYTEST, "-m", "gpu", "tests/gpu/test_gpu.py", "-k", quick if check.quick and quick else on_gpu]]

    return commands


def test_figures(check: Check, log: str) -> dict[str, Any]:
    found = re.findall(r"(\d+) (passed|skipped)", log)
    counts = {word: int(number) for number, word in found}
    if not counts.get("passed"):
        raise Skipped("every one of its tests was skipped here")
    return {"tests": ", ".join(f"{number} {word}" for word, number in counts.items())}


# --- a run ------------------------------------------------------------------------------------------------------------


def is_cifar100(dataset: Dataset) -> bool:
    return len(dataset.classes) == 100 and len(dataset.splits["train"]) == 50_000


def train_commands(check: Check) -> list[list[str]]:
    large = is_cifar100(Dataset.open(check.data)) and check.num_gpus > 0
    drawn = check.data == check.out / "shapes"
    words = (
        ["--preset", "spt-lsa", "--set", "bf16.enabled=true"]
        if large
        else ["--preset", "cpu", "--set", "loss.label_smoothing=0.0"]
    )
    epochs = CIFAR100_EPOCHS if large else SHAPES_EPOCHS if drawn or check.num_gpus else CPU_EPOCHS
    common = [
        "--set",
        check.batch(512 if large else 128),
        "--data-dir",
        check.data,
        "--runs-dir",
        check.out,
        "--name",
        "run",
    ]
    return [
        ["bash", str(PROJECT / "launch_local_train.sh"), *map(str, [*words, *common, "--epochs", epochs, "--fresh"])],
        program("evaluate.py", check.file("run"), "--json", check.file("evaluation.json")),
    ]


def train_figures(check: Check, log: str) -> dict[str, Any]:
    lines = [json.loads(line) for line in (check.file("run") / "metrics.jsonl").read_text().splitlines()]
    last, dataset = lines[-1], Dataset.open(check.data)
    drawn = check.data == check.out / "shapes"
    due = (
        CIFAR100_ACCURACY
        if is_cifar100(dataset) and check.num_gpus
        else SHAPES_ACCURACY
        if drawn
        else 2 / len(dataset.classes)
    )
    evaluated = json.loads(check.file("evaluation.json").read_text())["correct"]
    if (
        abs(evaluated - last["test_correct"]) > 0.001 * last["test_seen"]
    ):  # one process and several sum in another order
        raise NotReached(f"the run counted {last['test_correct']} correct test images, evaluate.py {evaluated}")
    if last["test_accuracy"] < due:
        raise NotReached(
            f"{100 * last['test_accuracy']:.1f} % test accuracy after {last['epoch']} epochs, and at least {100 * due:.0f} % was due"
        )
    speeds = [line["images_per_second"] for line in lines[1:] or lines]
    return {
        "test accuracy": f"{100 * last['test_accuracy']:.1f} % after {last['epoch']} epochs (at least {100 * due:.0f} % was due)",
        "images/s": f"{statistics.median(speeds):,.0f}",
        "wait for data": f"{100 * last['data_wait_seconds'] / last['training_seconds']:.1f} %",
    }


# --- benchmarks -------------------------------------------------------------------------------------------------------


def input_commands(check: Check) -> list[list[str]]:
    words = (
        ["--jobs", "crop", "--loaders", "tensor,resident,files,whole_batch", "--turn-seconds", 0.3]
        if check.quick
        else []
    )
    return [
        program(
            "benchmarks/input_pipeline.py",
            "--data-dir",
            check.data,
            "--rounds",
            3,
            *words,
            *output(check, "input_pipeline"),
        )
    ]


def input_figures(check: Check, log: str) -> dict[str, Any]:
    report = json.loads(check.file("input_pipeline.json").read_text())
    speeds = {
        f"{job}, {name}": f"{statistics.median(facts['images_per_second']):,.0f} images/s"
        for job, part in report["jobs"].items()
        for name, facts in part["loaders"].items()
    }
    return {
        **speeds,
        **{
            f"goal: {goal['goal']}": "met" if goal["met"] else "NOT met"
            for goal in report["goals"]
            if goal["met"] is not None
        },
    }


def step_commands(check: Check) -> list[list[str]]:
    words = ["--strategies", "zero 1", "--peers", "bare", "--rounds", 3] if check.quick else []
    if not check.num_gpus:
        words += ["--steps", 3, "--warm-up", 1]
    elif check.quick:
        words += ["--steps", 20]
    return [program("benchmarks/training_step.py", "--data-dir", check.data, *words, *output(check, "training_step"))]


def step_figures(check: Check, log: str) -> dict[str, Any]:
    report = json.loads(check.file("training_step.json").read_text())
    figures = {}
    for row in report["rows"]:
        if row["left_out"]:
            figures[row["label"]] = f"left out: {row['left_out']}"
            continue
        share = f", {100 * statistics.median(row['mfu']):.1f} % of the peak" if row["mfu"] else ""
        ratio = (
            f", {statistics.median(row['time_ratio']):.3f} of the time of {row['against']}"
            if "time_ratio" in row
            else ""
        )
        figures[row["label"]] = f"{statistics.median(row['images_per_second']):,.0f} images/s{share}{ratio}"
    return figures


def strategies_commands(check: Check) -> list[list[str]]:
    if check.num_gpus < 2:
        raise Skipped("needs two GPUs (benchmarks/strategies.py measures two CPU processes, in twenty minutes)")
    words = ["--rounds", 1, "--steps", 32] if check.quick else ["--rounds", 2]
    return [
        program(
            "benchmarks/strategies.py",
            "--data-dir",
            check.data,
            "--set",
            check.batch(512),
            *words,
            "--out",
            check.file("strategies"),
        )
    ]


def strategies_figures(check: Check, log: str) -> dict[str, Any]:
    rows = json.loads((check.file("strategies") / "strategies.json").read_text())["rows"]
    return {
        f"{row['name']} x {row['processes']}": row["failed"]
        or f"{statistics.median(row['images_per_second']):,.0f} images/s, "
        f"{statistics.median(row['speed_up']):.2f} times one process"
        for row in rows
    }


def output(check: Check, name: str) -> list[object]:
    return ["--json", check.file(f"{name}.json"), "--markdown", check.file(f"{name}.md")]


PARTS = {
    "device": Part(
        "what this machine has, and how fast its matrix products are", device_commands, device_figures, 120, 120
    ),
    "prepare": Part("a prepared dataset", prepare_commands, prepare_figures, 300, 120),
    "data": Part(
        "DALI on the GPU equals the CPU: evaluation, every augmentation, statistics, both sources",
        tests(
            on_gpu="evaluation_on_the_gpu or training_batches or any_batch or statistics",
            quick="evaluation_on_the_gpu or statistics",
            on_cpu="evaluation_pixels or any_batch",
        ),
        test_figures,
        240,
        90,
    ),
    "engines": Part(
        "ZeRO 0 to 3 and bf16 learn what fp32 learns; a run resumes, and is evaluated alike on GPU and CPU",
        tests(
            on_gpu="learns_the_same or evaluated_alike or goes_on",
            quick="learns_the_same",
            on_cpu="close_to_fp32 or refused",
            cpu_file="test_zero.py",
        ),
        test_figures,
        400,
        150,
    ),
    "compile": Part(
        "torch.compile trains as without it",
        tests(on_gpu="compile or graphs", quick="compile and not bf16 and not fsdp", on_cpu=None),
        test_figures,
        300,
        150,
    ),
    "train": Part(
        "a short run by the launcher reaches its accuracy, and evaluate.py agrees",
        train_commands,
        train_figures,
        300,
        90,
    ),
    "input": Part("images a second of the input pipeline and its peers", input_commands, input_figures, 300, 90),
    "step": Part("what a training step costs, against a bare loop", step_commands, step_figures, 400, 120),
    "strategies": Part(
        "every way of sharing the work over the GPUs", strategies_commands, strategies_figures, 900, 400
    ),
}
