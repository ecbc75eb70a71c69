"""The report of a run, `report.html`: settings, metrics, pictures and predictions in one file.

The page needs no other file, no script and no network connection.
"""

from __future__ import annotations

import json
import os
import shlex
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from common.display import printable
from common.files import write_atomically
from common.paths import PROJECT
from common.text import duration, epochs_text, precision_text
from config.differences import changed_settings, leaves
from records.provenance import commit_text
from records.run_data import RunData
from reports.pictures import Picture, SplitAnalysis, pictures_of
from reports.style import embed

CSS = PROJECT / "reports" / "page.css"
FILES = {
    "run.json": "settings, command, commit, versions",
    "metrics.jsonl": "one line per evaluation, by default per epoch",
    "steps.jsonl": "training loss by step, with --log-gradients also gradient norms",
    "utilisation.jsonl": "GPU load, CPU load and memory",
    "curves.png": "loss and accuracy",
    "weights.safetensors": "weights after the last epoch, fp32",
    "best.safetensors": "weights of the best validation accuracy",
    "tensorboard": "TensorBoard event files",
    "profile": "of --profile: trace.json.gz for https://ui.perfetto.dev, operations.txt, memory.png",
    "evaluation_test.json": "result of evaluate.py",
    "pictures": "the pictures of this page, PNG and SVG",
}

COLUMNS = [  # of the table of epochs: key in metrics.jsonl, head, factor, digits
    ("epoch", "epoch", 1, 0),
    ("step", "step", 1, 0),
    ("train_loss", "train loss", 1, 3),
    *(
        (f"{split}_{weights}{key}", f"{split} {head}{of}", factor, digits)
        for split in ("validation", "test")
        for weights, of in (("", ""), ("raw_", ", raw weights"))
        for key, head, factor, digits in (
            ("loss", "loss", 1, 3),
            ("accuracy", "%", 100, 2),
            ("top5_accuracy", "top-5 %", 100, 2),
        )
    ),
    ("learning_rate", "learning rate", 1, 6),
    ("images_per_second", "images/s", 1, 0),
    ("training_seconds", "training s", 1, 1),
    ("data_wait_seconds", "data wait s", 1, 1),
    ("tracking_seconds", "logging s", 1, 2),
    ("memory_gib", "memory GiB", 1, 2),
]


def write_page(
    run: RunData,
    analysis: SplitAnalysis | None = None,
    pictures: list[Picture] | None = None,
    folder: Path | None = None,
) -> Path:
    """Write `report.html` and return its path.

    Args:
        pictures: those of `pictures_of`, where they are made already.
        folder: where to write it; the run folder by default.

    Raises:
        RunError: the file cannot be written.
    """
    folder = folder or run.folder
    path = folder / "report.html"
    write_atomically(path, page(run, analysis, pictures_of(run, analysis) if pictures is None else pictures, folder))
    return path


def page(run: RunData, analysis: SplitAnalysis | None, pictures: list[Picture], folder: Path | None = None) -> str:
    """Return the HTML text of the page, whose links are relative to `folder` (by default the run folder)."""
    figures = "".join(map(_figure, pictures)) + _notes(analysis)
    sections = {"Pictures": figures, "Metrics by epoch": _epochs(run)}
    if analysis:
        sections["Accuracy by class"] = _classes(run, analysis)
    if (operations := run.folder / "profile" / "operations.txt").is_file():
        sections["Profile"] = f"<pre>{_text(operations.read_text())}</pre>"
    sections |= {"Provenance": _provenance(run), "Settings": _settings(run), "Files": _files(run, folder or run.folder)}
    links = "".join(f'<a href="#{_anchor(name)}">{name}</a>' for name in sections)
    body = "".join(
        f'<section id="{_anchor(name)}"><h2>{name}</h2>{text}</section>\n' for name, text in sections.items()
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(run.name)}</title>\n<style>\n{CSS.read_text()}</style></head>\n<body>\n"
        f"<header><h1>{_text(run.name)}</h1><p>{_summary(run)}</p><nav>{links}</nav></header>\n"
        f"{_numbers(run)}\n{body}</body></html>\n"
    )


def _text(value: Any) -> str:
    """Return a value as HTML text without control characters or markup."""
    return escape(printable(str(value)))


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _summary(run: RunData) -> str:
    facts, model = run.facts, run.facts["settings"]["model"]
    what = (
        f"vit, {model['attention']} attention, {model['feed_forward']} feed-forward"
        if model["architecture"] == "vit"
        else model["architecture"]
    )
    size = f", {facts['num_parameters']:,} parameters" if "num_parameters" in facts else ""
    return _text(
        f"{what}{size}, on {facts['dataset']['name']} ({run.num_classes} classes); "
        f"preset {Path(facts['preset']).stem}, "
        f"strategy {facts['settings']['strategy']} on {facts['num_processes']} x {facts['device']}, "
        f"{precision_text(facts['precision'])}."
    )


