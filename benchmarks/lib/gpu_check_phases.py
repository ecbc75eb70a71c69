"""The phases of `gpu_check.py --minutes N`, in order of value: what a GPU can show in a few minutes.

A phase is a part with a time limit; what it needs from earlier phases, it reads from their files in the output folder.
The phases install nothing. Without DALI the input backend is `tensor`, without DeepSpeed the strategy is ddp, and the
tests that need them are not selected. With `check.small`, every phase runs a tiny form on a CPU: a rehearsal that shows
that the commands still work, not how fast anything is.
"""

from __future__ import annotations

import json
import re
import statistics
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.lib.check import Check, Part, Skipped, program
from benchmarks.lib.gpu_check_parts import (
    PYTEST,
    device_commands,
    device_figures,
    input_figures,
    is_cifar100,
    output,
    step_figures,
)
from benchmarks.lib.gpu_check_parts import prepare_commands as prepare_images
from common.packages import is_installed
from config.settings import resolve
from image_data.dataset import Dataset

SEEDS = (0, 1, 2)
SOURCE = ("--source", "tensor")  # it needs no DALI, and is the fastest on a GPU
SMALL_IMAGES = 2_000
SMALL = ["train_batch_size=32", "model.depth=1", "model.width=32", "model.feed_forward_options.hidden=32"]
SMALL += ["model.patch_embedding_options.first=8", "bf16.enabled=false", "compile=off"]
LONG_RECIPE = "100ep"
# Seconds of the long recipe besides its steps: imports, data and compilation, which took 42 to 60 s on an H100
# (results/LOG.md); evaluation and checkpoint of an epoch; the end.
START_SECONDS, EPOCH_SECONDS, ENDING_SECONDS = 75.0, 0.9, 15.0
# Images/s to plan with where no phase has measured the recipe: 512 images in 54.55 ms on an H200, without the Triton
# kernel (results/LOG.md).
UNKNOWN_SPEED = 9_400.0


def dali() -> bool:
    return is_installed("nvidia.dali")


def deepspeed() -> bool:
    return is_installed("deepspeed")


def data_of(check: Check) -> Path:
    """Return the dataset of the phases: CIFAR-100 where it is prepared, else random pixels of its sizes."""
    given = check.data_dir is not None or check.archive is not None
    drawn = check.data.parent == check.out  # by a check without a time limit: too few images
    if given or not (check.small or drawn):
        return check.data
    return noise(check)


def noise(check: Check) -> Path:
    return check.out / f"noise-{noise_images(check)}"


def noise_images(check: Check) -> int:
    """Return the training images of the random pixels: those of CIFAR-100, fewer for a rehearsal."""
    return SMALL_IMAGES if check.small else 50_000


def overrides(check: Check) -> list[str]:
    """Return the settings of a rehearsal as flags."""
    return [word for override in SMALL for word in ("--set", override)] if check.small else []


# --- data and tests ---------------------------------------------------------------------------------------------------


def prepare_commands(check: Check) -> list[list[str]]:
    if data_of(check) != noise(check):
        return prepare_images(check)
    if Dataset.is_prepared(noise(check)):
        raise Skipped(f"{noise(check).name} is already prepared")
    return [program("benchmarks/lib/noise_dataset.py", noise(check), "--images", noise_images(check))]


def prepare_result(check: Check, log: str) -> dict[str, Any]:
    dataset = Dataset.open(data_of(check))
    counts = {name: f"{len(split):,}" for name, split in dataset.splits.items()}
    return {"dataset": data_of(check).name, **counts}


