# PYTHON_ARGCOMPLETE_OK
"""Evaluate a run: exact loss, top-1 and top-5 accuracy, calibration, accuracy by class, confusions.

    python evaluate.py                                       # the newest run
    python evaluate.py mine --json result.json               # runs/mine
    python evaluate.py runs/mine --predict cat.png           # classify your own images
    python evaluate.py runs/mine --export onnx               # export the network as one file and check it
    python evaluate.py runs/a runs/b --soup --ensemble       # averaged weights, averaged predictions

It reads the run folder and, for an evaluation, the dataset. It needs no DeepSpeed, no GPU and no particular number of
processes: under torchrun the processes share the images, and the result is the same.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import DatasetError, RunError, SettingsError
from common.files import write_atomically
from common.output_files import check_output_file
from common.paths import RUNS, near_path
from common.text import python_command
from config.catalog import SOURCES
from config.command_line import Parser, at_least_one, run_cli
from inference.evaluation import ENSEMBLE, FLIP, SplitResult, describe, evaluate, open_dataset, open_split, summarize
from inference.trained_model import WEIGHTS, TrainedModel
from records.named_run import existing_run, find_run

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import nn

    from dali_pipeline import Batches
    from image_data.dataset import Dataset

# The options that each task uses besides `run` and `--runs-dir`; any other is rejected rather than ignored.
COUNTING = {"data_dir", "split", "weights", "precision", "batch_size", "source", "json"}
USED = {
    "an evaluation": COUNTING | {"per_class", "flip"},
    "several runs": COUNTING | {"soup", "ensemble"},
    "--predict": {"predict", "weights", "precision", "batch_size", "output"},
    "--export": {"export", "weights", "data_dir", "output"},
}

OUT_OF_MEMORY = ("CUDA out of memory", "CUDA error: out of memory", "can't allocate memory")  # the last on a CPU


@dataclass(frozen=True)
class OpenSplit:
    """The split to evaluate, opened in this process, and how its networks compute."""

    dataset: Dataset
    batches: Batches  # of this process
    device: torch.device
    precision: str
    is_main: bool  # whether this process prints

    def evaluate(self, networks: dict[str, nn.Module], **combined: Any) -> dict[str, SplitResult]:
        """Evaluate networks, with the arguments `flip` and `ensemble` of `inference.evaluation.evaluate`."""
        autocast, show = self.precision == "autocast", self.is_main and sys.stderr.isatty()
        return evaluate(
            networks, self.batches, len(self.dataset.classes), self.device, autocast=autocast, show=show, **combined
        )


def main() -> int:
    args = parse_arguments()
    runs = [TrainedModel.open(find_run(name, args.runs_dir, args.weights)) for name in args.runs or [None]]
    if not args.runs and os.environ.get("RANK", "0") in ("", "0"):
        print(  # the CSV of --predict stays alone on stdout
            f"run       {near_path(runs[0].record.folder)} (the newest)",
            file=sys.stderr if args.predict else sys.stdout,
        )
    try:
        if args.predict:
            return predict_images(runs[0], args)
        if args.export:
            return export_network(runs[0], args)
        return evaluate_several(runs, args) if len(runs) > 1 else evaluate_run(runs[0], args)
    except RuntimeError as error:
        size = 1 if args.export else args.batch_size
        if size == 1 or not any(text in str(error) for text in OUT_OF_MEMORY):
            raise
        raise RunError(f"out of memory with batches of {size} images. Add --batch-size {max(1, size // 4)}") from error


def evaluate_run(trained: TrainedModel, args: argparse.Namespace) -> int:
    """Evaluate one run, print the result, then write it."""
    from reports.evaluation import print_report, save_report

    epochs = len(trained.record.metrics())  # before the work: the file may be damaged
    with open_split_of(trained, args) as split:
        network = trained.network(args.weights, split.device, split.precision)
        results = split.evaluate({"": network}, flip=args.flip)
    if split.is_main:
        dataset = split.dataset
        facts = {"run": trained.name, "split": args.split, "weights": args.weights}
        report = facts | {"precision": split.precision, "epochs": epochs}
        report |= {"dataset_fingerprint": dataset.fingerprint} | describe(results[""], dataset.classes)
        if args.flip:
            report["test_time_flip"] = summarize(results[FLIP])
        print_report(report, args.per_class)
        if args.json:
            write_atomically(args.json, json.dumps(report, indent=2))
        if dataset.fingerprint == trained.facts["dataset"]["fingerprint"]:
            save_report(trained, report, results[""])
        else:
            advice = "" if args.json else "; add --json FILE to save this one"
            print(f"note: the run folder keeps the result of its own dataset{advice}", file=sys.stderr)
    return 0


def evaluate_several(runs: list[TrainedModel], args: argparse.Namespace) -> int:
    """Evaluate each run, and their averaged weights (--soup) or averaged predictions (--ensemble)."""
    from inference.several_runs import average_weights, check_same_input
    from reports.evaluation import print_several

    check_same_input(runs, args.split)
    precisions = sorted({trained.facts["precision"] for trained in runs})
    if len(precisions) > 1 and not args.precision:
        raise RunError(f"the runs were trained in different precisions ({', '.join(precisions)}). Add --precision fp32")
    names = [os.path.relpath(trained.record.folder) for trained in runs]  # in the report: no absolute path
    if len(set(names)) < len(names):
        raise SettingsError("the same run is named twice. Name different runs")
    names = [f"./{name}" if name in ("soup", ENSEMBLE) else name for name in names]  # runs of these names
    with open_split_of(runs[0], args) as split:
        trained_networks = [trained.network(args.weights, split.device, split.precision) for trained in runs]
        networks = dict(zip(names, trained_networks, strict=True))
        if args.soup:
            networks["soup"], has_statistics = average_weights(trained_networks, runs)
            if has_statistics and split.is_main:
                print("warning: the soup averages BatchNorm statistics, which fit no network exactly", file=sys.stderr)
        results = split.evaluate(networks, ensemble=tuple(names) if args.ensemble else ())
    if split.is_main:
        report = {"split": args.split, "weights": args.weights, "precision": split.precision}
        report |= {"runs": {name: summarize(results[name]) for name in names}}
        report |= {name: summarize(results[name]) for name in ("soup", ENSEMBLE) if name in results}
        print_several(report)
        if args.json:
            write_atomically(args.json, json.dumps(report, indent=2))
    return 0


@contextmanager
def open_split_of(trained: TrainedModel, args: argparse.Namespace) -> Iterator[OpenSplit]:
    """Open the split to evaluate in all processes, and close it in the end."""
    from dali_pipeline import Batches
    from parallel.process_group import destroy_process_group, init_process_group

    facts = trained.facts
    dataset = open_split(trained, args.split, args.data_dir)
    device = init_process_group()
    rank, num_processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank == 0 and dataset.fingerprint != facts["dataset"]["fingerprint"]:
        print("warning: this is not the dataset of the training (its fingerprint differs)", file=sys.stderr)
    source = dict(device=device, source=args.source, image_side=facts["settings"]["image_side"])
    batches = Batches(dataset, args.split, args.batch_size, rank, num_processes, **source)
    try:
        yield OpenSplit(dataset, batches, device, args.precision or facts["precision"], rank == 0)
    finally:
        batches.close()
    destroy_process_group()


def predict_images(trained: TrainedModel, args: argparse.Namespace) -> int:
    """Print or write the five most probable classes of the images of --predict. Returns 1 where one is unreadable."""
    from inference.predict_images import predict
    from parallel.process_group import pick_device

    precision = args.precision or trained.facts["precision"]
    network = trained.network(args.weights, pick_device(), precision)
    return min(1, predict(trained, network, args.predict, args.batch_size, precision == "autocast", args.output))


def export_network(trained: TrainedModel, args: argparse.Namespace) -> int:
    """Write the network in the format of --export."""
    from inference.model_card import write_card
    from inference.onnx_export import export, pixels_to_check
    from reports.evaluation import write_optional

    output = args.output or trained.record.folder / f"model.{args.export}"
    if not args.output and not os.access(trained.record.folder, os.W_OK):
        raise SettingsError(f"the folder {trained.record.folder} is not writable. Name a file with --output model.onnx")
    try:
        checked = pixels_to_check(trained, open_dataset(trained, args.data_dir))
    except DatasetError:
        if args.data_dir:
            raise
        checked = pixels_to_check(trained, None)  # the export needs no dataset
    export(trained, args.weights, output, *checked)
    if write_optional(trained.record.folder, lambda: write_card(trained.record)):
        print(f"model card with instructions: {near_path(trained.record.folder / 'README.md')}")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        "python evaluate.py [run ...]",
        "Evaluate a run exactly, classify your own images with it, or export its network.",
        example="python evaluate.py runs/mine --batch-size 1000 --json result.json\n"
        "python evaluate.py runs/mine --predict photos/ --output photos.csv\n"
        "python evaluate.py runs/mine --export onnx\n"
        "python evaluate.py runs/a runs/b --soup --ensemble",
    )
    parser.add_argument(
        "runs",
        nargs="*",
        type=Path,
        metavar="run",
        help="run folder or name of a run, several with --soup or --ensemble (default: the newest under runs/)",
    )
    parser.add_argument(
        "--runs-dir",
        type=Path,
        default=RUNS,
        metavar="DIR",
        help="folder of the runs, searched for names and for the newest run (default: runs)",
    )
    parser.add_argument(
        "--weights",
        default=WEIGHTS,
        metavar="FILE",
        help=f"file in the run folder: {WEIGHTS} (the default: after the last epoch, EMA where the run has one), "
        "raw_weights.safetensors (without EMA), best.safetensors (best validation accuracy)",
    )
    parser.add_argument(
        "--precision",
        choices=["fp32", "bf16", "autocast"],
        help="floating-point format of the computation (default: that of the training, which must be one for all runs)",
    )
    parser.add_argument(
        "--batch-size",
        type=at_least_one,
        default=500,
        metavar="N",
        help="images per batch; does not change the result (default: 500)",
    )
    count = parser.add_argument_group("evaluation (the default task)")
    count.add_argument(
        "--split",
        default="test",
        choices=["test", "validation"],
        help="split to evaluate; validation needs a run with --hold-out (default: test)",
    )
    count.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="folder of the prepared dataset (default: that of the training)"
    )
    count.add_argument(
        "--source",
        default="auto",
        choices=SOURCES,
        help="reader of the images: packed through DALI, files through DALI, packed through PyTorch (default: auto)",
    )
    count.add_argument(
        "--per-class", action="store_true", help="print every class (default: the ten worst and the ten best)"
    )
    count.add_argument(
        "--flip",
        action="store_true",
        help="also evaluate with test-time flip: the mean prediction of each image and its mirror image",
    )
    count.add_argument("--soup", action="store_true", help="also evaluate the averaged weights of several runs")
    count.add_argument("--ensemble", action="store_true", help="also evaluate the averaged predictions of several runs")
    count.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="extra copy of the report (default: only evaluation_<split>.json in the run folder)",
    )
    use = parser.add_argument_group("use of the network")
    use.add_argument(
        "--predict",
        nargs="+",
        type=Path,
        metavar="IMAGE",
        help="image files of any size and format to classify, or folders of them for a CSV; needs no dataset "
        "(default: evaluate)",
    )
    use.add_argument(
        "--export",
        choices=["onnx"],
        help="format to export the network to, checked against PyTorch on test images (default: evaluate)",
    )
    use.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="file for the CSV of --predict (default: the screen) or for the exported network "
        "(default: model.onnx in the run folder)",
    )
    args = parser.parse_args()
    check_arguments(parser, args)
    return args


def check_arguments(parser: Parser, args: argparse.Namespace) -> None:
    """Raise SettingsError for options that exclude each other or do not apply, and for output that is not writable."""
    if args.predict and args.export:
        raise SettingsError("--predict and --export exclude each other. Run the command once for each")
    one_run = "--predict" if args.predict else "--export" if args.export else "an evaluation"
    task = "several runs" if len(args.runs) > 1 and one_run == "an evaluation" else one_run
    if len(args.runs) > 1 and task == one_run:
        raise SettingsError(f"{task} takes one run, not {len(args.runs)}")
    if args.predict:
        check_images(args.predict, args.runs_dir)
    for name in ("soup", "ensemble"):
        if getattr(args, name) and task == "an evaluation":
            raise SettingsError(f"--{name} needs at least two runs: python evaluate.py runs/a runs/b --{name}")
    parser.refuse_unused(args, {"runs", "runs_dir", *USED[task]}, task)
    if task == "several runs" and not (args.soup or args.ensemble):
        raise SettingsError("several runs need --soup, --ensemble or both. Name one run for its full report")
    for name in ("json", "output"):
        if getattr(args, name):
            check_output_file(getattr(args, name), f"--{name}")


def check_images(paths: list[Path], runs: Path) -> None:
    """Raise SettingsError for a run among the images of --predict, which takes every word that follows it."""
    for path in paths:
        run = existing_run(path, runs)
        if run == path or run and not path.exists():
            images = [other for other in paths if other != path] or [Path("IMAGE")]
            raise SettingsError(
                f"{path} is a run folder; write {python_command('evaluate.py', path, '--predict', *images)}"
            )


if __name__ == "__main__":
    sys.exit(run_cli(main))
