#!/usr/bin/env python3
# PYTHON_ARGCOMPLETE_OK
"""Train a network on a tree of class folders.

    ./launch_local_train.sh                                            one box: set-up, data, every GPU (or the CPU)
    python train.py --preset cpu --set model.feed_forward=geglu        one process, in a prepared environment

The run folder `runs/<name>/` keeps everything; starting the same run again resumes it where it stopped.
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

from common.errors import EXIT_STOPPED, RunError, SettingsError, UserError
from config.settings import preset_names, resolve
from training.arguments import parse_arguments
from training.console import VERBOSE, Console, show_library_logs

if TYPE_CHECKING:
    import torch
    from torch import nn

LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "ncclRemoteError",
    "communicator was aborted",
)


def main() -> int:
    args = parse_arguments()
    if args.list_settings:
        from tools.list_settings import list_settings

        return list_settings(args.preset, args.set)
    # After the arguments, so that --help and mistyped settings answer at once: all of this imports PyTorch.
    from common.stop_signal import StopSignal
    from dali_pipeline import make_batches, side_of
    from image_data.dataset import Dataset
    from image_data.local_copy import stage
    from image_data.preparation.prepare import find_or_prepare
    from model import build_model
    from models.initial_weights import load_initial_weights
    from optim.lr_schedule import Schedule
    from parallel.compile import FIRST_STEPS_SECONDS
    from parallel.peers.link_cost import lines_of_cost
    from parallel.peers.setup import meeting_of
    from parallel.precision import choose as choose_precision
    from parallel.process_group import limit_waits, pick_device
    from parallel.slurm import rank_environment
    from parallel.strategies import engine_class
    from training.determinism import make_deterministic
    from training.loop import Loop
    from training.micro_batch import MicroBatch, OutOfMemory
    from training.run_options import folder_options, logging_options, run_options
    from training.run_start import start_run
    from training.trackers import check_trackers

    # 1. The process: signals, its place among the others, what it prints
    stop = StopSignal()
    rank_environment()
    console = Console(args.verbosity, is_main=os.environ.get("RANK", "0") == "0")
    if args.verbosity == VERBOSE:
        show_library_logs()
    if args.deterministic:
        make_deterministic()
    check_trackers(args.tensorboard, args.wandb)

    # 2. The settings, the data and the network
    preset = args.preset or default_preset(pick_device(), console)
    settings = resolve(preset, args.set, epochs=args.epochs, strategy=args.strategy)
    folder = find_or_prepare(args.data_dir, args.dataset, args.archive)
    dataset = Dataset.open(folder)
    if args.stage_to:
        dataset = stage(dataset, args.stage_to, files=args.source == "files" or dataset.splits["train"].packed is None)
    if args.hold_out:
        dataset = dataset.hold_out(args.hold_out)
    side = side_of(dataset, settings.image_side)

    def build() -> nn.Module:
        model = build_model(settings.model, len(dataset.classes), side)
        for line in load_initial_weights(model, args.init_weights) if args.init_weights else []:
            console.say(line)
        return model

    # 3. The engine that spreads the training over processes, and the batches that feed it
    meeting = meeting_of(
        args.host_peers, args.join, args.peer_address, args.runs_dir, args.name, settings.parallel.patience_seconds
    )
    engine_type = engine_class(settings.strategy, peers=meeting is not None)
    if line := choose_precision(settings.engine["bf16"]["enabled"], engine_type.autocast_refusal, pick_device())[1]:
        console.print_field("precision", line)
    micro_batch = MicroBatch(engine_type, settings, build, dataset, side)
    if args.micro_batch and (line := micro_batch.choose(args.micro_batch)):
        console.say(line)
    steps_per_epoch = dataset.steps_per_epoch(settings.engine["train_batch_size"])
    total_steps = min(settings.epochs * steps_per_epoch, args.max_steps or sys.maxsize)

    def train() -> bool:
        with ExitStack() as closing:
            engine = engine_type(
                build,
                settings,
                Schedule(settings.schedule, total_steps),
                args.seed,
                **({"meeting": meeting} if meeting else {}),
            )
            engine.stopping = lambda: stop.requested
            closing.push(lambda kind, *_: engine.close(failed=kind is not None))
            training, evaluation = make_batches(
                dataset,
                settings,
                engine.data_shard,
                engine.batch_sizes.micro,
                engine.data_seed,
                engine.device,
                args.source,
                args.synthetic,
                closing,
            )
            if args.skip_bad_steps:
                engine.skip_bad_steps()
            if args.link_gbps:
                console.say(
                    "\n".join(
                        lines_of_cost(
                            engine.num_parameters, settings.parallel.local_steps, args.link_gbps, args.step_seconds
                        )
                    )
                )
            # 4. The run: a new folder or a checkpoint to resume, then steps, epochs, evaluation and checkpoints
            started = start_run(
                engine,
                run_options(args, preset),
                folder_options(args),
                logging_options(args),
                dataset,
                folder,
                training,
                steps_per_epoch,
                total_steps,
                console,
            )
            limit_waits(FIRST_STEPS_SECONDS if engine.first_steps else 0.0)
            loop = Loop(
                engine,
                settings,
                training,
                evaluation,
                steps_per_epoch,
                total_steps,
                started,
                args.patience,
                stop,
                console,
            )
            return loop.run(stop_at=args.stop_at)

    try:
        return 0 if train() else EXIT_STOPPED
    except OutOfMemory:
        pass  # looked into when nothing holds the engine any more
    raise RunError(micro_batch.advice())


def default_preset(device: torch.device, console: Console) -> str:
    """The preset for the device that will be used, where none was asked for."""
    from parallel.precision import fast_bf16

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


def run() -> int:
    """Call `main`; what the user can fix becomes one line on the screen."""
    rank = os.environ.get("RANK", "0")
    try:
        return main()
    except UserError as error:
        if rank == "0":
            print(f"error: {error}", file=sys.stderr)
        elif not isinstance(
            error, SettingsError
        ):  # every process refuses a setting; a file or a loss may fail in one alone
            print(f"error in process {rank}: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if "does not have a deterministic implementation" in str(error):
            print(
                f"error: --deterministic: {str(error).split(', ')[0].split('. ')[0]}; leave the flag out, or choose another part",
                file=sys.stderr,
            )
            return 1
        if not any(sign in str(error) for sign in LOST_PEER):
            raise
        # The one that ended first says why; the traces of all the others would bury its sentence.
        print(f"process {rank} stops, because another process has ended", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(run())