def test_commands(check: Check) -> list[list[str]]:
    """Run all tests at once, because their networks are small; except the one that fills the memory."""
    if not is_installed("pytest"):
        raise Skipped("pytest is not installed")
    if check.small:
        return [
            [*PYTEST, "tests/models/test_depthwise_kernel.py", "-k", "operator or turned_off"],
            [*PYTEST, "tests/test_dali_pipeline.py", "-k", "any_batch and tensor"],
        ]
    marks = "gpu" + " and not needs_dali" * (not dali()) + " and not needs_deepspeed" * (not deepspeed())
    chosen = (
        ("tests/models/test_depthwise_kernel.py", None),
        ("tests/gpu/test_gpu.py", "evaluation_on_the_gpu or training_batches or statistics or any_batch"),
        ("tests/gpu/test_gpu.py", "trains_the_same or evaluation_agrees or resumes"),
        ("tests/gpu/test_gpu.py", "compile or graphs"),
        ("tests/gpu/test_gpu.py", "same_losses and not compile and not graphs"),
        ("tests/gpu/test_gpu_resume.py", "not largest"),
    )
    return [[*PYTEST, "-m", marks, file, *(["-k", names] if names else [])] for file, names in chosen]


def test_result(check: Check, log: str) -> dict[str, Any]:
    counts = {"passed": 0, "failed": 0, "skipped": 0, "error": 0}
    for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", log):
        counts[word] += int(number)
    failed = re.findall(r"^FAILED \S*::(\S+)", log, re.MULTILINE)
    found = {"tests": ", ".join(f"{number} {word}" for word, number in counts.items() if number) or "none"}
    return {**found, **({"failed tests": ", ".join(failed)} if failed else {})}


# --- speeds -----------------------------------------------------------------------------------------------------------


def parts_commands(names: str, file: str) -> Any:
    def commands(check: Check) -> list[list[str]]:
        return [program("benchmarks/step_parts.py", "--parts", names, "--json", check.file(file))]

    return commands


def parts_result(file: str) -> Any:
    def read(check: Check, log: str) -> dict[str, Any]:
        report = json.loads(check.read(file))
        errors = {
            f"errors of {name}": ", ".join(f"{part} {share:.1e}" for part, share in shares.items())
            for name, shares in report["errors"].items()
        }
        return {**errors, **{name: f"{ms:.3f} ms" for name, ms in report["ms"].items()}, **report["problems"]}

    return read


def input_commands(check: Check) -> list[list[str]]:
    loaders = "tensor,whole_batch" + ",resident" * (dali() and not check.small)
    size = ["--batch-size", 1024, "--images", 40_960, "--rounds", 3, "--turn-seconds", 0.5]
    if check.small:
        size = ["--batch-size", 128, "--images", 1024, "--rounds", 1, "--turn-seconds", 0.1]
    words = ["--data-dir", data_of(check), "--loaders", loaders, *size]
    return [program("benchmarks/input_pipeline.py", *words, *output(check, "input_pipeline"))]


def profile_commands(preset: str) -> Any:
    def commands(check: Check) -> list[list[str]]:
        words = ["--preset", preset, "--data-dir", data_of(check), *SOURCE, *overrides(check)]
        return [program("benchmarks/step_profile.py", *words, "--json", check.file(f"profile-{preset}.json"))]

    return commands


def profile_result(preset: str) -> Any:
    def read(check: Check, log: str) -> dict[str, Any]:
        report = json.loads(check.read(f"profile-{preset}.json"))
        figures = {}
        for name, found in report["turns"].items():
            step, host = statistics.median(found["step_ms"]), statistics.median(found["host_ms"])
            memory = f", {found['memory_bytes'] / 2**30:.1f} GiB" if found["memory_bytes"] else ""
            figures[name] = f"{step:.2f} ms per step, {1e3 * report['batch'] / step:,.0f} images/s, host {host:.2f} ms"
            figures[name] += f"{memory}, first steps {found['warm_up_seconds']:.1f} s"
        if report.get("bytes_per_step"):
            floor = 1e3 * report["bytes_per_step"] / report["copy_bytes_per_second"]
            figures["memory floor"] = f"{floor:.2f} ms, step / floor {step / floor:.2f}"
        if "kinds_ms" in report:
            kinds = ", ".join(f"{kind} {ms:.2f}" for kind, ms in report["kinds_ms"].items())
            figures["profile"] = f"{report['kernels']:.0f} kernels in {report['kernel_ms']:.2f} ms: {kinds}"
        return figures

    return read


