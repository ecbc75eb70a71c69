"""Report of a comparison: `report.md`, `report.json` and pictures, from the finished runs at their last epoch.

`train.py` counts the test split once at the end of a run, and keeps the counts in the run folder. Without `final` they
are dropped as the file is read, so nothing here can use or show them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.files import write_atomically
from common.machine import cpu_name
from common.text import listed, without_paths
from comparison.experiment import Experiment
from comparison.planned_run import PlannedRun
from comparison.power import spread_of_pairs, statement
from comparison.report_text import SPLITS, markdown
from comparison.sequential import evaluate, plan_looks
from comparison.significance import CONFIRMED, Difference, compare
from comparison.variant_costs import VariantCost, unequal_costs
from config.own_parts import without_folders
from records.provenance import changed_between, commit_of_project, versions
from records.run_folder import RunFolder
from reports.style import save
from reports.variants import accuracy_against, curves_by_cost, paired_differences, variant_accuracy, variant_curves

SAMPLES_TOLERANCE = 0.01  # variants with different batch sizes drop different last batches
SECONDS_TOLERANCE = 0.1  # of a budget in seconds


@dataclass(frozen=True)
class Run:
    """A finished run: run.json, and the lines of metrics.jsonl without what must not be seen."""

    seed: int
    facts: dict[str, Any]
    lines: list[dict[str, Any]]

    def accuracy(self, split: str) -> float:
        """Return the accuracy of the last epoch, in points."""
        return 100 * self.lines[-1][f"{split}_accuracy"]

    @property
    def samples(self) -> int:
        return self.lines[-1]["step"] * self.facts["batch"]["total"]

    @property
    def training_seconds(self) -> float:
        return sum(line["training_seconds"] for line in self.lines)

    @property
    def images_per_second(self) -> float:
        images = sum(line["images_per_second"] * line["training_seconds"] for line in self.lines)
        return images / max(self.training_seconds, 1e-9)


@dataclass(frozen=True)
class VariantResult:
    """A variant with its finished runs, and what was not equal to the first variant."""

    name: str
    idea: str
    cost: VariantCost
    runs: list[Run]
    unequal: list[str]

    def accuracies(self, split: str) -> dict[int, float]:
        """Return seed -> accuracy in points."""
        return {run.seed: run.accuracy(split) for run in self.runs}

    def mean(self, of: Callable[[Run], float]) -> float:
        return float(np.mean([of(run) for run in self.runs]))


def load(task: PlannedRun, seed: int, final: bool) -> Run | None:
    """Return the run of a task, None if it is not finished."""
    if task.state() != "finished":
        return None
    record = RunFolder(task.folder)
    lines = [
        {key: value for key, value in line.items() if final or not key.startswith("test_")} for line in record.metrics()
    ]
    return Run(seed, record.facts(), lines)


def variant_results(
    experiment: Experiment, costs: list[VariantCost], tasks: dict[tuple[str, int], PlannedRun], final: bool
) -> list[VariantResult]:
    """Return all variants in the order of the file, each checked for equality with the first."""
    results: list[VariantResult] = []
    planned = unequal_costs(experiment, costs)
    for variant, cost in zip(experiment.variants, costs, strict=True):
        loaded = [
            load(tasks[variant.name, seed], seed, final)
            for seed in range(experiment.seeds)
            if (variant.name, seed) in tasks
        ]
        runs = [run for run in loaded if run is not None]
        reference = results[0].runs if results else runs
        unequal = planned[variant.name] + inequalities(runs, reference, experiment)
        results.append(VariantResult(variant.name, variant.idea, cost, runs, unequal))
    return results


def accuracies_of(experiment: Experiment, tasks: dict[tuple[str, int], PlannedRun]) -> dict[str, dict[int, float]]:
    """Return variant -> seed -> accuracy in points of the finished runs, on the split that variants are compared on."""
    split = "validation" if experiment.hold_out else "test"
    found: dict[str, dict[int, float]] = {variant.name: {} for variant in experiment.variants}
    for (name, seed), task in tasks.items():
        if run := load(task, seed, final=not experiment.hold_out):
            found[name][seed] = run.accuracy(split)
    return found


def inequalities(runs: list[Run], reference: list[Run], experiment: Experiment) -> list[str]:
    """Return what keeps these runs from being treated like those of the first variant.

    The runs of the first variant are compared with its first run.
    """
    if not runs or not reference:
        return []
    first = reference[0]
    texts = [text for text in dict.fromkeys(_other_source(run, first) for run in runs) if text]
    for what, of in EQUAL.items():
        others = sorted({str(of(run)) for run in runs if of(run) != of(first)})
        if others:
            texts.append(f"{what}: {', '.join(others)} instead of {of(first)}")
    samples = [run.samples for run in runs if abs(run.samples / first.samples - 1) > SAMPLES_TOLERANCE]
    if samples and experiment.budget != "seconds":
        texts.append(f"images trained on: {samples[0]:,} instead of {first.samples:,}")
    steps = [run.lines[-1]["step"] for run in runs if run.lines[-1]["step"] != first.lines[-1]["step"]]
    if steps and experiment.budget == "steps":
        texts.append(f"optimizer steps: {steps[0]:,} instead of {first.lines[-1]['step']:,}")
    if experiment.budget == "seconds":
        mean = float(np.mean([run.training_seconds for run in runs]))
        if abs(mean / experiment.budget_amount - 1) > SECONDS_TOLERANCE:
            texts.append(f"training seconds: {mean:.0f} on average instead of {experiment.budget_amount:g}")
    for run in runs:
        for change in run.facts.get("changes", []):
            texts.append(f"seed {run.seed} resumed after step {change['after_step']}: {'; '.join(change['what'])}")
    return texts


def _other_source(run: Run, first: Run) -> str | None:
    """How the source of a run differs: by its files where both runs record them, else by the commit."""
    code, reference = run.facts.get("code"), first.facts.get("code")
    if code and reference:
        files = changed_between(reference, code)
        return f"source code: {listed(files)} differ" if files else None
    commit, other = (facts["commit"] or "unknown" for facts in (run.facts, first.facts))
    if commit != other:
        return f"commit: {commit} instead of {other}"
    if run.facts["uncommitted_changes"] != first.facts["uncommitted_changes"]:
        return "uncommitted changes: in some runs only"
    return None


EQUAL = {
    "dataset": lambda run: run.facts["dataset"]["fingerprint"],
    "validation split": lambda run: run.facts["hold_out"],
    "images evaluated": lambda run: [run.lines[-1].get(f"{split}_seen") for split in SPLITS],
    "device": lambda run: f"{run.facts['num_processes']} x {run.facts['device']}",
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
    compared = {split: _compare(experiment, results, split, exploring) for split in splits}
    rows = {split: [_row(variant, split, compared[split].get(variant.name)) for variant in results] for split in splits}
    spread = spread_of_pairs({one.name: one.accuracies(splits[-1]) for one in results}, "this report")
    report = {
        **_facts(experiment, results, missing, final, command),
        "power": statement(experiment, spread),
        "results": rows,
    }
    write_atomically(folder / "report.json", json.dumps(report, indent=2) + "\n")
    write_atomically(folder / "report.md", markdown(experiment, report, splits))
    _draw(experiment, results, folder, splits[-1], exploring, compared[splits[-1]])
    return folder / "report.md"


def _compare(experiment: Experiment, results: list[VariantResult], split: str, exploring: str) -> dict[str, Difference]:
    """Compare on one split. With seeds in rounds, each variant's verdict is that of the look that decided it."""
    accuracies = {variant.name: variant.accuracies(split) for variant in results}
    first, planned = results[0].name, len(experiment.variants) - 1
    if experiment.max_seeds and experiment.round_seeds and split == exploring:
        looks = plan_looks(experiment.round_seeds, experiment.max_seeds)
        outcome = evaluate(accuracies, first, looks, experiment.margin, planned)
        if outcome.looks:
            return outcome.differences
    return compare(accuracies, first, experiment.margin, planned)


