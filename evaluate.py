# PYTHON_ARGCOMPLETE_OK
"""How good a run is: exact loss, top-1 and top-5 accuracy on the test split, per class, and what it confuses.

    python evaluate.py                                       # the newest run
    python evaluate.py runs/mine --json result.json
    python evaluate.py runs/mine --predict cat.png           # what it sees in images of your own
    python evaluate.py runs/mine --export onnx               # its network as one file, checked

Reads only the run folder and, to count, the dataset; needs no DeepSpeed, no GPU, and no particular number of processes.
Under torchrun the processes share the images, and the sums are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.errors import RunError, SettingsError
from common.files import write_atomically
from common.paths import RUNS
from config.catalog import SOURCES
from config.command_line import Parser, at_least_one, run_cli
from inference.evaluation import describe, evaluate, open_dataset
from inference.trained_model import WEIGHTS, TrainedModel
from records.run_folder import newest_run

if TYPE_CHECKING:
    pass

# The options that each task uses besides `run` and `--runs-dir`; any other is refused rather than ignored.
USED = {
    "evaluation": {"data_dir", "split", "weights", "precision", "batch_size", "source", "per_class", "json"},
    "--predict": {"predict", "weights", "precision", "batch_size", "output"},
    "--export": {"export", "weights", "data_dir", "output"},
}


def main() -> int:
    args = parse_arguments()
    trained = TrainedModel.open(args.run or newest_run(args.runs_dir))
    if args.predict:
        return predict_images(trained, args)
    if args.export:
        return export_network(trained, args)
    return evaluate_run(trained, args)


def evaluate_run(trained: TrainedModel, args: argparse.Namespace) -> int:
    """Count, and write and print the report."""
    from dali_pipeline import Batches
    from parallel.process_group import destroy_process_group, init_process_group

    record, facts = trained.record, trained.facts
    dataset = open_dataset(trained, args.data_dir)
    device = init_process_group()
    which, of_how_many = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    is_main = which == 0
    if args.split == "validation":
        if not facts["hold_out"]:
            raise RunError(f"{record.folder} held out no part of the training split; evaluate it on --split test")
        dataset = dataset.hold_out(facts["hold_out"])
    precision = args.precision or facts["precision"]
    model = trained.network(args.weights, device, precision)
    batches = Batches(
        dataset,
        args.split,
        args.batch_size,
        which,
        of_how_many,
        device=device,
        source=args.source,
        image_side=facts["settings"]["image_side"],
    )
    if is_main and dataset.fingerprint != facts["dataset"]["fingerprint"]:
        print("note: this is not the dataset that the run was trained on (its fingerprint differs)", file=sys.stderr)
    result = evaluate(
        model,
        batches,
        len(dataset.classes),
        device,
        autocast=precision == "autocast",
        show=is_main and sys.stderr.isatty(),
    )
    batches.close()
    if is_main:
        facts = {
            "run": record.folder.name,
            "split": args.split,
            "weights": args.weights,
            "precision": precision,
            "epochs": len(record.metrics()),
        }
        report = facts | describe(result, dataset.classes)
        print_report(report, args.per_class)
        save_report(trained, report, result["confusion"], args.json)
    destroy_process_group()
    return 0


def save_report(trained: TrainedModel, report: dict[str, Any], confusion: np.ndarray, also: Path | None) -> None:
    """Write what an evaluation found into the run folder: report, picture, model card."""
    from inference.model_card import write_card
    from reports.classes import confusion as draw_confusion
    from reports.style import save

    folder, split = trained.record.folder, report["split"]
    save(
        draw_confusion(confusion, trained.classes, f"{folder.name}: {100 * report['accuracy']:.2f}% on {split}"),
        folder / f"confusion_{split}.png",
    )
    text = json.dumps(report, indent=2)
    write_atomically(folder / f"evaluation_{split}.json", text)
    if also:
        write_atomically(also, text)
    write_card(trained.record)


def predict_images(trained: TrainedModel, args: argparse.Namespace) -> int:
    """Show what the network sees in the images of --predict. Returns the exit code: 1 when one of them could not be read."""
    from inference.predict_images import predict
    from parallel.process_group import pick_device

    precision = args.precision or trained.facts["precision"]
    network = trained.network(args.weights, pick_device(), precision)
    return min(1, predict(trained, network, args.predict, args.batch_size, precision == "autocast", args.output))


def export_network(trained: TrainedModel, args: argparse.Namespace) -> int:
    """Write the network in the format of --export."""
    from common.errors import DatasetError
    from inference.model_card import write_card
    from inference.onnx_export import export

    try:
        dataset = open_dataset(trained, args.data_dir)
    except DatasetError:
        if args.data_dir:
            raise
        dataset = None  # the network can be had without it; the check is then on noise
    export(trained, args.weights, args.output or trained.record.folder / f"model.{args.export}", dataset)
    print(f"how to use it: {os.path.relpath(write_card(trained.record))}")
    return 0


def print_report(report: dict[str, Any], all_classes: bool) -> None:
    """The report for people."""
    rows = sorted(report["per_class"].items(), key=lambda item: item[1]["correct"] / max(1, item[1]["seen"]))
    shown = rows if all_classes or len(rows) <= 20 else rows[:10] + rows[-10:]
    print("class                      accuracy")
    for i, (name, counts) in enumerate(shown):
        if i == 10 and len(shown) < len(rows):
            print(f"  ... {len(rows) - 20} classes between (--per-class shows all)")
        accuracy = 100 * counts["correct"] / max(1, counts["seen"])
        print(f"  {name:24} {accuracy:6.2f}%  ({counts['correct']}/{counts['seen']})")
    print("most frequent confusions")
    for pair in report["worst_confusions"]:
        print(f"  {pair['true']} taken for {pair['predicted']}: {pair['count']}")
    name = report["split"].capitalize()
    print(f"{name} loss: {report['loss']:.4f}")
    print(f"{name} top-5 accuracy: {100 * report['top5_accuracy']:.2f}% ({report['correct_top5']}/{report['seen']})")
    print(f"{name} accuracy: {100 * report['accuracy']:.2f}% ({report['correct']}/{report['seen']})")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        "python evaluate.py [run]",
        "Exact accuracy of a run; or what its network sees in images; or its network as one file.",
        example="python evaluate.py runs/mine --batch-size 1000 --json result.json\n"
        "python evaluate.py runs/mine --predict photos/ --output photos.csv\n"
        "python evaluate.py runs/mine --export onnx",
    )
    parser.add_argument("run", nargs="?", type=Path, help="a run folder (default: the newest under runs/)")
    parser.add_argument(
        "--runs-dir", type=Path, default=RUNS, metavar="DIR", help="where to look for the newest run (default: runs)"
    )
    parser.add_argument(
        "--weights",
        default=WEIGHTS,
        metavar="FILE",
        help=f"file in the run folder: {WEIGHTS} (the default: after the last epoch, averaged where the run averages), "
        "raw_weights.safetensors (not averaged), best.safetensors (the best epoch on a held-out part)",
    )
    parser.add_argument(
        "--precision",
        choices=["fp32", "bf16", "autocast"],
        help="of the arithmetic (default: what the run was trained in)",
    )
    parser.add_argument(
        "--batch-size",
        type=at_least_one,
        default=500,
        metavar="N",
        help="images at a time, which changes no result (default: 500)",
    )
    count = parser.add_argument_group("accuracy (what happens when neither of the two below is asked for)")
    count.add_argument(
        "--split",
        default="test",
        choices=["test", "validation"],
        help="what to evaluate: test, or the validation part that the run held out (default: test)",
    )
    count.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="the prepared dataset (default: the one the run was trained on)"
    )
    count.add_argument(
        "--source",
        default="auto",
        choices=SOURCES,
        help="how images are read: packed through DALI, files through DALI, packed through PyTorch (default: auto)",
    )
    count.add_argument(
        "--per-class", action="store_true", help="show every class (default: the ten worst and the ten best)"
    )
    count.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write the report here too (default: evaluation_<split>.json in the run folder)",
    )
    use = parser.add_argument_group("use of the network")
    use.add_argument(
        "--predict",
        nargs="+",
        type=Path,
        metavar="IMAGE",
        help="the five likeliest classes of images of any size and format, "
        "of folders of them as CSV; needs no dataset (default: evaluate)",
    )
    use.add_argument(
        "--export",
        choices=["onnx"],
        help="write the network as ONNX, and compare it with PyTorch on test images (default: evaluate)",
    )
    use.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="where --predict writes CSV (default: the screen) or --export the network "
        "(default: model.onnx in the run folder)",
    )
    args = parser.parse_args()
    refuse_unused(parser, args)
    return args


def refuse_unused(parser: Parser, args: argparse.Namespace) -> None:
    """Raise SettingsError for an option that the task at hand would not use."""
    if args.predict and args.export:
        raise SettingsError("give --predict or --export, not both")
    task = "--predict" if args.predict else "--export" if args.export else "evaluation"
    for name, value in vars(args).items():
        if name not in {"run", "runs_dir", *USED[task]} and value != parser.get_default(name):
            raise SettingsError(
                f"--{name.replace('_', '-')} has no meaning for {'an ' if task == 'evaluation' else ''}{task}; leave it out"
            )


if __name__ == "__main__":
    sys.exit(run_cli(main))
