#!/usr/bin/env python3
# PYTHON_ARGCOMPLETE_OK
"""Train a network on a folder of images, one subfolder per class.

    ./launch_local_train.sh                                            one machine: setup, data, every GPU (or the CPU)
    python train.py --preset cpu --set model.feed_forward=geglu        one process, in a prepared environment

The run folder `runs/<name>/` holds everything that a run writes. Starting the same run again resumes it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack

from common.display import protect_streams
from common.errors import (
    EXIT_INTERRUPTED,
    EXIT_NOTHING_DONE,
    EXIT_STOPPED,
    RunError,
    RunFinishedError,
    StoppedError,
    UserError,
)
from common.output_files import disk_problem
from config.command_line import reports_errors, run_cli
from config.settings import resolve
from training.arguments import options_of, parse_arguments

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

        return run_cli(lambda: list_settings(args.preset, args.set))
    # Imported late, so that --help and mistyped settings answer at once: all of this imports PyTorch.
    from dali_pipeline import make_batches
    from image_data.preparation.prepare import find_or_prepare
    from optim.lr_schedule import Schedule
    from parallel.compile import FIRST_STEPS_SECONDS
    from parallel.engine import Engine
    from parallel.peers.setup import meeting_of
    from parallel.process_group import limit_waits, pick_device
    from parallel.strategies import engine_class
    from records.provenance import remember_source
    from training.evaluation import Evaluation
    from training.loop import Loop
    from training.micro_batch import MicroBatch, OutOfMemory
    from training.own_part_checks import check_before_data, check_own_parts
    from training.resizing_check import choose_resizing
    from training.run_setup import (
        check_settings,
        default_preset,
        limit_default_run,
        network_builder,
        open_dataset,
        set_engine_options,
        start_process,
    )
    from training.run_start import start_run
    from training.time_plan import time_plan_of

    remember_source()

    # 1. This process: signals, its rank, what it prints
    stop, console = start_process(args.verbosity, args.deterministic, args.tensorboard, args.wandb, args.mlflow)

    # 2. The settings, all of them checked before any data is fetched
    preset = default_preset(pick_device(), console) if args.preset is None else args.preset
    limit_default_run(args, pick_device(), console)
    settings = resolve(preset, args.set, epochs=args.epochs, strategy=args.strategy)
    peer_wait = settings.parallel.patience_seconds
    meeting = meeting_of(args.host_peers, args.join, args.peer_address, args.runs_dir, args.name, peer_wait)
    engine_type = engine_class(settings.strategy, peers=meeting is not None)
    check_settings(settings, engine_type, preset, args.init_weights, args.evaluate_ema_only, console)
    check_before_data(settings, args.data_dir, args.dataset)

    # 3. The dataset, the network and the batch
    prepared = find_or_prepare(args.data_dir, args.dataset, args.archive, args.skip_broken)
    data = open_dataset(prepared, args.stage_to, args.source, args.hold_out, settings.image_side)
    num_classes = len(data.dataset.classes)
    for text in check_own_parts(settings, num_classes, data.side):
        console.print_field("warning", text)
    choose_resizing(settings, args.set, engine_type.resizing_refusal, num_classes, data.side, console)
    build = network_builder(settings.model, num_classes, data.side, args.init_weights, console)
    micro_batch = MicroBatch(engine_type, settings, build, data.dataset, args.source, data.side)
    if args.micro_batch and (line := micro_batch.choose(args.micro_batch)):
        console.say(line)
    steps_per_epoch = data.dataset.steps_per_epoch(settings.engine["train_batch_size"])
    total_steps = min(settings.epochs * steps_per_epoch, args.max_steps or sys.maxsize)
    options, folder, logging = options_of(args, preset)

    def train() -> bool:
        with ExitStack() as closing:
            # 4. The engine, which runs the network on all processes, and the batches that feed it
            minutes = None if args.only_shortens else args.max_minutes
            schedule = Schedule(settings.schedule, total_steps, minutes=minutes)
            make_engine: Callable[..., Engine] = engine_type  # a strategy also takes the network, and may take peers
            engine = make_engine(build, settings, schedule, args.seed, **({"meeting": meeting} if meeting else {}))
            engine.stopping = lambda: stop.requested
            closing.push(lambda kind, *_: engine.close(failed=kind is not None))
            shard, micro, seed = engine.data_shard, engine.batch_sizes.micro, engine.data_seed
            training, splits = make_batches(
                data.dataset, settings, shard, micro, seed, engine.device, args.source, args.synthetic, closing
            )
            set_engine_options(
                engine, args.skip_bad_steps, args.log_gradients, args.link_gbps, args.step_seconds, console
            )
            # 5. The run: a new folder or a checkpoint to resume, then steps, epochs, evaluation and checkpoints
            started = start_run(engine, options, folder, logging, data, training, steps_per_epoch, total_steps, console)
            limit_waits(FIRST_STEPS_SECONDS if engine.first_steps else 0.0)
            evaluation = Evaluation(
                engine, splits, steps_per_epoch, args.evaluate_every, not args.evaluate_ema_only, args.patience
            )
            time_plan = time_plan_of(args.max_minutes, args.only_shortens, schedule, engine.resizing, data.side)
            loop = Loop(engine, training, evaluation, steps_per_epoch, started, time_plan, stop, console)
            return loop.run(stop_at=args.stop_at)

    try:
        return 0 if train() else EXIT_STOPPED
    except OutOfMemory:
        pass  # the advice below is sought once nothing holds the engine any more
    raise RunError(micro_batch.advice())


def explain(error: OSError | RuntimeError) -> str | None:
    """Return the sentence for an error of the system or of a library that the user can fix; None for others."""
    if isinstance(error, OSError):
        return disk_problem(error)
    if "does not have a deterministic implementation" in str(error):
        what = str(error).split(", ")[0].split(". ")[0]
        return f"--deterministic: {what}; leave the flag out, or choose another part"
    if "can't allocate memory" in str(error):  # of PyTorch's allocator for CPUs
        return "out of memory; choose a smaller --micro-batch or a smaller network"
    if "/dev/shm" in str(error):  # of NCCL, through which the GPUs of a machine exchange
        return (
            "/dev/shm is full or too small for NCCL; in a container start it with --shm-size=8g, "
            "or set NCCL_SHM_DISABLE=1 (slower)"
        )
    return None


def run() -> int:
    """Call `main` and print what the user can fix as one line. Returns the exit code."""
    rank = os.environ.get("RANK", "0")
    protect_streams()
    try:
        return main()
    except StoppedError as stopped:
        print(stopped, file=sys.stderr)
        return EXIT_STOPPED
    except UserError as error:
        if reports_errors():
            where = "" if rank in ("", "0") else f" in process {rank}"
            print(f"error{where}: {error}", file=sys.stderr)
        return EXIT_NOTHING_DONE if isinstance(error, RunFinishedError) else 1
    except KeyboardInterrupt:
        print("error: interrupted before the run was saved", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (OSError, RuntimeError) as error:
        if sentence := explain(error):
            print(f"error: {sentence}", file=sys.stderr)
            return 1
        if not any(sign in str(error) for sign in LOST_PEER):
            raise
        # The process that failed first prints the reason; the tracebacks of all the others would bury it.
        print(f"process {rank} stops, because another process has ended", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(run())
