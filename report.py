"""Write the report of a run (a page and pictures), or one picture that compares several runs.

    python report.py                                     # the newest run: report.html and pictures/ in its run folder
    python report.py mine --quick                        # runs/mine, without the pictures that need the dataset
    python report.py runs/mine --out /tmp/mine           # into another folder
    python report.py runs/a runs/b --out compare.png     # several runs in one picture, .png or .svg
    python report.py --index                             # runs/index.html: every run and comparison on one page
    python report.py --list --sort test_accuracy --where model.feed_forward=geglu    # the same as text

It reads the run folder and, without --quick, the dataset of the training. The page needs no network connection.
Each picture is written as PNG and SVG. train.py writes the quick page and the index when a run ends.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.display import printable
from common.errors import DatasetError, RunError, SettingsError
from common.output_files import check_output_file, check_output_folder, check_picture_suffix
from common.paths import RESULTS, RUNS, near_path
from config.catalog import SOURCES
from config.command_line import Parser, at_least_one, run_cli
from config.settings import Settings
from records.named_run import find_run
from records.own_part_files import kept_settings
from records.run_data import RunData
from records.run_folder import RunFolder

if TYPE_CHECKING:
    from image_data.dataset import Dataset
    from reports.pictures import SplitAnalysis

# The options that each task uses besides `run` and `--runs-dir`; any other is rejected rather than ignored.
USED = {
    "the page of one run": {"out", "split", "weights", "data_dir", "batch_size", "source"},
    "--quick": {"quick", "out"},
    "several runs": {"out"},
    "--index": {"index", "out", "results_dir"},
    "--list": {"list", "sort", "reverse", "where", "results_dir"},
}
NUM_MISTAKES = 24
NUM_ATTENTION = 5  # images with attention maps


def main() -> None:
    args = parse_arguments()
    if args.index or args.list:
        show_all(args)
        return
    runs = [RunData.read(find_run(name, args.runs_dir)) for name in args.runs or [None]]
    for run in runs:
        if not run.metrics:
            raise RunFolder(run.folder).no_epoch()
    if len(runs) > 1:
        compare(runs, args.out or args.runs_dir / "compare.png")
        return
    folder = output_folder(runs[0], args.out)
    draw(runs[0], None if args.quick else analyze(runs[0], args), folder)


def show_all(args: argparse.Namespace) -> None:
    """Write the page of all runs, or print their table."""
    from reports.index import read_rows, write_index
    from reports.run_list import list_text

    if args.list:
        print(list_text(read_rows(args.runs_dir, args.results_dir), args.sort, args.where, args.reverse))
        return
    if args.out:
        if args.out.suffix != ".html":
            raise SettingsError(f"--out of --index ends in .html, not '{args.out.suffix}'")
        check_output_file(args.out, "--out")
    print(f"page      {write_index(args.runs_dir, args.results_dir, args.out)}")


def output_folder(run: RunData, out: Path | None) -> Path:
    """Return the folder for page and pictures; create that of --out. Raises SettingsError where it is read-only."""
    if out is None:
        check_output_folder(run.folder, "the report goes into the run folder (another one: --out FOLDER)")
        return run.folder
    if out.suffix in (".png", ".svg") or out.is_file():
        raise SettingsError(f"--out of one run is a folder, not '{out}'. A picture needs several runs")
    check_output_folder(out if out.is_dir() else out.parent, f"--out {out}")
    out.mkdir(exist_ok=True)
    return out


def draw(run: RunData, analysis: SplitAnalysis | None, folder: Path) -> None:
    """Write the page and the pictures of one run."""
    from reports.page import write_page
    from reports.pictures import pictures_of
    from reports.style import save

    pictures = pictures_of(run, analysis)
    with suppress(OSError):  # the page links to this folder where it exists
        (folder / "pictures").mkdir(exist_ok=True)
    print(f"page      {near_path(write_page(run, analysis, pictures, folder))}")
    for picture in pictures:
        for suffix in ("png", "svg"):
            save(picture.figure, folder / "pictures" / f"{picture.name}.{suffix}")
    print(f"pictures  {near_path(folder)}/pictures/: {', '.join(picture.name for picture in pictures)}")


def compare(runs: list[RunData], path: Path) -> None:
    """Draw several runs in one picture, and print the result of each."""
    from reports.curves import several
    from reports.style import save

    check_picture_suffix(path, "--out of several runs")
    check_output_file(path, "--out")
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [os.path.relpath(run.folder) for run in runs]  # in the picture, which is shared: no absolute path
    for run, name in zip(runs, names, strict=True):
        print(printable(run.headline().replace(run.name, f"{name:{max(map(len, names))}}", 1)))
    print(f"picture   {near_path(save(several(runs, names), path))}")


def analyze(run: RunData, args: argparse.Namespace) -> SplitAnalysis | None:
    """Run the network on a split. Returns None, with a warning, where the dataset or the weights are missing."""
    from dali_pipeline import Batches
    from inference.evaluation import open_split
    from inference.trained_model import WEIGHTS, TrainedModel
    from parallel.process_group import pick_device
    from reports.pictures import SplitAnalysis
    from reports.predictions import mistakes, predict

    split = args.split or ("validation" if run.facts["hold_out"] else "test")
    device, precision = pick_device(), run.facts["precision"]
    source = dict(device=device, source=args.source or "auto", image_side=run.facts["settings"]["image_side"])
    try:
        trained = TrainedModel.open(run.folder)
        dataset = open_split(trained, split, args.data_dir)
        model = trained.network(args.weights or WEIGHTS, device, precision)
        batches = Batches(dataset, split, args.batch_size, **source)
    except (DatasetError, RunError) as error:
        if args.data_dir or args.split or args.weights or args.source:
            raise
        print(f"warning: only the pictures that need no dataset are drawn: {error}", file=sys.stderr)
        return None
    with closing(batches):
        check_fingerprint(dataset, run, args.out)
        found = predict(model, batches, precision == "autocast")
    return SplitAnalysis(
        split,
        found.confusion(len(dataset.classes)),
        mistakes(found, dataset, split, NUM_MISTAKES, **source),
        attention_of(run, model, dataset, split, source),
        found.calibration(),
    )


def check_fingerprint(dataset: Dataset, run: RunData, out: Path | None) -> None:
    """Warn about another dataset than that of the training. Raises DatasetError where its report would replace that."""
    if dataset.fingerprint == run.facts["dataset"]["fingerprint"]:
        return
    problem = "this is not the dataset of the training (its fingerprint differs)"
    if out is None:
        raise DatasetError(f"{problem}; add --out FOLDER for its report")
    print(f"warning: {problem}", file=sys.stderr)


def attention_of(
    run: RunData, model: Any, dataset: Dataset, split: str, source: dict[str, Any]
) -> tuple[Any, Any, list[str]] | str:
    """Return evenly spaced images of the split, their attention maps and classes; or the reason why there is no map."""
    import numpy as np

    from image_data.pixels import denormalize
    from reports.predictions import NoAttention, attention_maps, load_images

    settings, labels = Settings.from_dict(kept_settings(run.folder, run.facts)).model, dataset.splits[split].labels
    if settings.architecture != "vit":
        return f"Attention maps exist for the architecture vit only; this run uses {settings.architecture}."
    chosen = np.unique(np.linspace(0, len(labels) - 1, NUM_ATTENTION).astype(int))
    images = load_images(dataset, split, chosen, **source)
    try:
        maps = attention_maps(model, settings, images, run.facts["precision"] == "autocast")
    except NoAttention as reason:
        return str(reason)
    return denormalize(images, dataset.mean, dataset.std), maps, [dataset.classes[labels[at]] for at in chosen]


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        "python report.py [run ...]",
        "Write the report of a run (a page and pictures), or one picture that compares several runs.",
        example="python report.py runs/a runs/b --out compare.png",
    )
    parser.add_argument(
        "runs",
        nargs="*",
        type=Path,
        metavar="RUN",
        help="run folders or names of runs (default: the newest under runs/)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="PATH",
        help="of several runs the picture, .png or .svg (default: runs/compare.png); of one run the folder for page "
        "and pictures (default: the run folder); of --index the page (default: runs/index.html)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="leave out the pictures that need the dataset: accuracy by class, mistakes, attention maps",
    )
    parser.add_argument(
        "--split",
        choices=["test", "validation"],
        help="split to analyze (default: validation where the run has one, else test)",
    )
    parser.add_argument(
        "--weights", metavar="FILE", help="file in the run folder (default: weights.safetensors; or best.safetensors)"
    )
    parser.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="folder of the prepared dataset (default: that of the training)"
    )
    parser.add_argument(
        "--batch-size",
        type=at_least_one,
        default=500,
        metavar="N",
        help="images per batch; does not change the result (default: 500)",
    )
    parser.add_argument("--source", choices=SOURCES, help="reader of the images (default: auto)")
    parser.add_argument(
        "--runs-dir",
        type=Path,
        default=RUNS,
        metavar="DIR",
        help="folder of the runs, searched for names and for the newest run (default: runs)",
    )
    everything = parser.add_argument_group("all runs")
    everything.add_argument(
        "--index", action="store_true", help="write runs/index.html, one page with every run and every comparison"
    )
    everything.add_argument("--list", action="store_true", help="print the table of every run and every comparison")
    everything.add_argument(
        "--sort",
        metavar="COLUMN",
        help="of --list: largest number first, smallest loss first, newest date first, text from A to Z "
        "(default: date)",
    )
    everything.add_argument("--reverse", action="store_true", help="of --list: the other way round")
    everything.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="CONDITION",
        help="of --list: only these rows, such as model.feed_forward=geglu or 'test_accuracy>0.5'; = takes * and ?; "
        "repeat for more (default: all)",
    )
    everything.add_argument(
        "--results-dir",
        type=Path,
        default=RESULTS,
        metavar="DIR",
        help="folder of the reports of compare.py, of --index and --list (default: results)",
    )
    args = parser.parse_args()
    check_combination(parser, args)
    return args


def check_combination(parser: Parser, args: argparse.Namespace) -> None:
    """End with a sentence where options exclude each other. Raises SettingsError for one that does not apply."""
    if args.index and args.list:
        parser.error("--index and --list exclude each other; give one of them")
    if (args.index or args.list) and args.runs:
        parser.error(f"{'--index' if args.index else '--list'} is about all runs; leave out '{args.runs[0]}'")
    if (args.sort or args.where or args.reverse) and not args.list:
        parser.error("--sort, --where and --reverse belong to --list; add --list")
    if args.list and args.out:
        parser.error("--list prints to the screen; leave out --out, or write a page with --index")
    of_runs = "several runs" if len(args.runs) > 1 else "--quick" if args.quick else "the page of one run"
    task = "--index" if args.index else "--list" if args.list else of_runs
    parser.refuse_unused(args, {"runs", "runs_dir", *USED[task]}, task)


if __name__ == "__main__":
    sys.exit(run_cli(main))
