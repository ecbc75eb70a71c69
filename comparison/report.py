"""What the runs of a comparison gave, as a report: `report.md`, `report.json` and pictures.

Only finished runs count, at their last epoch. Without `final` the counts on the test split, which `train.py` makes once at the
end of a run and keeps in the run folder, are dropped as the file is read: nothing here can use or show them.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.files import write_atomically
from common.machine import cpu_name
from common.text import without_paths
from comparison.experiment import Experiment
from comparison.run_queue import PlannedRun
from comparison.significance import Difference, compare, power_note
from config.differences import differences
from models.cost import Cost
from records.provenance import provenance
from records.run_folder import RunFolder
from reports.style import save
from reports.variants import accuracy_against, variant_accuracy, variant_curves

SAMPLES_TOLERANCE = 0.01  # arms of different batch sizes drop different last batches
SECONDS_TOLERANCE = 0.1  # of a budget in seconds
MARK = r"\*"  # of an arm that was not treated as the first one
SPLITS = {"validation": "held-out part of train", "test": "test split"}


@dataclass(frozen=True)
class Run:
    """A finished run: run.json, and the lines of metrics.jsonl without what must not be seen."""

    seed: int
    facts: dict[str, Any]
    lines: list[dict[str, Any]]

    def accuracy(self, split: str) -> float:
        """At the last epoch, in points."""
        return 100 * self.lines[-1][f"{split}_accuracy"]

    @property
    def samples(self) -> int:
        return self.lines[-1]["step"] * self.facts["batch"]["total"]

    @property
    def training_seconds(self) -> float:
        return sum(line["training_seconds"] for line in self.lines)

    @property
    def images_per_second(self) -> float:
        return sum(line["images_per_second"] * line["training_seconds"] for line in self.lines) / self.training_seconds


@dataclass(frozen=True)
class VariantResult:
    """An arm with its finished runs, and what was not equal to the first arm's."""

    name: str
    idea: str
    cost: Cost
    runs: list[Run]
    unequal: list[str]

    def accuracies(self, split: str) -> dict[int, float]:
        return {run.seed: run.accuracy(split) for run in self.runs}


def load(task: PlannedRun, seed: int, final: bool) -> Run | None:
    """The run of a task, if it is finished."""
    if task.state() != "finished":
        return None
    record = RunFolder(task.folder)
    lines = [
        {key: value for key, value in line.items() if final or not key.startswith("test_")} for line in record.metrics()
    ]
    return Run(seed, record.facts(), lines)


def variant_results(
    experiment: Experiment, costs: list[Cost], tasks: dict[tuple[str, int], PlannedRun], final: bool
) -> list[VariantResult]:
    """All arms in the order of the file; equality is to the first of them."""
    results: list[VariantResult] = []
    for arm, cost in zip(experiment.variants, costs, strict=True):
        loaded = [
            load(tasks[arm.name, seed], seed, final) for seed in range(experiment.seeds) if (arm.name, seed) in tasks
        ]
        runs = [run for run in loaded if run is not None]
        reference = results[0].runs if results else runs
        results.append(VariantResult(arm.name, arm.idea, cost, runs, inequalities(runs, reference, experiment)))
    return results


def inequalities(runs: list[Run], reference: list[Run], experiment: Experiment) -> list[str]:
    """What keeps these runs from being a fair match for those of the first arm (which are compared among themselves)."""
    if not runs or not reference:
        return []
    first, texts = reference[0], []
    for what, of in EQUAL.items():
        others = sorted({str(of(run)) for run in runs if of(run) != of(first)})
        if others:
            texts.append(f"{what}: {', '.join(others)} instead of {of(first)}")
    samples = [run.samples for run in runs if abs(run.samples / first.samples - 1) > SAMPLES_TOLERANCE]
    if samples and experiment.budget != "seconds":
        texts.append(f"images trained on: {samples[0]:,} instead of {first.samples:,}")
    steps = [run.lines[-1]["step"] for run in runs if run.lines[-1]["step"] != first.lines[-1]["step"]]
    if steps and experiment.budget == "steps":
        texts.append(f"optimiser steps: {steps[0]:,} instead of {first.lines[-1]['step']:,}")
    if experiment.budget == "seconds":
        mean = float(np.mean([run.training_seconds for run in runs]))
        if abs(mean / experiment.budget_amount - 1) > SECONDS_TOLERANCE:
            texts.append(f"training seconds: {mean:.0f} on average instead of {experiment.budget_amount:g}")
    return texts