def step_commands(check: Check, name: str, strategies: str, baselines: str, compile: str) -> list[list[str]]:
    """Return a run of training_step.py on the preset speedrun."""
    sizes = ["--steps", 30, "--warm-up", 8, "--rounds", 3, "--precision", "bf16", "--compile", compile]
    if check.small:
        sizes = ["--steps", 1, "--warm-up", 1, "--rounds", 1, "--precision", "fp32", "--compile", "off"]
    words = ["--preset", "speedrun", "--data-dir", data_of(check), *SOURCE, "--threads", 1, *small_step(check)]
    words += ["--strategies", strategies, "--baselines", baselines, *sizes]
    return [program("benchmarks/training_step.py", *words, *output(check, name))]


def small_step(check: Check) -> list[str]:
    """Return the settings of a rehearsal without those that training_step.py chooses itself."""
    chosen = [override for override in SMALL if not override.startswith(("bf16", "compile"))] if check.small else []
    return [word for override in chosen for word in ("--set", override)]


def baseline_commands(check: Check) -> list[list[str]]:
    return step_commands(check, "training_step", "ddp" + ",zero 1" * deepspeed(), "bare", "on")


def modes_commands(check: Check) -> list[list[str]]:
    return step_commands(check, "compile_modes", "ddp", "none", "off,on,reduce-overhead")


def modes_figures(check: Check, log: str) -> dict[str, Any]:
    return step_figures(check, log, "compile_modes")


def parallel_commands(check: Check) -> list[list[str]]:
    """Return a run of parallel_runs.py on the preset cpu, which is small for a GPU."""
    sizes = ["--runs", "1,2,4,8", "--seconds", 4, "--rounds", 1]
    if check.small:
        sizes = ["--runs", "1,2", "--seconds", 0.1, "--rounds", 1]
    words = ["--preset", "cpu", "--set", "compile=off", *overrides(check), *sizes]
    return [program("benchmarks/parallel_runs.py", *words, "--json", check.file("parallel_runs.json"))]


def parallel_figures(check: Check, log: str) -> dict[str, Any]:
    report = json.loads(check.read("parallel_runs.json"))
    figures = {}
    for name, rates in report["images_per_second"].items():
        count, mode = name.split()
        figures[f"{count} at once{', MPS' * (mode == 'mps')}"] = f"{statistics.median(rates):,.0f} images/s"
    failed = {f"{name} failed": reason for name, reason in report["failed"].items()}
    return {**figures, **failed, **({"MPS": report["no_mps"]} if report["no_mps"] else {})}


# --- accuracy ---------------------------------------------------------------------------------------------------------


def train(check: Check, name: str, preset: str, *words: object) -> list[str]:
    """Return a run of train.py in the output folder."""
    places = ["--data-dir", data_of(check), "--runs-dir", check.file("runs"), "--name", name]
    small = ["--max-steps", 3] if check.small else []
    return program(
        "train.py",
        "--preset",
        preset,
        *places,
        *SOURCE,
        "--no-tensorboard",
        "--fresh",
        *words,
        *small,
        *overrides(check),
    )


def seeds_commands(check: Check) -> list[list[str]]:
    commands = []
    for seed in SEEDS:
        name = f"speedrun-seed{seed}"
        commands.append(train(check, name, "speedrun", "--seed", seed))
        report = ["--json", check.file(f"{name}.evaluation.json")]
        commands.append(program("evaluate.py", check.file("runs") / name, *SOURCE, *report))
    return commands


