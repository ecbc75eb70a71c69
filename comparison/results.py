"""Results of a comparison: its finished runs, read from their folders and checked for equal treatment.

`train.py` counts the test split once at the end of a run, and keeps the counts in the run folder. Without `final` they
are dropped as the file is read, so nothing that uses these results can use or show them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.errors import RunError
from common.text import listed
from comparison.experiment import Experiment
from comparison.planned_run import PlannedRun
from comparison.run_queue import mixed_sources
from comparison.variant_costs import VariantCost, unequal_costs
from records.provenance import changed_between
from records.run_folder import RunFolder

SPLITS = {"validation": "validation split", "test": "test split"}
SAMPLES_TOLERANCE = 0.01  # variants with different batch sizes drop different last batches
SECONDS_TOLERANCE = 0.1  # of a budget in seconds


@dataclass(frozen=True)
class Run:
    """A finished run: run.json, and the lines of metrics.jsonl without what must not be seen."""

    name: str  # of its folder
    seed: int
    facts: dict[str, Any]
    lines: list[dict[str, Any]]

    def accuracy(self, split: str) -> float:
        """Return the accuracy of the last epoch, in points."""
        return 100 * self.lines[-1][f"{split}_accuracy"]

    @property
    def device(self) -> str:
        """Name of the GPU; "CPU" with its model and cores, which runs of earlier versions do not record."""
        processor = self.facts.get("processor")
        if self.facts["device"] != "CPU" or not processor:
            return self.facts["device"]
        return f"CPU ({processor['name']}, {processor['cores']} cores)"

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
    return Run(task.name, seed, record.facts(), lines)


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
    "device": lambda run: f"{run.facts['num_processes']} x {run.device}",
    "versions": lambda run: run.facts["versions"],
}


def check_one_source(results: list[list[VariantResult]], tuning: list[PlannedRun]) -> None:
    """Check that all runs of each variant were trained by one version of the source.

    Args:
        results: of each comparison: with tuned values, with shared ones.
        tuning: runs that chose the tuned values.

    Raises:
        RunError: two runs of a variant differ; the message names the files.
    """
    codes: dict[str, dict[str, Any]] = {}
    for task in tuning:
        if task.state() == "finished":
            codes.setdefault(task.variant, {})[task.name] = RunFolder(task.folder).facts().get("code")
    for variants in results:
        for variant in variants:
            for run in variant.runs:
                codes.setdefault(variant.name, {})[run.name] = run.facts.get("code")
    for name, of_runs in codes.items():
        if problem := mixed_sources(of_runs):
            raise RunError(
                f"variant '{name}' mixes two versions of the source code: {problem}. Run compare.py with "
                "--redo-changed to run the outdated ones again"
            )