def _draw(
    experiment: Experiment,
    results: list[VariantResult],
    folder: Path,
    split: str,
    exploring: str,
    compared: dict[str, Difference],
) -> None:
    """Write the pictures. Variants that were not treated like the first one carry an asterisk."""
    with_runs = [variant for variant in results if variant.runs]
    labels = {variant.name: variant.name + " *" * bool(variant.unequal) for variant in with_runs}
    label = f"accuracy on the {SPLITS[split]} (%)"
    forest = {
        labels[name]: {
            "mean": one.mean,
            "low": one.low,
            "high": one.high,
            "seeds": list((one.by_seed or {}).values()),
            "verdict": one.verdict,
            "is_confirmed": one.verdict in CONFIRMED,
        }
        for name, one in compared.items()
    }
    reference = f"difference to {results[0].name} on the {SPLITS[split]} (points, paired by seed)"
    save(paired_differences(forest, experiment.question, reference, experiment.margin), folder / "differences.png")
    accuracies = {labels[one.name]: list(one.accuracies(split).values()) for one in with_runs}
    save(variant_accuracy(accuracies, experiment.question, label), folder / "accuracy.png")
    costs = {labels[one.name]: _costs_of(one, split) for one in with_runs}
    save(accuracy_against(costs, experiment.question, label), folder / "costs.png")
    curves = {labels[one.name]: _curves(one, exploring) for one in with_runs}
    curve_label = f"accuracy on the {SPLITS[exploring]} (%)"
    save(variant_curves(curves, experiment.question, curve_label), folder / "curves.png")
    by_cost = {labels[one.name]: _curves_by_cost(one, exploring) for one in with_runs}
    save(curves_by_cost(by_cost, experiment.question, curve_label), folder / "curves-by-cost.png")