def _numbers(run: RunData) -> str:
    """Return the results in large type."""
    if not run.metrics:
        return "<p>No epoch is finished yet.</p>"
    last = run.metrics[-1]
    shown = []
    for split in ("test", "validation"):
        if f"{split}_accuracy" in last:
            counts = f"{last[f'{split}_correct']:,} of {last[f'{split}_seen']:,}" if f"{split}_correct" in last else ""
            shown.append((f"{100 * last[f'{split}_accuracy']:.2f}%", f"{split} accuracy, {counts}"))
            if run.has_top5:
                shown.append((f"{100 * last[f'{split}_top5_accuracy']:.2f}%", f"{split} accuracy, top-5"))
    seconds = sum(line["training_seconds"] for line in run.metrics)
    images_seen = sum(line["images_per_second"] * line["training_seconds"] for line in run.metrics)
    trained, _, unit = epochs_text(last["step"], run.facts["steps_per_epoch"]).partition(" ")
    planned, _, _ = epochs_text(run.facts["total_steps"], run.facts["steps_per_epoch"]).partition(" ")
    shown += [
        (f"{trained} of {planned}", "epochs") if last["step"] < run.facts["total_steps"] else (trained, unit),
        (duration(seconds), "training time"),
        (f"{images_seen / (seconds or 1.0):,.0f}", "images/s"),
    ]
    items = "".join(f"<li><b>{escape(value)}</b> {escape(what)}</li>" for value, what in shown)
    return f'<ul class="numbers">{items}</ul>'


def _figure(picture: Picture) -> str:
    caption = f"<figcaption>{_text(picture.caption)}</figcaption>" if picture.caption else ""
    title = " ".join((picture.figure.get_suptitle() or picture.name).split())
    return f'<figure><img alt="{_text(title)}" src="{embed(picture.figure)}">{caption}</figure>\n'


def _notes(analysis: SplitAnalysis | None) -> str:
    if analysis is None:
        return (
            '<p class="faint">Accuracy by class, misclassified images and attention maps need the dataset: '
            "<code>python report.py</code> with the folder of this run adds them.</p>"
        )
    return f'<p class="faint">{_text(analysis.attention)}</p>' if isinstance(analysis.attention, str) else ""


def _table(head: list[str], rows: list[list[Any]], numbers: bool = False) -> str:
    """Return an HTML table. Columns of numbers are right-aligned; with `numbers`, all columns are."""
    numeric = [numbers or all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(head))]
    mark = [' class="number"' if is_number else "" for is_number in numeric]
    top = "".join(f"<th{mark[i]}>{_text(name)}</th>" for i, name in enumerate(head))
    body = "".join(
        "<tr>" + "".join(f"<td{mark[i]}>{_text(value)}</td>" for i, value in enumerate(row)) + "</tr>\n" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table></div>'


def _epochs(run: RunData) -> str:
    """Return the table of epochs with the columns that at least one line has."""
    shown = [
        (key, head, factor, digits)
        for key, head, factor, digits in COLUMNS
        if any(key in line for line in run.metrics) and (run.has_top5 or "top5" not in key)
    ]
    rows = [
        [f"{factor * line[key]:,.{digits}f}" if key in line else "" for key, _, factor, digits in shown]
        for line in run.metrics
    ]
    return _table([head for _, head, _, _ in shown], rows, numbers=True)


def _classes(run: RunData, analysis: SplitAnalysis) -> str:
    names, matrix = run.facts["dataset"]["classes"], analysis.confusion
    counts, correct = matrix.sum(axis=1), np.diag(matrix)
    wrong = matrix - np.diag(correct)
    rows = []
    for label in np.argsort(correct / np.maximum(1, counts), kind="stable"):
        other = int(wrong[label].argmax())
        most = f"{names[other]} ({wrong[label, other]})" if wrong[label, other] else ""
        accuracy = round(100 * correct[label] / max(1, counts[label]), 2)
        rows.append([names[label], accuracy, int(correct[label]), int(counts[label]), most])
    return _table(["class", "accuracy (%)", "correct", "images", "most frequent confusion"], rows)


def _provenance(run: RunData) -> str:
    facts, data = run.facts, run.facts["dataset"]
    counts = ", ".join(f"{count:,} {name}" for name, count in data["num_images"].items())
    rows = [
        ["commit", commit_text(facts)],
        ["seed", str(facts["seed"])],
        ["dataset", f"{data['name']}, {data['fingerprint']}, {counts}"],
        ["device", f"{facts['num_processes']} x {facts['device']}, {precision_text(facts['precision'])}"],
        ["batch", ", ".join(f"{name} {value}" for name, value in facts["batch"].items())],
        ["steps", f"{facts['steps_per_epoch']:,} per epoch, {facts['total_steps']:,} in total"],
        ["versions", ", ".join(f"{name} {version}" for name, version in facts["versions"].items())],
    ]
    return f"<pre>{_text(shlex.join(['python', *facts['command']]))}</pre>" + _table(["", ""], rows)


def _settings(run: RunData) -> str:
    rows = [
        [path, json.dumps(value), json.dumps(default)]
        for path, value, default in changed_settings(run.facts["settings"])
    ]
    everything = [[path, json.dumps(value)] for path, value in leaves(run.facts["settings"])]
    return (
        f"<p>Settings that differ from the defaults ({len(rows)}):</p>"
        + _table(["setting", "this run", "default"], rows)
        + f"<details><summary>All {len(everything)} settings</summary>"
        + f"{_table(['setting', 'value'], everything)}</details>"
    )


def _files(run: RunData, folder: Path) -> str:
    rows = ""
    for name, what in FILES.items():
        path = folder / name if (folder / name).exists() else run.folder / name
        if path.exists():
            link = quote(os.path.relpath(path, folder))
            rows += f'<li><a href="{link}">{name}</a> <span class="faint">{what}</span></li>'
    return f"<ul>{rows}</ul>"