EQUAL = {
    "dataset": lambda run: run.facts["dataset"]["fingerprint"],
    "held-out part": lambda run: run.facts["hold_out"],
    "images counted": lambda run: [run.lines[-1].get(f"{split}_seen") for split in SPLITS],
    "commit": lambda run: run.facts["commit"],
    "uncommitted changes": lambda run: run.facts["uncommitted_changes"],
    "device": lambda run: (run.facts["device"], run.facts["num_processes"]),
    "versions": lambda run: run.facts["versions"],
}


def write(
    experiment: Experiment,
    results: list[VariantResult],
    missing: dict[str, str],
    folder: Path,
    final: bool,
    command: str,
) -> Path:
    """Write the report and its pictures; returns the path of report.md.

    Args:
        missing: runs that are not part of it, and why.
    """
    folder.mkdir(parents=True, exist_ok=True)
    exploring = "validation" if experiment.hold_out else "test"
    splits = [exploring] + (["test"] if final and exploring != "test" else [])
    compared = {
        split: compare({arm.name: arm.accuracies(split) for arm in results}, results[0].name) for split in splits
    }
    split = splits[-1]  # what the pictures show
    label = f"accuracy on the {SPLITS[split]} (%)"
    with_runs = [arm for arm in results if arm.runs]
    save(
        variant_accuracy(
            {arm.name: list(arm.accuracies(split).values()) for arm in with_runs}, experiment.question, label
        ),
        folder / "accuracy.png",
    )
    save(accuracy_against(_costs_of(with_runs, split), experiment.question, label), folder / "costs.png")
    save(
        variant_curves(
            {arm.name: _curves(arm, exploring) for arm in with_runs},
            experiment.question,
            f"accuracy on the {SPLITS[exploring]} (%)",
        ),
        folder / "curves.png",
    )
    facts = _facts(experiment, results, missing, final, command)
    rows = {split: [_row(arm, split, compared[split].get(arm.name)) for arm in results] for split in splits}
    report = {**facts, "results": rows}
    write_atomically(folder / "report.json", json.dumps(report, indent=2) + "\n")
    write_atomically(folder / "report.md", _markdown(experiment, report, results, splits, compared))
    return folder / "report.md"


def _facts(
    experiment: Experiment, results: list[VariantResult], missing: dict[str, str], final: bool, command: str
) -> dict[str, Any]:
    runs = [run for arm in results for run in arm.runs]
    here = provenance()
    of_run = runs[0].facts if runs else {}
    return {
        "question": experiment.question,
        "command": command,
        "final": final,
        "budget": {experiment.budget: experiment.budget_amount},
        "seeds": experiment.seeds,
        "hold_out": experiment.hold_out,
        "dataset": {key: of_run["dataset"][key] for key in ("name", "fingerprint", "num_images")} if runs else None,
        "commits": sorted({run.facts["commit"] for run in runs}),
        "uncommitted_changes": any(run.facts["uncommitted_changes"] for run in runs),
        "commit_of_report": here["commit"],
        "hardware": {"device": of_run.get("device"), "cpu": cpu_name(), "cores": len(os.sched_getaffinity(0))},
        "versions": of_run.get("versions", here["versions"]),
        "arms": {
            arm.name: {"idea": arm.idea, **asdict(arm.cost), "unequal": [without_paths(text) for text in arm.unequal]}
            for arm in results
        },
        "settings": {arm.name: arm.settings.as_dict() for arm in experiment.variants},
        "missing": {name: without_paths(reason) for name, reason in missing.items()},
    }


