"""How good a run is: exact loss, top-1 and top-5 accuracy on the test split, per class, and what it confuses.

    python evaluate.py                              # the newest run
    python evaluate.py runs/mine --json result.json

Reads only the run folder and the dataset; needs no DeepSpeed, no GPU, and no particular number of processes. Under
torchrun the processes share the images, and the sums are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from run_record import RUNS, RunError, RunRecord, newest_run, write_atomically
from settings import Settings, SettingsError

HERE = Path(__file__).resolve().parent
SHOWN_CONFUSIONS = 10


def main() -> None:
    args = parse_arguments()
    if args.batch_size < 1:
        raise SettingsError(f"--batch-size must be at least 1, not {args.batch_size}")
    import torch

    from dali_pipeline import Batches
    from dataset import Dataset
    from parallel.processes import join

    record = RunRecord(args.run or newest_run(args.runs_dir))
    facts = record.facts()
    dataset = Dataset.open(args.data_dir or HERE / facts["dataset"]["folder"])
    check_same_classes(dataset.classes, facts["dataset"]["classes"])
    device = join()
    which, of_how_many = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    is_main = which == 0
    if args.split == "validation":
        if not facts["hold_out"]:
            raise RunError(f"{record.folder} held out no part of the training split; evaluate it on --split test")
        dataset = dataset.hold_out(facts["hold_out"])
    dataset = normalise_as_trained(dataset, facts["dataset"])
    precision = args.precision or facts["precision"]
    model = load_model(record.folder / args.weights, facts, device, precision)
    batches = Batches(dataset, args.split, args.batch_size, which, of_how_many, device=device, source=args.source,
                      image_side=facts["settings"]["image_side"])
    if is_main and dataset.fingerprint != facts["dataset"]["fingerprint"]:
        print("note: this is not the dataset that the run was trained on (its fingerprint differs)", file=sys.stderr)
    result = evaluate(model, batches, len(dataset.classes), device, autocast=precision == "autocast",
                      show=is_main and sys.stderr.isatty())
    batches.close()
    if is_main:
        report = describe(result, dataset.classes, args.split, record.folder.name, precision)
        print_report(report, args.per_class)
        from report import draw_confusion

        draw_confusion(result["confusion"], dataset.classes, record.folder / f"confusion_{args.split}.png",
                       f"{record.folder.name}: {100 * report['accuracy']:.2f}% on {args.split}")
        text = json.dumps(report, indent=2)
        write_atomically(record.folder / f"evaluation_{args.split}.json", text)
        if args.json:
            write_atomically(args.json, text)
    torch.distributed.barrier()  # a process that leaves early can abort the ones that are still leaving
    torch.distributed.destroy_process_group()


def load_model(weights: Path, facts: dict[str, Any], device: Any, precision: str) -> Any:
    """The network of a run with its weights, in evaluation mode. Safetensors hold numbers only: no code runs."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from model import build_model

    settings = Settings.from_dict(facts["settings"])
    side = settings.image_side or facts["dataset"]["image_side"]
    model = build_model(settings.model, len(facts["dataset"]["classes"]), side)
    try:
        model.load_state_dict(load_file(weights))
    except FileNotFoundError:
        raise RunError(f"{weights} does not exist; the run has not finished an epoch yet") from None
    except (SafetensorError, RuntimeError) as error:
        raise RunError(f"{weights} is damaged or of another network: {str(error).splitlines()[0]}") from None
    return model.to(device, torch.bfloat16 if precision == "bf16" else torch.float32).eval()


def evaluate(model: Any, batches: Any, num_classes: int, device: Any, autocast: bool, show: bool) -> dict[str, Any]:
    """Sums over the split, over all processes: `confusion` int64 (K, K) with rows true, `top5` int, `loss_sum` float."""
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from tqdm import tqdm

    dtype = next(model.parameters()).dtype
    confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=device)
    top5 = torch.zeros((), dtype=torch.int64, device=device)
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    precision = torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext()
    with torch.inference_mode(), precision:
        for images, labels in tqdm(batches.epoch(), total=len(batches), unit="batch", leave=False, disable=not show):
            scores, real = model(images.to(dtype)).float(), labels >= 0
            best = scores.topk(min(5, num_classes)).indices
            confusion += torch.bincount((labels * num_classes + best[:, 0])[real], minlength=num_classes**2)
            top5 += (best == labels[:, None]).sum()
            loss_sum += F.cross_entropy(scores, labels, ignore_index=-1, reduction="sum").double()
    for total in (confusion, top5, loss_sum):
        dist.all_reduce(total)
    return {"confusion": confusion.view(num_classes, num_classes).cpu().numpy(), "top5": top5.item(), "loss_sum": loss_sum.item()}