def run_figures(check: Check, name: str) -> dict[str, Any]:
    """Return accuracy and seconds of a run, finished or not; nothing where it has no epoch yet."""
    try:
        lines = [json.loads(line) for line in check.read(f"runs/{name}/metrics.jsonl").splitlines()]
    except FileNotFoundError:
        return {}
    if not lines:
        return {}
    last = lines[-1]
    training, first, waits = (
        sum(line[key] for line in lines) for key in ("training_seconds", "warmup_seconds", "data_wait_seconds")
    )
    accuracy = f"{100 * last['test_accuracy']:.2f} % ({last['test_correct']} correct)"
    if not is_cifar100(Dataset.open(data_of(check))) or data_of(check) == noise(check):
        accuracy = "speed only (no CIFAR-100)"
    return {
        name: f"{accuracy} after {last['epoch']} epochs, {last['step']} steps; training {training:.1f} s, first steps "
        f"{first:.1f} s, dataloader wait {waits:.2f} s; {last['images_per_second']:,.0f} images/s"
    }


def seeds_figures(check: Check, log: str) -> dict[str, Any]:
    return {key: value for seed in SEEDS for key, value in run_figures(check, f"speedrun-seed{seed}").items()}


def long_epochs(check: Check) -> int:
    """Return the epochs of the long recipe that fit into the time left at the measured speed, at most all of it."""
    speed = UNKNOWN_SPEED
    with suppress(FileNotFoundError):
        report = json.loads(check.read(f"profile-{LONG_RECIPE}.json"))
        speed = 1e3 * report["batch"] / statistics.median(next(iter(report["turns"].values()))["step_ms"])
    images = len(Dataset.open(data_of(check)).splits["train"])
    fit = int((check.seconds_left() - START_SECONDS - ENDING_SECONDS) / (images / speed + EPOCH_SECONDS))
    return min(fit, resolve(LONG_RECIPE, []).epochs)


def long_commands(check: Check) -> list[list[str]]:
    """Train the recipe for the epochs that fit; its learning-rate schedule is scaled to them."""
    epochs = 1 if check.small else long_epochs(check)
    if epochs < 1:
        raise Skipped(f"no time left for one epoch of {LONG_RECIPE}")
    words = ["--epochs", epochs, "--set", "schedule.warmup_fraction=0.1"]
    return [train(check, f"long-{LONG_RECIPE}", LONG_RECIPE, *words)]


def long_figures(check: Check, log: str) -> dict[str, Any]:
    return run_figures(check, f"long-{LONG_RECIPE}")


def phase(what: str, commands: Any, read: Any, limit_seconds: float, at_once: bool = False) -> Part:
    return Part(what, commands, read, limit_seconds, limit_seconds, at_once)


def profile_phase(preset: str, limit_seconds: float) -> Part:
    what = f"step of {preset}: kernel on and off, profile"
    return phase(what, profile_commands(preset), profile_result(preset), limit_seconds)


# The limits up to `seeds` fit into 15 minutes.
PHASES = {
    "device": phase("devices of this machine, and measured peaks", device_commands, device_figures, 40),
    "prepare": phase("a prepared dataset", prepare_commands, prepare_result, 60),
    "kernel": phase(
        "kernel of conv_mlp: errors and time", parts_commands("kernel", "kernel.json"), parts_result("kernel.json"), 100
    ),
    "tests": phase("tests that need a GPU", test_commands, test_result, 160, at_once=True),
    "input": phase("images/s of the input pipeline", input_commands, input_figures, 45),
    "step-speedrun": profile_phase("speedrun", 60),
    "step-100ep": profile_phase("100ep", 150),
    "seeds": phase(f"speedrun with {len(SEEDS)} seeds: accuracy and seconds", seeds_commands, seeds_figures, 260),
    "step-300ep": profile_phase("300ep", 150),
    "step": phase("cost of a training step against a bare loop", baseline_commands, step_figures, 90),
    "modes": phase("modes of torch.compile", modes_commands, modes_figures, 90),
    "parallel": phase("several runs on the device at once", parallel_commands, parallel_figures, 150),
    "parts": phase(
        "parts of a step alone",
        parts_commands("depthwise,attention,stem,optimizer", "parts.json"),
        parts_result("parts.json"),
        60,
    ),
    "long": phase(f"{LONG_RECIPE} for as many epochs as fit", long_commands, long_figures, 3600),
}
