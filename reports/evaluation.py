"""The result of evaluate.py: what it prints, and what it writes into the run folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.display import printable
from common.errors import reason_of
from common.files import write_atomically
from inference.trained_model import TrainedModel

if TYPE_CHECKING:
    from inference.evaluation import SplitResult

SHOWN_AT_EACH_END = 10  # classes, without --per-class


def print_report(report: dict[str, Any], all_classes: bool) -> None:
    """Print accuracy by class, the most frequent confusions, and last the accuracy on the split."""
    rows = sorted(report["per_class"].items(), key=lambda item: item[1]["correct"] / max(1, item[1]["seen"]))
    n = SHOWN_AT_EACH_END
    shown = rows if all_classes or len(rows) <= 2 * n else rows[:n] + rows[-n:]
    print("class                      accuracy")
    for i, (name, counts) in enumerate(shown):
        if i == n and len(shown) < len(rows):
            print(f"  ... {len(rows) - 2 * n} more classes (--per-class shows all)")
        accuracy = 100 * counts["correct"] / max(1, counts["seen"])
        print(f"  {printable(name):24} {accuracy:6.2f}%  ({counts['correct']}/{counts['seen']})")
    print("most frequent confusions (true -> predicted)")
    for pair in report["worst_confusions"]:
        print(f"  {printable(pair['true'])} -> {printable(pair['predicted'])}: {pair['count']}")
    name = report["split"].capitalize()
    if "test_time_flip" in report:
        flipped = report["test_time_flip"]
        print(
            f"With test-time flip: {100 * flipped['accuracy']:.2f}% ({flipped['correct']}/{flipped['seen']}), "
            f"loss {flipped['loss']:.4f}; two predictions per image, so not comparable with the accuracy below"
        )
    print(f"{name} loss: {report['loss']:.4f}")
    print(f"{name} expected calibration error: {100 * report['expected_calibration_error']:.2f}%")
    if len(report["per_class"]) > 5:  # else always 100 %
        counts = f"({report['correct_top5']}/{report['seen']})"
        print(f"{name} top-5 accuracy: {100 * report['top5_accuracy']:.2f}% {counts}")
    print(f"{name} accuracy: {100 * report['accuracy']:.2f}% ({report['correct']}/{report['seen']})", flush=True)


def print_several(report: dict[str, Any]) -> None:
    """Print one row per run, then the soup and the ensemble."""
    rows = {**report["runs"], **{name: report[name] for name in ("soup", "ensemble") if name in report}}
    width = max(map(len, rows))
    print(f"{'':{width}}  {report['split']} accuracy          loss     ECE")
    for name, row in rows.items():
        counts = f"({row['correct']}/{row['seen']})"
        error = 100 * row["expected_calibration_error"]
        print(
            f"{printable(name):{width}}  {100 * row['accuracy']:6.2f}%  {counts:>14}  {row['loss']:.4f}  {error:5.2f}%"
        )
    sys.stdout.flush()


def save_report(trained: TrainedModel, report: dict[str, Any], result: SplitResult) -> None:
    """Write report, pictures and model card into the run folder.

    The result is on the screen already, so a file that cannot be written (a read-only folder) is one warning, and the
    other files are written nevertheless.
    """
    from inference.model_card import write_card
    from reports.calibration import reliability
    from reports.classes import confusion
    from reports.style import save

    folder, split = trained.record.folder, report["split"]
    name = printable(trained.name)
    title = f"{name}: {100 * report['accuracy']:.2f} % on {split}"

    def write_pictures() -> None:
        save(confusion(result.confusion, trained.classes, title), folder / f"confusion_{split}.png")
        save(reliability(result.calibration, f"{name}, {split}"), folder / f"reliability_{split}.png")

    write_optional(
        folder,
        lambda: write_atomically(folder / f"evaluation_{split}.json", json.dumps(report, indent=2)),
        write_pictures,
        lambda: write_card(trained.record),
    )


def write_optional(folder: Path, *writers: Callable[[], object]) -> bool:
    """Call every writer; print one warning where some of them fail. Returns whether all succeeded."""
    failed = []
    for writer in writers:
        try:
            writer()
        except Exception as error:  # a picture or a card is never worth the result
            failed.append(error)
    if failed:
        print(f"warning: not everything was written to {folder}: {reason_of(failed[0])}", file=sys.stderr)
    return not failed
