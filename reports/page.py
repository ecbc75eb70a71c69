"""One page a run, `report.html`: what it was, how it went, what the network knows. It needs no other file and no network."""

from __future__ import annotations

import json
import shlex
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from common.files import write_atomically
from common.paths import PROJECT
from common.text import duration
from config.differences import changed_settings, leaves
from records.run_data import RunData
from reports.pictures import Picture, SplitAnalysis, pictures_of
from reports.style import embed

CSS = PROJECT / "reports" / "page.css"
FILES = {
    "run.json": "settings, command, commit, versions",
    "metrics.jsonl": "a line an epoch",
    "steps.jsonl": "training loss by step",
    "utilisation.jsonl": "GPU, CPU and memory",
    "curves.png": "loss and accuracy",
    "weights.safetensors": "the weights, fp32",
    "best.safetensors": "the weights that were best on the held-out part",
    "tensorboard": "TensorBoard's event files",
    "evaluation_test.json": "what evaluate.py counted",
    "pictures": "the pictures of this page, PNG and SVG",
}

COLUMNS = [  # of the table of epochs: key in metrics.jsonl, head, factor, digits
    ("epoch", "epoch", 1, 0),
    ("train_loss", "train loss", 1, 3),
    *(
        (f"{split}_{weights}{key}", f"{name} {head}{of}", factor, digits)
        for split, name in (("validation", "held-out"), ("test", "test"))
        for weights, of in (("", ""), ("raw_", ", trained weights"))
        for key, head, factor, digits in (
            ("loss", "loss", 1, 3),
            ("accuracy", "%", 100, 2),
            ("top5_accuracy", "top 5 %", 100, 2),
        )
    ),
    ("learning_rate", "learning rate", 1, 6),
    ("images_per_second", "images/s", 1, 0),
    ("training_seconds", "training s", 1, 1),
    ("data_wait_seconds", "data wait s", 1, 1),
    ("tracking_seconds", "watching s", 1, 2),
    ("memory_gib", "memory GiB", 1, 2),
]


def write_page(run: RunData, seen: SplitAnalysis | None = None, pictures: list[Picture] | None = None) -> Path:
    """Write `report.html` into the run folder. `pictures`: those of `pictures_of`, where they are made already."""
    path = run.folder / "report.html"
    write_atomically(path, page(run, seen, pictures_of(run, seen) if pictures is None else pictures))
    return path


def page(run: RunData, seen: SplitAnalysis | None, pictures: list[Picture]) -> str:
    """The page's text."""
    sections = {"Pictures": "".join(map(_figure, pictures)) + _notes(seen), "Every epoch": _epochs(run)}
    if seen:
        sections["Every class"] = _classes(run, seen)
    sections |= {"What was run": _provenance(run), "Settings": _settings(run), "Files": _files(run)}
    links = "".join(f'<a href="#{_anchor(name)}">{name}</a>' for name in sections)
    body = "".join(
        f'<section id="{_anchor(name)}"><h2>{name}</h2>{text}</section>\n' for name, text in sections.items()
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(run.name)}</title>\n<style>\n{CSS.read_text()}</style></head>\n<body>\n"
        f"<header><h1>{escape(run.name)}</h1><p>{_sentence(run)}</p><nav>{links}</nav></header>\n{_numbers(run)}\n{body}</body></html>\n"
    )


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _sentence(run: RunData) -> str:
    facts, model = run.facts, run.facts["settings"]["model"]
    what = (
        f"vit, {model['attention']} attention, {model['feed_forward']} feed-forward"
        if model["architecture"] == "vit"
        else model["architecture"]
    )
    size = f", {facts['num_parameters']:,} parameters" if "num_parameters" in facts else ""
    return escape(
        f"{what}{size}, on {facts['dataset']['name']} ({run.num_classes} classes); preset {Path(facts['preset']).stem}, "
        f"strategy {facts['settings']['strategy']} on {facts['num_processes']} x {facts['device']}, {facts['precision']}."
    )


def _numbers(run: RunData) -> str:
    """The result, in large."""
    if not run.metrics:
        return "<p>No epoch is finished yet.</p>"
    last = run.metrics[-1]
    shown = []
    for split, name in (("test", "test"), ("validation", "held-out")):
        if f"{split}_accuracy" in last:
            counts = f"{last[f'{split}_correct']:,} of {last[f'{split}_seen']:,}" if f"{split}_correct" in last else ""
            shown.append((f"{100 * last[f'{split}_accuracy']:.2f}%", f"{name} accuracy, {counts}"))
            shown.append((f"{100 * last[f'{split}_top5_accuracy']:.2f}%", f"{name}, top 5"))
    seconds = sum(line["training_seconds"] for line in run.metrics)
    images_seen = sum(line["images_per_second"] * line["training_seconds"] for line in run.metrics)
    epochs = run.facts["settings"]["epochs"]
    shown += [
        (f"{last['epoch']} of {epochs}" if last["step"] < run.facts["total_steps"] else str(last["epoch"]), "epochs"),
        (duration(seconds), "of training"),
        (f"{images_seen / seconds:,.0f}", "images a second"),
    ]
    return (
        '<ul class="numbers">'
        + "".join(f"<li><b>{escape(value)}</b> {escape(what)}</li>" for value, what in shown)
        + "</ul>"
    )


