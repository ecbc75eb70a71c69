"""The steps of train.py before a run starts: process, checks of the settings, dataset, network and engine options."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from common.errors import SettingsError
from common.files import bytes_text
from common.machine import visible_gpus
from common.stop_signal import StopSignal
from config.catalog import check_names
from config.overrides import sets
from config.settings import ModelSettings, Settings, preset_names
from dali_pipeline import side_of
from image_data import augmentation
from image_data.dataset import Dataset
from image_data.local_copy import stage
from model import build_model
from models.cost import count_parameters
from models.initial_weights import load_initial_weights
from models.parts import UnusablePart
from models.pretrained import local_file
from optim import lr_schedule
from optim.optimizers import build_optimizer
from parallel.engine import Engine
from parallel.peers.link_cost import lines_of_cost
from parallel.precision import choose as choose_precision
from parallel.precision import fast_bf16
from parallel.process_group import check_environment, pick_device
from parallel.slurm import rank_environment
from training.console import VERBOSE, Console, show_library_logs
from training.determinism import make_deterministic
from training.trackers import check_trackers

CPU_MINUTES = 19.0  # with compilation at most 20
BYTES_PER_PARAMETER = 4  # fp32; a network whose weights alone exceed the memory cannot be built
CHECKED_ON_META = ("vit", "sl-vit")  # architectures that this project builds from parts


@dataclass(frozen=True)
class RunData:
    """The dataset of a run.

    Attributes:
        dataset: the dataset that is read, possibly a copy on a local disk, with its validation split.
        folder: the folder of the prepared dataset as the user gave it; run.json records it.
        side: side of the network's input images, in pixels.
    """

    dataset: Dataset
    folder: Path
    side: int


def start_process(
    verbosity: int, deterministic: bool, tensorboard: bool, wandb: str | None, mlflow: str | None = None
) -> tuple[StopSignal, Console]:
    """Set up this process: signal handlers, rank, console and determinism. Returns the first and the console.

    Raises:
        SettingsError: environment variables of a launcher that do not fit together, or GPUs that PyTorch cannot use.
        RunError: a tracker that was asked for is not installed.
    """
    stop = StopSignal()
    rank_environment()
    check_environment()
    if not torch.cuda.is_available() and (gpus := visible_gpus()):
        raise SettingsError(
            f"nvidia-smi shows {len(gpus)} GPU(s), but PyTorch {torch.__version__} cannot use them; remove .venv and "
            "start with PYTHON=.venv/bin/python ./launch_local_train.sh for packages that fit the driver, or set "
            "DS_ACCELERATOR=cpu to train on the CPU"
        )
    console = Console(verbosity, is_main=os.environ.get("RANK", "0") == "0")
    if verbosity == VERBOSE:
        show_library_logs()
    if deterministic:
        make_deterministic()
    check_trackers(tensorboard, wandb, mlflow)
    return stop, console


def default_preset(device: torch.device, console: Console) -> str:
    """Choose the preset for a device and print the choice."""
    if device.type == "cuda":
        preset, why = "spt-lsa", "there is a GPU"
    elif fast_bf16(device):
        preset, why = "cpu", "there is no GPU"
    else:
        preset, why = "cpu-fp32", "there is no GPU, and the processor is not faster in bf16"
    console.print_field(
        "preset", f"{preset}, because {why} (--preset NAME chooses another: {', '.join(preset_names())})"
    )
    return preset


def limit_default_run(args: argparse.Namespace, device: torch.device, console: Console) -> None:
    """Give the default run of a CPU at most CPU_MINUTES, unless `args` choose a preset or a budget; print the limit."""
    chosen = (args.preset, args.epochs, args.max_steps, args.max_minutes, args.profile, args.host_peers, args.join)
    if device.type == "cuda" or any(chosen) or sets("epochs", args.set):
        return
    args.max_minutes, args.only_shortens = CPU_MINUTES, True
    console.print_field(
        "budget",
        f"all epochs of the preset, but at most {CPU_MINUTES:g} minutes of training "
        "(--epochs N or --max-minutes M chooses another)",
    )


def check_settings(
    settings: Settings,
    engine_type: type[Engine],
    preset: str,
    init_weights: str | None,
    evaluates_ema_only: bool,
    console: Console,
) -> None:
    """Reject every wrong setting before a dataset is fetched, which takes minutes; print the chosen precision.

    Raises:
        SettingsError: an unknown name, a setting that would not be used, or parts that do not fit together.
    """
    check_names(settings)
    lr_schedule.check(settings.schedule)
    augmentation.check(settings.augmentation)
    engine_type.check_settings(settings)
    check_parts(settings)
    if evaluates_ema_only and not settings.ema.decay:
        raise SettingsError("--evaluate-ema-only needs an EMA: add --set ema.decay=0.999, or leave the flag out")
    device = pick_device()
    enabled, refusals = settings.engine["bf16"]["enabled"], (engine_type.autocast_refusal, engine_type.masters_refusal)
    if line := choose_precision(enabled, *refusals, device)[1]:
        console.print_field("precision", line)
    if init_weights is not None:
        local_file(init_weights)  # downloads named weights
    if Path(preset).stem == "finetune" and init_weights is None:
        console.print_field(
            "warning",
            "the preset finetune starts from random weights; to fine-tune, add "
            "--init-weights timm:vit_base_patch32_224",
        )


def check_parts(settings: Settings) -> None:
    """Build network and optimizer without memory for their tensors, so that wrong options are found in milliseconds.

    Raises:
        SettingsError: an unknown option of a part, sizes that do not fit together, or a network larger than the memory.
    """
    if settings.model.architecture not in CHECKED_ON_META:
        return  # published networks have rules of their own about the image side, which the dataset may decide
    side = settings.image_side or 8 * settings.model.patch
    try:
        with torch.device("meta"):
            model = build_model(settings.model, 10, side)
            count = count_parameters(model)
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            if BYTES_PER_PARAMETER * count > memory:
                raise SettingsError(
                    f"the network has {count:,} parameters, which need {bytes_text(BYTES_PER_PARAMETER * count)}, and "
                    f"this machine has {bytes_text(memory)} of memory; choose a smaller model.width or model.depth"
                )
            build_optimizer(settings.engine["optimizer"], model, fused=False)
    except UnusablePart:
        pass  # on the meta device; `check_own_parts` has made it on a real one
    except SettingsError:
        raise
    except (Exception, SystemExit):  # noqa: BLE001, S110 (not on the meta device: checked when it is built)
        pass


def open_dataset(folder: Path, stage_to: Path | None, source: str, hold_out: float | None, image_side: int) -> RunData:
    """Open the prepared dataset of a run, after copying and splitting it as asked.

    Args:
        folder: of the prepared dataset.
        stage_to: local disk that the dataset is copied to first.
        hold_out: fraction of each training class that becomes the validation split.
        image_side: side of the network's input images, in pixels; 0 for the dataset's own.

    Raises:
        DatasetError: a dataset that cannot be read, copied or split.
    """
    dataset = Dataset.open(folder)
    if stage_to:
        dataset = stage(dataset, stage_to, files=source == "files" or dataset.splits["train"].packed is None)
    if hold_out:
        dataset = dataset.hold_out(hold_out)
    return RunData(dataset, folder, side_of(dataset, image_side))


def network_builder(
    settings: ModelSettings, num_classes: int, side: int, init_weights: str | None, console: Console
) -> Callable[[], nn.Module]:
    """Return the function that builds the network and, where asked, loads its initial weights."""

    def build() -> nn.Module:
        model = build_model(settings, num_classes, side)
        for line in load_initial_weights(model, init_weights) if init_weights else []:
            console.say(line)
        return model

    return build


def set_engine_options(
    engine: Engine,
    skip_bad_steps: bool,
    log_gradients: bool,
    link_gbps: float | None,
    step_seconds: float | None,
    console: Console,
) -> None:
    """Set what a new engine does besides training, and print what its exchanges cost over a link of `link_gbps`.

    Raises:
        SettingsError: the optimizer, the strategy or this PyTorch does not support an option.
    """
    if skip_bad_steps:
        engine.skip_bad_steps()
    if log_gradients:
        engine.log_gradients()
    if link_gbps:
        steps = engine.settings.parallel.local_steps
        console.say("\n".join(lines_of_cost(engine.num_parameters, steps, link_gbps, step_seconds)))