def _row(arm: VariantResult, split: str, difference: Difference | None) -> dict[str, Any]:
    accuracies = arm.accuracies(split)
    values = list(accuracies.values())
    return {
        "arm": arm.name,
        "n": len(values),
        "mean": float(np.mean(values)) if values else None,
        "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "by_seed": {str(seed): value for seed, value in accuracies.items()},
        "images_per_second": _speed(arm) if values else None,
        "training_seconds": float(np.mean([run.training_seconds for run in arm.runs])) if values else None,
        "difference": asdict(difference) if difference else None,
    }


def _costs_of(arms: list[VariantResult], split: str) -> dict[str, dict[str, Any]]:
    return {
        arm.name: {
            "accuracy": list(arm.accuracies(split).values()),
            "parameters": arm.cost.parameters / 1e6,
            "MFLOPs an image": arm.cost.flops / 1e6,
            "training seconds": float(np.mean([run.training_seconds for run in arm.runs])),
        }
        for arm in arms
    }


def _curves(arm: VariantResult, split: str) -> tuple[list[float], list[list[float]]]:
    """Epochs (fractions where the budget ended inside one), and the accuracies of every seed there."""
    epochs = [line["step"] / arm.runs[0].facts["steps_per_epoch"] for line in arm.runs[0].lines]
    return epochs, [
        [100 * line[f"{split}_accuracy"] for line in run.lines] for run in arm.runs if len(run.lines) == len(epochs)
    ]


def _markdown(
    experiment: Experiment,
    report: dict[str, Any],
    results: list[VariantResult],
    splits: list[str],
    compared: dict[str, dict[str, Difference]],
) -> str:
    text = [f"# {experiment.question}", "", f"Made by `{report['command']}`."]
    for split in reversed(splits):
        text += [
            "",
            f"## Answer on the {SPLITS[split]}",
            "",
            *_answers(results, compared[split]),
            "",
            *_table(report["results"][split], report["arms"], experiment),
        ]
    text += ["", "![accuracy by arm](accuracy.png)", "![accuracy against cost](costs.png)", "![curves](curves.png)"]
    unequal = [f"- **{arm.name}**{MARK} — {line}" for arm in results for line in report["arms"][arm.name]["unequal"]]
    equal = "Dataset, held-out part, budget, commit, device and versions were compared over all runs"
    text += [
        "",
        "## Were the arms treated alike?",
        "",
        *(
            [f"{equal}. Not equal to the first arm, and marked {MARK} above:", "", *unequal]
            if unequal
            else [f"{equal}: equal."]
        ),
    ]
    if report["missing"]:
        text += [
            "",
            "## Runs that are missing",
            "",
            *[f"- {name}: {reason}" for name, reason in report["missing"].items()],
        ]
    text += ["", "## The arms", "", *_arms(experiment)]
    text += ["", "## How to read this, and what it does not show", "", *_caveats(experiment, report, results, splits)]
    return "\n".join(text) + "\n"


def _answers(results: list[VariantResult], compared: dict[str, Difference]) -> list[str]:
    first, lines = results[0], []
    for arm in results[1:]:
        answer = (
            compared[arm.name].sentence
            if arm.name in compared
            else "cannot be compared: it shares no finished seed with the first arm"
        )
        costs = f"{arm.cost.parameters / first.cost.parameters:.2f} x the parameters, {arm.cost.flops / first.cost.flops:.2f} x the FLOPs"
        if arm.name in compared:
            costs += f", {_speed(arm) / _speed(first):.2f} x the images/s"
        lines.append(f"- **{arm.name}**{MARK if arm.unequal else ''} against {first.name}: {answer}. It has {costs}.")
    return lines