def _facts(
    experiment: Experiment, results: list[VariantResult], missing: dict[str, str], final: bool, command: str
) -> dict[str, Any]:
    runs = [run for variant in results for run in variant.runs]
    of_run = runs[0].facts if runs else {}
    return {
        "question": experiment.question,
        "command": command,
        "final": final,
        "budget": {experiment.budget: experiment.budget_amount},
        "seeds": experiment.seeds,
        "hold_out": experiment.hold_out,
        "match": experiment.match,
        "margin": experiment.margin,
        "dataset": {key: of_run["dataset"][key] for key in ("name", "fingerprint", "num_images")} if runs else None,
        "commits": sorted({run.facts["commit"] or "unknown" for run in runs}),
        "uncommitted_changes": any(run.facts["uncommitted_changes"] for run in runs),
        "commit_of_report": commit_of_project()[0],
        "sources": sorted({run.facts["code"]["fingerprint"] for run in runs if run.facts.get("code")}),
        "hardware": {"device": of_run.get("device"), "cpu": cpu_name(), "cores": len(os.sched_getaffinity(0))},
        "versions": of_run.get("versions") or versions(),
        "samples": runs[0].samples if runs else None,
        "evaluated": {split: runs[0].lines[-1].get(f"{split}_seen") for split in SPLITS} if runs else None,
        "arms": {
            one.name: {"idea": one.idea, **asdict(one.cost), "unequal": [without_paths(text) for text in one.unequal]}
            for one in results
        },
        "settings": {variant.name: without_folders(variant.settings.as_dict()) for variant in experiment.variants},
        "missing": {name: without_paths(reason) for name, reason in missing.items()},
    }


def _row(variant: VariantResult, split: str, difference: Difference | None) -> dict[str, Any]:
    accuracies = variant.accuracies(split)
    values = list(accuracies.values())
    return {
        "arm": variant.name,
        "n": len(values),
        "mean": float(np.mean(values)) if values else None,
        "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "by_seed": {str(seed): value for seed, value in accuracies.items()},
        "images_per_second": variant.mean(lambda run: run.images_per_second) if values else None,
        "training_seconds": variant.mean(lambda run: run.training_seconds) if values else None,
        "difference": asdict(difference) if difference else None,
    }


def _costs_of(variant: VariantResult, split: str) -> dict[str, Any]:
    return {
        "accuracy": list(variant.accuracies(split).values()),
        "parameters": variant.cost.parameters / 1e6,
        "MFLOPs per image": variant.cost.flops / 1e6,
        "training seconds": variant.mean(lambda run: run.training_seconds),
    }


def _curves(variant: VariantResult, split: str) -> tuple[list[float], list[list[float]]]:
    """Epochs (fractions where the budget ended inside one), and the accuracies of every seed at them."""
    runs = _evaluated_alike(variant)
    epochs = [line["step"] / runs[0].facts["steps_per_epoch"] for line in runs[0].lines]
    return epochs, [[100 * line[f"{split}_accuracy"] for line in run.lines] for run in runs]


def _evaluated_alike(variant: VariantResult) -> list[Run]:
    """The runs that were evaluated at the same steps as the first; an evaluate_every may have been added later."""
    steps = [line["step"] for line in variant.runs[0].lines]
    return [run for run in variant.runs if [line["step"] for line in run.lines] == steps]


def _curves_by_cost(variant: VariantResult, split: str) -> dict[str, Any]:
    """What was spent at each evaluation, and the accuracies of every seed at it.

    A training step costs about 3 forward passes: one forward, and a backward pass of twice its cost.
    """
    _, values = _curves(variant, split)
    runs = _evaluated_alike(variant)
    images = [line["step"] * runs[0].facts["batch"]["total"] for line in runs[0].lines]
    seconds = np.cumsum([[line["training_seconds"] for line in run.lines] for run in runs], axis=1).mean(axis=0)
    return {
        "accuracy": values,
        "optimizer steps": [line["step"] for line in runs[0].lines],
        "images": images,
        "training seconds": seconds.tolist(),
        "training TFLOPs": [3 * variant.cost.flops * count / 1e12 for count in images],
    }
