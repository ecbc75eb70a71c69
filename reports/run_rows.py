"""One row of the table of runs: a run folder, a comparison, or another folder, each read without ever failing.

A folder that is broken, half-written, from an older version or not a run at all is a row with a note that says why.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from config.differences import leaves
from config.settings import Settings

POINTS = 50  # of a curve: more are not distinguishable in a chart that overlays several runs
DATE = "%Y-%m-%d %H:%M"
MAX_TEXT = 200  # characters of a value
DAMAGED = "damaged"  # begins the note of a folder that cannot be read
FACTS = (  # of run.json, under their own names
    *("preset", "seed", "device", "precision", "num_parameters", "num_processes", "hold_out", "max_steps"),
    *("max_minutes", "patience", "init_weights", "synthetic", "deterministic", "commit", "uncommitted_changes"),
)
CURVES = (  # of metrics.jsonl
    *("test_accuracy", "validation_accuracy", "train_loss", "test_loss", "validation_loss"),
    *("test_raw_accuracy", "validation_raw_accuracy", "learning_rate", "images_per_second"),
)
SAME_SETTING = (  # facts of run.json that runs of one setting share
    *("hold_out", "max_steps", "max_minutes", "only_shortens"),
    *("patience", "init_weights", "synthetic", "precision"),
)
SUMS = ("training_seconds",)  # of all epochs; every other number of metrics.jsonl is that of the last epoch
FILES = ("run.json", "metrics.jsonl", "steps.jsonl", "evaluation_test.json", "report.html")  # that a row is read from

RUN, COMPARISON, OTHER = "run", "comparison", "other"


@dataclass
class Row:
    """One line of the table, ready for JSON.

    Attributes:
        path: of the folder, relative to the folder of all runs.
        values: column -> number, text or boolean.
        page: file that the name links to, relative to `path`; "" links to the folder.
        note: what is wrong with the folder.
        setting: the same for runs that differ in their seed only; "" where it is not known.
        curves: x values ("epoch", "step", "minutes") and one list of the same length per series, None where missing.
        variants: of a comparison, its variants with their results.
    """

    kind: str
    path: str
    values: dict[str, Any] = field(default_factory=dict)
    page: str = ""
    note: str = ""
    setting: str = ""
    curves: dict[str, list[float | None]] = field(default_factory=dict)
    variants: list[dict[str, Any]] = field(default_factory=list)


def read_row(kind: str, folder: Path, path: str, name: str) -> Row:
    """Return the row of a folder, called `name`; whatever goes wrong is its note."""
    row = Row(kind, path, {"name": name, "kind": kind, "date": _date_of(folder)})
    try:
        {RUN: _read_run, COMPARISON: _read_comparison, OTHER: _read_other}[kind](row, folder)
    except Exception as error:  # a folder may hold anything
        row.note = row.note or f"{DAMAGED}: {_reason(error)}"
    row.values = {key: _plain(value) for key, value in row.values.items() if value is not None}
    return row


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return f"{type(error).__name__}: {error}"[:MAX_TEXT]


def _date_of(folder: Path) -> str | None:
    """Return when the folder's first record was written: the start of a run that records no date in run.json."""
    for path in (folder / "run.json", folder / "report.json", folder):
        try:
            return datetime.fromtimestamp(path.stat().st_mtime).strftime(DATE)
        except OSError:
            continue
    return None


def _plain(value: Any) -> Any:
    """Return a value as a finite number, a boolean or a short text."""
    if isinstance(value, bool) or (isinstance(value, (int, float)) and math.isfinite(value)):
        return value
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


# --- runs -----------------------------------------------------------------------------------------------------------