def _figure(picture: Picture) -> str:
    caption = f"<figcaption>{escape(picture.caption)}</figcaption>" if picture.caption else ""
    title = picture.figure.get_suptitle() or picture.name
    return f'<figure><img alt="{escape(title)}" src="{embed(picture.figure)}">{caption}</figure>\n'


def _notes(seen: SplitAnalysis | None) -> str:
    if seen is None:
        return (
            '<p class="faint">Classes, mistakes and attention need the dataset: <code>python report.py</code> with this run\'s folder '
            "adds them.</p>"
        )
    return f'<p class="faint">{escape(seen.attention)}</p>' if isinstance(seen.attention, str) else ""


def _table(head: list[str], rows: list[list[Any]], numbers: bool = False) -> str:
    """Columns of numbers stand to the right; with `numbers` all are such."""
    numeric = [numbers or all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(head))]
    mark = [' class="number"' if is_number else "" for is_number in numeric]
    top = "".join(f"<th{mark[i]}>{escape(name)}</th>" for i, name in enumerate(head))
    body = "".join(
        "<tr>" + "".join(f"<td{mark[i]}>{escape(str(value))}</td>" for i, value in enumerate(row)) + "</tr>\n"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table></div>'


def _epochs(run: RunData) -> str:
    """The columns that some line has; everything else is in metrics.jsonl."""
    shown = [
        (key, head, factor, digits) for key, head, factor, digits in COLUMNS if any(key in line for line in run.metrics)
    ]
    rows = [
        [f"{factor * line[key]:,.{digits}f}" if key in line else "" for key, _, factor, digits in shown]
        for line in run.metrics
    ]
    return _table([head for _, head, _, _ in shown], rows, numbers=True)


def _classes(run: RunData, seen: SplitAnalysis) -> str:
    names, matrix = run.facts["dataset"]["classes"], seen.confusion
    counts, correct = matrix.sum(axis=1), np.diag(matrix)
    wrong = matrix - np.diag(correct)
    rows = []
    for label in np.argsort(correct / np.maximum(1, counts), kind="stable"):
        other = int(wrong[label].argmax())
        most = f"{names[other]} ({wrong[label, other]})" if wrong[label, other] else ""
        rows.append(
            [
                names[label],
                round(100 * correct[label] / max(1, counts[label]), 2),
                int(correct[label]),
                int(counts[label]),
                most,
            ]
        )
    return _table(["class", "accuracy (%)", "correct", "seen", "most often taken for"], rows)


def _provenance(run: RunData) -> str:
    facts, data = run.facts, run.facts["dataset"]
    dirty = ", with uncommitted changes" if facts["uncommitted_changes"] else ""
    rows = [
        ["commit", facts["commit"] + dirty],
        ["seed", str(facts["seed"])],
        [
            "dataset",
            f"{data['name']}, {data['fingerprint']}, "
            + ", ".join(f"{count:,} {name}" for name, count in data["num_images"].items()),
        ],
        ["device", f"{facts['num_processes']} x {facts['device']}, {facts['precision']}"],
        ["batch", ", ".join(f"{name} {value}" for name, value in facts["batch"].items())],
        ["steps", f"{facts['steps_per_epoch']:,} an epoch, {facts['total_steps']:,} in all"],
        ["versions", ", ".join(f"{name} {version}" for name, version in facts["versions"].items())],
    ]
    return f"<pre>{escape(shlex.join(['python', *facts['command']]))}</pre>" + _table(["", ""], rows)


def _settings(run: RunData) -> str:
    rows = [
        [path, json.dumps(value), json.dumps(default)]
        for path, value, default in changed_settings(run.facts["settings"])
    ]
    everything = [[path, json.dumps(value)] for path, value in leaves(run.facts["settings"])]
    return (
        f"<p>What is not the default ({len(rows)} settings):</p>"
        + _table(["setting", "this run", "default"], rows)
        + f"<details><summary>All {len(everything)} settings</summary>{_table(['setting', 'value'], everything)}</details>"
    )


def _files(run: RunData) -> str:
    rows = "".join(
        f'<li><a href="{name}">{name}</a> <span class="faint">{what}</span></li>'
        for name, what in FILES.items()
        if (run.folder / name).exists()
    )
    return f"<ul>{rows}</ul>"
