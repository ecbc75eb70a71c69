"""The parts of `benchmarks/gpu_check.py`: commands to run, and how to read their results.

Where a part is a property that has a test, the test runs (`tests/gpu/test_gpu.py`). What a CPU cannot do has a CPU form
or is skipped with a reason. A part that misses its target raises NotReached.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.lib.check import Check, NotReached, Part, Skipped, program
from common.packages import is_installed
from common.paths import PROJECT
from image_data.dataset import Dataset
from image_data.preparation.source import Source, recorded

PYTEST = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider"]
LAUNCHER = PROJECT / "launch_local_train.sh"
FIRST = ("device", "prepare")  # all other parts need these
# Smallest test accuracy after the training part. Three epochs of spt-lsa on CIFAR-100 gave 25 % on an H200 (one seed),
# six epochs of the preset cpu on the drawn shapes 52 % on a CPU (one seed); chance is 1 % and 10 %.
CIFAR100_ACCURACY, SHAPES_ACCURACY = 0.18, 0.40
CIFAR100_EPOCHS, SHAPES_EPOCHS = 3, 6
CPU_EPOCHS = 2  # of other datasets on a CPU: enough to be above chance


# --- the machine and the data -----------------------------------------------------------------------------------------


def device_commands(check: Check) -> list[list[str]]:
    return [program("benchmarks/lib/device_facts.py", check.file("device.json"))]


def device_figures(check: Check, log: str) -> dict[str, Any]:
    facts = json.loads(check.read("device.json"))
    if facts.pop("visible to PyTorch") != check.num_gpus:
        raise NotReached(
            f"nvidia-smi lists {check.num_gpus} usable GPUs, PyTorch sees another number: the installed torch does not "
            "match the driver. Run environment/setup.sh"
        )
    return facts


def prepare_commands(check: Check) -> list[list[str]]:
    if check.archive is not None:
        return archive_commands(check, check.archive)
    if Dataset.is_prepared(check.data):
        raise Skipped(f"{check.data.name} is already prepared")
    if check.data_dir is not None:
        raise NotReached(f"{check.data_dir} holds no prepared dataset. Prepare one from an archive with --archive FILE")
    return [program("prepare_dataset.py", "--data-dir", check.data, "--dataset", "shapes")]


def archive_commands(check: Check, archive: Path) -> list[list[str]]:
    """Prepare the archive, again where an earlier check prepared another one."""
    prepared = Dataset.is_prepared(check.data)
    if prepared and recorded(check.data) == Source(None, archive, None).record():
        raise Skipped(f"{archive.name} is already prepared")
    again = ["--force"] * prepared
    return [program("prepare_dataset.py", "--data-dir", check.data, "--archive", archive, *again)]


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
    """Return the commands of a part that runs tests.

    Args:
        on_gpu: expression for names in tests/gpu/test_gpu.py; `quick`: the same for a quick check.
        on_cpu: expression for names in tests/`cpu_file`; None: the part has no CPU form.
    """

    def commands(check: Check) -> list[list[str]]:
        if not is_installed("pytest"):
            raise Skipped("pytest is not installed")
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
        raise Skipped("all of its tests were skipped on this machine")
    return {"tests": ", ".join(f"{number} {word}" for word, number in counts.items())}


# --- a run ------------------------------------------------------------------------------------------------------------


def is_cifar100(dataset: Dataset) -> bool:
    return len(dataset.classes) == 100 and len(dataset.splits["train"]) == 50_000


def launcher_keeps_python() -> bool:
    """Return whether the launcher uses this Python; where a package is missing, it would install another one."""
    environment = {**os.environ, "PYTHON": sys.executable, "DRY_RUN": "1"}
    printed = subprocess.run(["bash", LAUNCHER], env=environment, capture_output=True, text=True).stdout
    return sys.executable in shlex.split(printed)


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
    words = [*words, *common, "--epochs", epochs, "--fresh"]
    if launcher_keeps_python():
        train = ["bash", str(LAUNCHER), *map(str, words)]
    else:
        train = program("train.py", *words, *([] if is_installed("deepspeed") else ["--strategy", "ddp"]))
    return [train, program("evaluate.py", check.file("run"), "--json", check.file("evaluation.json"))]


def train_figures(check: Check, log: str) -> dict[str, Any]:
    lines = [json.loads(line) for line in check.read("run/metrics.jsonl").splitlines()]
    last, dataset = lines[-1], Dataset.open(check.data)
    drawn = check.data == check.out / "shapes"
    due = (
        CIFAR100_ACCURACY
        if is_cifar100(dataset) and check.num_gpus
        else SHAPES_ACCURACY
        if drawn
        else 2 / len(dataset.classes)
    )
    evaluated = json.loads(check.read("evaluation.json"))["correct"]
    # One process and several processes sum in different orders.
    if abs(evaluated - last["test_correct"]) > 0.001 * last["test_seen"]:
        raise NotReached(f"the run counted {last['test_correct']} correct test images, evaluate.py {evaluated}")
    if last["test_accuracy"] < due:
        raise NotReached(
            f"{100 * last['test_accuracy']:.1f} % test accuracy after {last['epoch']} epochs, expected at least "
            f"{100 * due:.0f} %"
        )
    speeds = [line["images_per_second"] for line in lines[1:] or lines]
    return {
        "test accuracy": f"{100 * last['test_accuracy']:.1f} % after {last['epoch']} epochs "
        f"(expected: at least {100 * due:.0f} %)",
        "images/s": f"{statistics.median(speeds):,.0f}",
        "dataloader wait": f"{100 * last['data_wait_seconds'] / last['training_seconds']:.1f} %",
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
    report = json.loads(check.read("input_pipeline.json"))
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
    words = ["--strategies", "zero 1", "--baselines", "bare", "--rounds", 3] if check.quick else []
    if not check.num_gpus:
        words += ["--steps", 3, "--warm-up", 1]
    elif check.quick:
        words += ["--steps", 20]
    return [program("benchmarks/training_step.py", "--data-dir", check.data, *words, *output(check, "training_step"))]


def step_figures(check: Check, log: str, name: str = "training_step") -> dict[str, Any]:
    report = json.loads(check.read(f"{name}.json"))
    figures = {}
    for row in report["rows"]:
        if row["left_out"]:
            figures[row["label"]] = f"skipped: {row['left_out']}"
            continue
        share = f", {100 * statistics.median(row['mfu']):.1f} % MFU" if row.get("mfu") else ""
        ratio = (
            f", {statistics.median(row['time_ratio']):.3f} x the time of {row['against']}"
            if "time_ratio" in row
            else ""
        )
        floor = row.get("of_memory_floor")  # this and the ratios are added when all systems have been measured
        share += f", {100 * statistics.median(floor):.1f} % of the memory floor" if floor else ""
        figures[row["label"]] = f"{statistics.median(row['images_per_second']):,.0f} images/s{share}{ratio}"
    return figures


def strategies_commands(check: Check) -> list[list[str]]:
    if check.num_gpus < 2:
        raise Skipped("needs two GPUs (benchmarks/strategies.py measures two CPU processes in twenty minutes)")
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
    rows = json.loads(check.read("strategies/strategies.json"))["rows"]
    figures = {}
    for row in rows:
        name = f"{row['name']} x {row['processes']}"
        figures[name] = row["failed"] or f"{statistics.median(row['images_per_second']):,.0f} images/s"
        if "speed_up" in row:  # not where the reference, one process, failed
            figures[name] += f", {statistics.median(row['speed_up']):.2f} x one process"
    return figures


def output(check: Check, name: str) -> list[object]:
    return ["--json", check.file(f"{name}.json"), "--markdown", check.file(f"{name}.md")]


PARTS = {
    "device": Part("devices of this machine, and measured peaks", device_commands, device_figures, 120, 120),
    "prepare": Part("a prepared dataset", prepare_commands, prepare_figures, 300, 120),
    "data": Part(
        "batches on the GPU equal those on the CPU: evaluation, augmentations, statistics",
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
        "ZeRO 0 to 3 and bf16 train as fp32; a run resumes; evaluation agrees on GPU and CPU",
        tests(
            on_gpu="trains_the_same or evaluation_agrees or resumes",
            quick="trains_the_same",
            on_cpu="bf16",
            cpu_file="parallel/test_zero.py",
        ),
        test_figures,
        400,
        150,
    ),
    "compile": Part(
        "training with torch.compile equals training without",
        tests(on_gpu="compile or graphs", quick="compile and not bf16 and not fsdp", on_cpu=None),
        test_figures,
        300,
        150,
    ),
    "train": Part("a short run reaches its accuracy, and evaluate.py agrees", train_commands, train_figures, 300, 90),
    "input": Part("images/s of the input pipeline and of baselines", input_commands, input_figures, 300, 90),
    "step": Part("cost of a training step against a bare loop", step_commands, step_figures, 400, 120),
    "strategies": Part("all parallelism strategies on all GPUs", strategies_commands, strategies_figures, 900, 400),
}