def _read_run(row: Row, folder: Path) -> None:
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    if not isinstance(facts, dict):
        raise ValueError("run.json is not a JSON object")
    if (folder / "report.html").is_file():
        row.page = "report.html"
    row.values["state"] = "unfinished"
    values = row.values
    values |= {key: facts.get(key) for key in FACTS}
    if isinstance(facts.get("started"), str):
        values["date"] = datetime.fromisoformat(facts["started"]).astimezone().strftime(DATE)
    values["preset"] = Path(str(facts.get("preset") or "")).stem or None
    values["commit"] = str(facts["commit"])[:10] if facts.get("commit") else None
    values["code"] = _short_digest(_group(facts, "code").get("fingerprint"))
    dataset = _group(facts, "dataset")
    values |= {"dataset": dataset.get("name"), "dataset_fingerprint": _short_digest(dataset.get("fingerprint"))}
    values |= {f"versions.{name}": version for name, version in _group(facts, "versions").items()}
    settings = settings_of(_group(facts, "settings"))
    if not settings:
        row.note = "run.json has no settings: written by another program or an old version"
    values |= settings
    _read_metrics(row, folder, facts)
    _read_evaluation(row, folder)
    if settings:
        same = [settings, dataset.get("fingerprint"), values["code"], *(facts.get(key) for key in SAME_SETTING)]
        row.setting = hashlib.sha256(json.dumps(same, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _group(tree: dict[str, Any], key: str) -> dict[str, Any]:
    value = tree.get(key)
    return value if isinstance(value, dict) else {}


def _short_digest(digest: Any) -> str | None:
    return str(digest).removeprefix("sha256:")[:10] if digest else None


def settings_of(tree: dict[str, Any]) -> dict[str, Any]:
    """Return path -> value as `--set` names them; a setting that is newer than the run has its default."""
    found = {path.removeprefix("engine."): value for path, value in leaves(tree) if path and value != {}}
    return {**default_settings(), **found} if found else {}


@cache
def default_settings() -> dict[str, Any]:
    """Return the defaults of the settings that every run has: those of an optimizer belong to that optimizer."""
    tree = Settings().as_dict()
    tree.pop("engine", None)
    return {path: value for path, value in leaves(tree) if value != {} and "_options." not in path}


def _read_metrics(row: Row, folder: Path, facts: dict[str, Any]) -> None:
    lines, broken = read_intact_lines(folder / "metrics.jsonl")
    if broken:
        row.note = f"metrics.jsonl: {broken} unreadable line{'s' if broken > 1 else ''} left out"
    if not lines:
        row.note = row.note or "no epoch finished yet"
    else:
        last = lines[-1]
        row.values |= {key: value for key, value in last.items() if _is_number(value)}
        row.values |= {key: sum(_numbers(lines, key)) for key in SUMS if key in last}
        is_done = last.get("ended_early") or last["step"] >= facts.get("total_steps", math.inf)
        row.values["state"] = "finished" if is_done else "unfinished"
    steps_per_epoch = facts.get("steps_per_epoch")
    if isinstance(steps_per_epoch, (int, float)) and steps_per_epoch > 0:
        row.curves = curves_of(lines, read_intact_lines(folder / "steps.jsonl")[0], steps_per_epoch)


def _read_evaluation(row: Row, folder: Path) -> None:
    """Add the result of evaluate.py, which may be that of other weights than those of the last epoch."""
    path = folder / "evaluation_test.json"
    if not path.is_file():
        return
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        row.values["evaluated_test_accuracy"] = float(report["accuracy"])
    except (ValueError, KeyError, TypeError):
        row.note = row.note or "evaluation_test.json is not readable"


def read_intact_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the objects with a step of a JSON-lines file, and the number of broken lines except a last torn one."""
    if not path.is_file():
        return [], 0
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if line.strip()]
    try:  # one call of the parser for a whole file takes a third of the time
        parsed = json.loads("[" + ",".join(lines) + "]")
    except ValueError:
        parsed = [_parse(line) for line in lines]
    intact = [line for line in parsed if isinstance(line, dict) and _is_number(line.get("step"))]
    return intact, len(parsed) - len(intact)


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _numbers(lines: list[dict[str, Any]], key: str) -> list[float]:
    return [line[key] for line in lines if _is_number(line.get(key))]


def curves_of(
    lines: list[dict[str, Any]], steps: list[dict[str, Any]], steps_per_epoch: float
) -> dict[str, list[float | None]]:
    """Return the series of the epochs, thinned to POINTS, and the training loss by step, averaged to POINTS bins."""
    found: dict[str, list[float | None]] = {}
    if lines:
        kept = thin(len(lines))
        seconds = np.cumsum(
            [line["training_seconds"] if _is_number(line.get("training_seconds")) else 0 for line in lines]
        )
        found["step"] = [lines[i]["step"] for i in kept]
        found["epoch"] = [_rounded(lines[i]["step"] / steps_per_epoch) for i in kept]
        found["minutes"] = [_rounded(float(seconds[i]) / 60) for i in kept]
        for key in CURVES:
            values = [_rounded(lines[i].get(key)) for i in kept]
            if any(value is not None for value in values):
                found[key] = values
    losses = [(line["step"], line["step_loss"]) for line in steps if _is_number(line.get("step_loss"))]
    if losses:
        parts = [part for part in np.array_split(np.array(losses, dtype=float), min(POINTS, len(losses))) if len(part)]
        found["step_loss_epoch"] = [_rounded(float(part[:, 0].mean()) / steps_per_epoch) for part in parts]
        found["step_loss"] = [_rounded(float(part[:, 1].mean())) for part in parts]
    return found


def thin(count: int) -> list[int]:
    """Return at most POINTS evenly spaced positions out of `count`, the first and the last among them."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, POINTS))})


def _rounded(value: Any) -> float | None:
    return float(f"{value:.4g}") if _is_number(value) else None


# --- comparisons and other folders ----------------------------------------------------------------------------------


def _read_comparison(row: Row, folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    split = list(report["results"])[-1]  # with --final, the last one is the test split
    rows = report["results"][split]
    row.page = "report.md" if (folder / "report.md").is_file() else "report.json"
    row.variants = [
        {
            "name": one["arm"],
            "n": one["n"],
            "mean": _share(one["mean"]),
            "sd": _share(one["sd"]),
            "verdict": (one.get("difference") or {}).get("verdict") or ("" if i else "reference"),
        }
        for i, one in enumerate(rows)
    ]
    best = max((one for one in row.variants if one["mean"] is not None), key=lambda one: one["mean"], default=None)
    row.values |= {
        "state": "finished" if not report.get("missing") else "unfinished",
        "question": report.get("question"),
        "variants": len(rows),
        "runs": sum(one["n"] for one in rows),
        "best_variant": best["name"] if best else None,
        f"{split}_accuracy": best["mean"] if best else None,
        "dataset": _group(report, "dataset").get("name"),
        "hold_out": report.get("hold_out"),
        "commit": str(report.get("commit_of_report") or "")[:10] or None,
    }


def _share(points: float | None) -> float | None:
    """Return points as a fraction, the unit of metrics.jsonl."""
    return None if points is None else _rounded(points / 100)


def _read_other(row: Row, folder: Path) -> None:
    files = sorted(os.listdir(folder))
    unfinished = "lock" in files or any(file.startswith("run.json.") for file in files)
    row.note = "run.json is missing: a run that has not started" if unfinished else "not a run folder: no run.json"
    if not files:
        row.note = "empty folder"
