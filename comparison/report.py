"""Report of a comparison: `report.md`, `report.json` and pictures, from the finished runs at their last epoch."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from common.files import write_atomically
from common.text import shorten, without_paths
from comparison.experiment import Experiment
from comparison.power import spread_of_pairs, statement
from comparison.report_text import markdown
from comparison.results import SPLITS, Run, VariantResult
from comparison.sequential import evaluate, on_another_split, plan_looks
from comparison.significance import CONFIRMED, Difference, compare
from comparison.tuning_report import tuning_picture
from config.own_parts import without_folders
from records.provenance import commit_of_project, versions
from reports.style import save
from reports.tuning import candidate_accuracy
from reports.variants import accuracy_against, curves_by_cost, paired_differences, variant_accuracy, variant_curves


def write(
    experiment: Experiment,
    results: list[VariantResult],
    missing: dict[str, str],
    folder: Path,
    final: bool,
    command: str,
    tuning: dict[str, Any] | None = None,
    shared: tuple[Experiment, list[VariantResult]] | None = None,
) -> Path:
    """Write the report and its pictures; returns the path of report.md.

    Args:
        missing: runs that are not part of it, and why.
        tuning: how the values of each variant were chosen, as `tuning_facts` returns it.
        shared: the same comparison with the file's own values, which is reported next to that with tuned values.
    """
    folder.mkdir(parents=True, exist_ok=True)
    exploring = "validation" if experiment.hold_out else "test"
    splits = [exploring] + (["test"] if final and exploring != "test" else [])
    compared = {split: _compare(experiment, results, split, exploring) for split in splits}
    spread = spread_of_pairs({one.name: one.accuracies(splits[-1]) for one in results}, "this report")
    report = {
        **_facts(experiment, results, missing, final, command, shared[1] if shared else []),
        "power": statement(experiment, spread),
        "results": _rows(results, compared),
        **({"tuning": tuning} if tuning else {}),
    }
    if shared:
        of_shared = {split: _compare(*shared, split, exploring) for split in splits}
        report["shared"] = {"results": _rows(shared[1], of_shared), "arms": _variant_facts(shared[1])}
        _draw_differences(
            *shared, splits[-1], of_shared[splits[-1]], folder / "differences-shared.png", " (shared value)"
        )
    write_atomically(folder / "report.json", json.dumps(report, indent=2) + "\n")
    write_atomically(folder / "report.md", markdown(experiment, report, splits))
    _draw(experiment, results, folder, splits[-1], exploring, compared[splits[-1]])
    if tuning and experiment.tuning:
        names = [experiment.tuning.describe(i) for i in range(len(experiment.tuning.candidates))]
        label = f"accuracy on the {SPLITS['validation']} (%)"
        title = f"Tuning of {', '.join(experiment.tuning.keys)}: {experiment.question}"
        figure = candidate_accuracy(tuning_picture(tuning, experiment.tuning), names, title, label)
        save(figure, folder / "tuning.png")
    return folder / "report.md"


def _rows(results: list[VariantResult], compared: dict[str, dict[str, Difference]]) -> dict[str, list[dict[str, Any]]]:
    return {split: [_row(one, split, by_name.get(one.name)) for one in results] for split, by_name in compared.items()}


def _compare(experiment: Experiment, results: list[VariantResult], split: str, exploring: str) -> dict[str, Difference]:
    """Compare on one split. With seeds in rounds, each variant's verdict is that of the look that decided it."""
    accuracies = {variant.name: variant.accuracies(split) for variant in results}
    first, planned = results[0].name, len(experiment.variants) - 1
    if experiment.max_seeds and experiment.round_seeds:
        looks = plan_looks(experiment.round_seeds, experiment.max_seeds)
        seen = {variant.name: variant.accuracies(exploring) for variant in results}
        outcome = evaluate(seen, first, looks, experiment.margin, planned)
        if split == exploring:
            return outcome.differences
        return on_another_split(accuracies, outcome, first, looks, experiment.margin, planned)
    # A claim needs all seeds: those whose runs failed or came last are no random choice.
    complete = {name: found for name, found in accuracies.items() if found.keys() >= set(range(experiment.seeds))}
    tested = compare(complete, first, experiment.margin, planned) if first in complete else {}
    others = {name: found for name, found in accuracies.items() if name not in tested}
    found = tested | compare(others, first, experiment.margin, planned, alpha=None)
    return {name: found[name] for name in accuracies if name in found}


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
    labels = _labels(results)
    first, question = labels[results[0].name], experiment.question
    label = f"accuracy on the {SPLITS[split]} (%)"
    _draw_differences(experiment, results, split, compared, folder / "differences.png")
    accuracies = {labels[one.name]: list(one.accuracies(split).values()) for one in with_runs}
    save(variant_accuracy(accuracies, first, question, label), folder / "accuracy.png")
    costs = {labels[one.name]: _costs_of(one, split) for one in with_runs}
    save(accuracy_against(costs, first, question, label), folder / "costs.png")
    curves = {labels[one.name]: _curves(one, exploring) for one in with_runs}
    curve_label = f"accuracy on the {SPLITS[exploring]} (%)"
    save(variant_curves(curves, first, question, curve_label), folder / "curves.png")
    by_cost = {labels[one.name]: _curves_by_cost(one, exploring) for one in with_runs}
    save(curves_by_cost(by_cost, first, question, curve_label), folder / "curves-by-cost.png")


def _labels(results: list[VariantResult]) -> dict[str, str]:
    return {variant.name: variant.name + " *" * bool(variant.unequal) for variant in results}


def _draw_differences(
    experiment: Experiment,
    results: list[VariantResult],
    split: str,
    compared: dict[str, Difference],
    path: Path,
    note: str = "",
) -> None:
    labels = _labels(results)
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
    reference = f"difference to {shorten(results[0].name, 40)} on the {SPLITS[split]} (points, paired by seed)"
    save(paired_differences(forest, f"{experiment.question}{note}", reference, experiment.margin), path)


def _variant_facts(results: list[VariantResult]) -> dict[str, Any]:
    return {
        one.name: {"idea": one.idea, **asdict(one.cost), "unequal": [without_paths(text) for text in one.unequal]}
        for one in results
    }


def _facts(
    experiment: Experiment,
    results: list[VariantResult],
    missing: dict[str, str],
    final: bool,
    command: str,
    shared: list[VariantResult],
) -> dict[str, Any]:
    runs = [run for variant in [*results, *shared] for run in variant.runs]
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
        "hardware": {"devices": sorted({run.device for run in runs})},
        "versions": of_run.get("versions") or versions(),
        "samples": runs[0].samples if runs else None,
        "evaluated": {split: runs[0].lines[-1].get(f"{split}_seen") for split in SPLITS} if runs else None,
        "arms": _variant_facts(results),
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
    """What was spent at each evaluation, and the accuracies of every seed at it."""
    _, values = _curves(variant, split)
    runs = _evaluated_alike(variant)
    steps, facts = [line["step"] for line in runs[0].lines], runs[0].facts
    batch, total = facts["batch"]["total"], facts["total_steps"]
    seconds = np.cumsum([[line["training_seconds"] for line in run.lines] for run in runs], axis=1).mean(axis=0)
    return {
        "accuracy": values,
        "optimizer steps": steps,
        "images": [step * batch for step in steps],
        "training seconds": seconds.tolist(),
        "training TFLOPs": [variant.cost.training_flops(step, total, batch) / 1e12 for step in steps],
    }