def _speed(arm: VariantResult) -> float:
    """Images a second in training, mean of the runs."""
    return float(np.mean([run.images_per_second for run in arm.runs]))


def _table(rows: list[dict[str, Any]], arms: dict[str, Any], experiment: Experiment) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    lines = [
        "| arm | n | mean % | sd | difference, 95% | p | p (Holm) | parameters | MFLOPs an image | images/s | training s |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        arm, d = arms[row["arm"]], row["difference"]
        against = f"{d['mean']:+.2f}" + (f" ± {d['half']:.2f}" if d["half"] is not None else "") if d else "–"
        lines.append(
            f"| {row['arm']}{MARK if arm['unequal'] else ''} | {row['n']} | {number(row['mean'], '.2f')} | {number(row['sd'], '.2f')} "
            f"| {against} | {number(d and d['p'], '.3f')} | {number(d and d['p_corrected'], '.3f')} | {arm['parameters']:,} "
            f"| {arm['flops'] / 1e6:,.2f} | {number(row['images_per_second'], ',.0f')} | {number(row['training_seconds'], ',.0f')} |"
        )
    return lines


def _arms(experiment: Experiment) -> list[str]:
    first, lines = experiment.variants[0], []
    for arm in experiment.variants:
        changed = [
            re.sub(r"^(\S+) was (.*), is (.*)$", r"`\1` \3 (not \2)", text)
            for text in differences(first.settings.as_dict(), arm.settings.as_dict())
        ]
        lines.append(f"- **{arm.name}**: {arm.idea}" + (f" Settings: {'; '.join(changed)}." if changed else ""))
    return lines


def _caveats(
    experiment: Experiment, report: dict[str, Any], results: list[VariantResult], splits: list[str]
) -> list[str]:
    runs = [run for arm in results for run in arm.runs]
    if not runs:
        return ["No run is finished."]
    first, hardware = runs[0], report["hardware"]
    device = first.facts["device"] if first.facts["device"] != "CPU" else "CPU only"
    lines = [
        "Accuracy is that of the last epoch, never of the best one. Differences are paired by seed; p is the exact two-sided permutation "
        "test over all signs; ± is half the 95% interval (paired t, not corrected for the number of arms). Holm: corrected for it.",
        "FLOPs: one image's forward pass, matrix products and convolutions only, multiply-adds counted as 2.",
    ]
    if note := power_note(experiment.seeds, len(experiment.variants)):
        lines.append(note[0].upper() + note[1:] + ".")
    for split in splits:
        counted, mean = first.lines[-1][f"{split}_seen"], np.mean([run.accuracy(split) for run in runs]) / 100
        lines.append(
            f"Every arm is counted on the same {counted:,} images of the {SPLITS[split]}. Other images would move an accuracy "
            f"(standard error about {100 * np.sqrt(mean * (1 - mean) / counted):.2f} points); the intervals do not contain that."
        )
    lines.append(
        "The test split was reported because of --final."
        if report["final"]
        else "The test split was neither used nor shown. train.py counts it once, at the end of a run, and writes that into the run "
        "folder; here it is dropped as the file is read. `--final` reports it, once all choices are made."
    )
    lines.append(
        f"It holds for this budget ({experiment.budget_amount:g} {experiment.budget}: {first.samples:,} images trained on), these sizes, one "
        "learning rate for all arms and one dataset; an arm may need another learning rate or a longer run to show what it can."
    )
    lines.append(
        f"Images/s and training seconds are of this machine ({device}; {hardware['cpu']}, {hardware['cores']} cores) and of what "
        "else ran on it."
    )
    dirty = ", with uncommitted changes" if report["uncommitted_changes"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines.append(
        f"Commit {', '.join(commit[:12] for commit in report['commits'])}{dirty}; {versions}; "
        f"dataset {report['dataset']['name']} {report['dataset']['fingerprint'][:19]}."
    )
    return [f"- {line}" for line in lines]