def describe(result: dict[str, Any], classes: list[str], split: str, run: str, precision: str) -> dict[str, Any]:
    """The report for programs, ready for JSON."""
    confusion = result["confusion"]
    seen, correct = int(confusion.sum()), int(np.trace(confusion))
    wrong = confusion - np.diag(np.diag(confusion))
    worst = np.argsort(-wrong, axis=None, kind="stable")[:SHOWN_CONFUSIONS]
    pairs = [divmod(int(i), len(classes)) for i in worst if wrong.flat[i]]
    return {
        "run": run, "split": split, "precision": precision,
        "correct": correct, "correct_top5": result["top5"], "seen": seen,
        "accuracy": correct / seen, "top5_accuracy": result["top5"] / seen, "loss": result["loss_sum"] / seen,
        "per_class": {name: {"correct": int(confusion[i, i]), "seen": int(confusion[i].sum())} for i, name in enumerate(classes)},
        "worst_confusions": [{"true": classes[t], "predicted": classes[p], "count": int(wrong[t, p])} for t, p in pairs],
    }


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


def check_same_classes(found: list[str], trained: list[str]) -> None:
    """Refuse a dataset whose labels mean something else than they did in training. Raises DatasetError."""
    from dataset import DatasetError

    if found != trained:
        odd = next((f"{a!r} instead of {b!r}" for a, b in zip(found, trained, strict=False) if a != b), f"{len(found)} instead of {len(trained)}")
        raise DatasetError(f"the dataset's classes are not the run's ({odd}); give the dataset it was trained on with --data-dir")


def normalise_as_trained(dataset: Any, trained: dict[str, Any]) -> Any:
    """The dataset with the mean and std that the network was trained with. Raises DatasetError for another image side."""
    from dataclasses import replace

    from dataset import DatasetError

    if dataset.image_side != trained["image_side"]:
        raise DatasetError(f"the dataset has images of side {dataset.image_side}, the run was trained on {trained['image_side']}")
    return replace(dataset, mean=tuple(trained["mean"]), std=tuple(trained["std"]))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Exact accuracy of a run on the test split.", allow_abbrev=False,
                                     epilog="example: python evaluate.py runs/mine --batch-size 1000 --json result.json")
    parser.add_argument("run", nargs="?", type=Path, help="a run folder (default: the newest under runs/)")
    parser.add_argument("--runs-dir", type=Path, default=RUNS, metavar="DIR", help="where to look for the newest run (default: runs)")
    parser.add_argument("--data-dir", type=Path, help="the prepared dataset (default: the one the run was trained on)")
    parser.add_argument("--batch-size", type=int, default=500, help="images at a time; no influence on the result (default: 500)")
    parser.add_argument("--split", default="test", choices=["test", "validation"], help="what to evaluate (default: test)")
    parser.add_argument("--weights", default="weights.safetensors", help="file in the run folder (default: weights.safetensors; or best.safetensors)")
    parser.add_argument("--precision", choices=["fp32", "bf16", "autocast"], help="default: what the run was trained in")
    parser.add_argument("--source", default="auto", choices=["auto", "resident", "files", "tensor"], help="how images are read (default: auto)")
    parser.add_argument("--per-class", action="store_true", help="show every class, not only the ten worst and ten best")
    parser.add_argument("--json", type=Path, help="also write the report here")
    return parser.parse_args()


def run() -> int:
    """`main` with the errors of the person's making as one line on the screen."""
    from dataset import DatasetError

    try:
        main()
    except (SettingsError, DatasetError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run())
