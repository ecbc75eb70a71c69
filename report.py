"""Pictures and a page of a run; or one picture of several.

    python report.py                                     # the newest run: runs/<name>/report.html and runs/<name>/pictures/
    python report.py runs/mine --quick                   # without the pictures that need the dataset
    python report.py runs/a runs/b --out compare.png     # several runs in one picture, .png or .svg

In: a run folder and, but for --quick, the dataset it was trained on. Out: a page that needs no network, each picture as PNG and SVG.
train.py writes the quick page by itself when a run ends.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.errors import RunError, SettingsError
from common.paths import PROJECT, RUNS
from config.catalog import SOURCES
from config.command_line import Parser, at_least_one, run_cli
from config.settings import Settings
from records.run_data import RunData
from records.run_folder import newest_run

if TYPE_CHECKING:
    from image_data.dataset import Dataset
    from reports.pictures import SplitAnalysis

NUM_MISTAKES = 24
NUM_ATTENTION = 5  # images whose attention is drawn


def main() -> None:
    args = parse_arguments()
    folders = args.runs or [newest_run(args.runs_dir)]
    runs = [RunData.read(folder) for folder in folders]
    for run in runs:
        if not run.metrics:
            raise RunError(f"{run.folder} has no finished epoch yet")
    if len(runs) > 1:
        compare(runs, args.out or args.runs_dir / "compare.png")
    elif args.out is not None:
        raise SettingsError("--out is for several runs; the page and the pictures of one go into its folder")
    else:
        draw(runs[0], None if args.quick else inspect(runs[0], args))


def draw(run: RunData, seen: SplitAnalysis | None) -> None:
    """Write the page and the pictures of one run."""
    from reports.page import write_page
    from reports.pictures import pictures_of
    from reports.style import save

    pictures = pictures_of(run, seen)
    for picture in pictures:
        for ending in ("png", "svg"):
            save(picture.figure, run.folder / "pictures" / f"{picture.name}.{ending}")
    print(f"pictures  {os.path.relpath(run.folder)}/pictures/: {', '.join(picture.name for picture in pictures)}")
    print(f"page      {os.path.relpath(write_page(run, seen, pictures))}")


def compare(runs: list[RunData], path: Path) -> None:
    """Draw several runs in one picture, and print where each of them ended."""
    from reports.curves import several
    from reports.style import save

    if path.suffix not in (".png", ".svg"):
        raise SettingsError(f"--out ends in .png or .svg, not '{path.suffix}'")
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [os.path.relpath(run.folder) for run in runs]
    for run, name in zip(runs, names, strict=True):
        print(run.headline().replace(run.name, f"{name:{max(map(len, names))}}", 1))
    print(f"picture   {os.path.relpath(save(several(runs, names), path))}")


def inspect(run: RunData, args: argparse.Namespace) -> SplitAnalysis | None:
    """Run the network over a split of the data. None, with a note, where the dataset or the weights are not there."""
    from common.errors import DatasetError
    from dali_pipeline import Batches
    from reports.pictures import SplitAnalysis
    from reports.predictions import mistakes, predict

    split = args.split or ("validation" if run.facts["hold_out"] else "test")
    try:
        dataset, model, device = load(run, split, args)
    except (DatasetError, RunError) as error:
        if args.data_dir or args.split:
            raise
        print(f"note: only the pictures that need no data, because {error}", file=sys.stderr)
        return None
    source = dict(device=device, source=args.source, image_side=run.facts["settings"]["image_side"])
    batches = Batches(dataset, split, args.batch_size, **source)
    found = predict(model, batches, run.facts["precision"] == "autocast")
    batches.close()
    return SplitAnalysis(
        split,
        found.confusion(len(dataset.classes)),
        float(found.loss.mean()),
        mistakes(found, dataset, split, NUM_MISTAKES, **source),
        attention_of(run, model, dataset, split, source),
    )


def load(run: RunData, split: str, args: argparse.Namespace) -> tuple[Dataset, Any, Any]:
    """The dataset as training normalised it, the network, its device. Raises DatasetError or RunError."""
    from image_data.dataset import Dataset
    from inference.evaluation import check_same_classes, normalise_as_trained
    from inference.trained_model import load_model
    from parallel.process_group import pick_device

    facts = run.facts
    dataset = Dataset.open(args.data_dir or PROJECT / facts["dataset"]["folder"])
    check_same_classes(dataset.classes, facts["dataset"]["classes"])
    if split == "validation":
        if not facts["hold_out"]:
            raise RunError(f"{run.folder} held out no part of the training split; look at --split test")
        dataset = dataset.hold_out(facts["hold_out"])
    device = pick_device()
    model = load_model(run.folder / args.weights, facts, device, facts["precision"])
    return normalise_as_trained(dataset, facts["dataset"]), model, device


def attention_of(
    run: RunData, model: Any, dataset: Dataset, split: str, source: dict[str, Any]
) -> tuple[Any, Any, list[str]] | str:
    """Some images from all over the split, their attention maps and classes; or why there are none."""
    from image_data.pixels import denormalize
    from reports.predictions import attention_maps, load_images

    settings, labels = Settings.from_dict(run.facts["settings"]).model, dataset.splits[split].labels
    if settings.architecture != "vit":
        return f"Attention is drawn for the architecture vit only; this run is a {settings.architecture}."
    chosen = np.unique(np.linspace(0, len(labels) - 1, NUM_ATTENTION).astype(int))
    images = load_images(dataset, split, chosen, **source)
    maps = attention_maps(model, settings, images, run.facts["precision"] == "autocast")
    return denormalize(images, dataset.mean, dataset.std), maps, [dataset.classes[labels[at]] for at in chosen]


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        "python report.py [run ...]",
        "Pictures and a page of a run, or one picture of several.",
        example="python report.py runs/a runs/b --out compare.png",
    )
    parser.add_argument(
        "runs", nargs="*", type=Path, metavar="RUN", help="run folders (default: the newest under runs/)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the picture of several runs, .png or .svg (default: runs/compare.png)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="leave out what needs the dataset: classes, mistakes, attention"
    )
    parser.add_argument(
        "--split",
        choices=["test", "validation"],
        help="what to look at (default: the held-out part where there is one, else test)",
    )
    parser.add_argument(
        "--weights",
        default="weights.safetensors",
        metavar="FILE",
        help="file in the run folder (default: weights.safetensors; or best.safetensors)",
    )
    parser.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="the prepared dataset (default: the one the run was trained on)"
    )
    parser.add_argument(
        "--batch-size",
        type=at_least_one,
        default=500,
        metavar="N",
        help="images at a time; no influence on the result (default: 500)",
    )
    parser.add_argument("--source", default="auto", choices=SOURCES, help="how images are read (default: auto)")
    parser.add_argument(
        "--runs-dir", type=Path, default=RUNS, metavar="DIR", help="where to look for the newest run (default: runs)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_cli(main))
