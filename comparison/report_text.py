"""The Markdown text of a comparison's report, from the content of report.json."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from comparison.experiment import Experiment
from comparison.paired_tests import ALPHA, EXACT_SEEDS, RESAMPLES, can_confirm, seeds_needed
from comparison.power import count_seeds
from comparison.results import SPLITS
from comparison.sequential import plan_looks
from comparison.tuning_report import tuning_markdown
from config.differences import differences
from config.own_parts import without_folders

MARK = r"\*"  # of a variant that was not treated like the first one


def markdown(experiment: Experiment, report: dict[str, Any], splits: list[str]) -> str:
    """Return report.md."""
    text = [f"# {experiment.question}", "", f"Made by `{report['command']}`."]
    keys = ", ".join(experiment.tuning.keys) if experiment.tuning else ""
    for split in reversed(splits):
        tuned = f", each variant with its own {keys}" * bool(keys)
        text += _result(f"{SPLITS[split]}{tuned}", report["results"][split], report["arms"])
        if shared := report.get("shared"):
            text += _result(f"{SPLITS[split]}, all with the shared {keys}", shared["results"][split], shared["arms"])
    text += ["", "![paired differences with 95 % intervals](differences.png)", "![accuracy by variant](accuracy.png)"]
    text += ["![accuracy against cost](costs.png)", "![learning curves](curves.png)"]
    text += ["![learning curves by steps, images, seconds and FLOPs](curves-by-cost.png)"]
    if report.get("shared"):
        text += ["![paired differences with the shared value](differences-shared.png)"]
    if report.get("tuning"):
        text += ["", "## Tuning", "", *tuning_markdown(experiment, report["tuning"])]
    text += ["", "## Plan and power", "", *_plan(experiment, report)]
    text += ["", "## Equal treatment", "", *_equality(experiment, report)]
    if report["missing"]:
        text += ["", "## Missing runs", ""]
        text += [f"- {name}: {reason}" for name, reason in report["missing"].items()]
    text += ["", "## Variants", "", *_variants(experiment)]
    text += ["", "## Method and limits", "", *_limits(experiment, report, splits)]
    return "\n".join(text) + "\n"


def _result(where: str, rows: list[dict[str, Any]], variants: dict[str, Any]) -> list[str]:
    return ["", f"## Result on the {where}", "", *_answers(rows, variants), "", *_table(rows, variants)]


def _answers(rows: list[dict[str, Any]], variants: dict[str, Any]) -> list[str]:
    first, lines = rows[0], []
    for row in rows[1:]:
        name, difference = row["arm"], row["difference"]
        cost, reference = variants[name], variants[first["arm"]]
        ratios = f"{cost['parameters'] / reference['parameters']:.2f} x the parameters"
        ratios += f", {cost['flops'] / reference['flops']:.2f} x the FLOPs"
        answer = "cannot be compared, since it shares no finished seed with the first variant"
        if difference:
            answer = difference["sentence"]
            ratios += f", {row['images_per_second'] / first['images_per_second']:.2f} x the images/s"
        lines.append(f"- **{name}**{_mark(cost)} against {first['arm']}: {answer}. Cost: {ratios}.")
    return lines


def _mark(variant: dict[str, Any]) -> str:
    return MARK if variant["unequal"] else ""


def _table(rows: list[dict[str, Any]], variants: dict[str, Any]) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    lines = [
        "| variant | n | mean % | sd | difference (95 % CI) | d | p t | p t (Holm) | p sign-flip | p sign-flip (Holm) "
        "| verdict | parameters | MFLOPs per image | images/s | training s |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        variant, d = variants[row["arm"]], row["difference"] or {}
        change = number(d.get("mean"), "+.2f")
        if d.get("low") is not None:
            change += f" ({d['low']:+.2f} to {d['high']:+.2f})"
        cells = [
            row["arm"] + _mark(variant),
            str(row["n"]),
            number(row["mean"], ".2f"),
            number(row["sd"], ".2f"),
            change,
            number(d.get("effect"), ".2f"),
            *(number(d.get(key), ".3g") for key in ("p_t", "p_t_corrected", "p", "p_corrected")),
            d.get("verdict", "–"),
            f"{variant['parameters']:,}",
            f"{variant['flops'] / 1e6:,.2f}",
            number(row["images_per_second"], ",.0f"),
            number(row["training_seconds"], ",.0f"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _plan(experiment: Experiment, report: dict[str, Any]) -> list[str]:
    match = "not matched" if experiment.match == "none" else f"matched in {experiment.match}"
    margin = f"±{experiment.margin:g} points" if experiment.margin else "none, so no variant can be called equivalent"
    return [
        f"- {len(experiment.variants)} variants ({len(experiment.variants) - 1} planned comparisons) x "
        f"{experiment.seeds} seeds, {experiment.budget_text} each.",
        f"- Sizes: {match}. Margin of equivalence: {margin}.",
        f"- {report['power']}.",
    ]


def _equality(experiment: Experiment, report: dict[str, Any]) -> list[str]:
    size = "FLOPs" if experiment.match == "flops" else "parameters"
    planned = f"{size} (within 1 %) and the optimizer of each part"
    checked = f"Dataset, validation split, budget, source code, device, versions, {planned} were compared over all runs"
    if not _has_reference(report["results"]):
        checked = f"Runs were not compared: the first variant has no finished run. By the plan, {planned} were compared"
    if report.get("shared") and not _has_reference(report["shared"]["results"]):
        checked = f"With the shared value, the first variant has no finished run, so runs were not compared. {checked}"
    unequal = [f"- **{name}**{MARK}: {line}" for name, variant in report["arms"].items() for line in variant["unequal"]]
    shared = report["shared"]["arms"] if report.get("shared") else {}
    unequal += [
        f"- **{name}**{MARK} with the shared value: {line}"
        for name, variant in shared.items()
        for line in variant["unequal"]
        if line not in report["arms"][name]["unequal"]
    ]
    if not unequal:
        return [f"{checked}: equal."]
    return [f"{checked}. Not equal to the first variant, and marked {MARK} above:", "", *unequal]


def _has_reference(results: dict[str, list[dict[str, Any]]]) -> bool:
    """Whether the first variant, which all others are compared with, has a finished run."""
    return all(rows[0]["n"] > 0 for rows in results.values())


def _variants(experiment: Experiment) -> list[str]:
    first, lines = experiment.variants[0], []
    for variant in experiment.variants:
        changed = [
            re.sub(r"^(\S+) was (.*), is (.*)$", r"`\1` \3 (not \2)", text)
            for text in differences(*(without_folders(one.settings.as_dict()) for one in (first, variant)))
        ]
        settings = f" Settings: {'; '.join(changed)}." if changed else ""
        lines.append(f"- **{variant.name}**: {variant.idea}{settings}")
    return lines


def _sign_flip(experiment: Experiment) -> str:
    if (experiment.max_seeds or experiment.seeds) <= EXACT_SEEDS:
        return "exact sign-flip test"
    return (
        f"sign-flip test (exact up to {EXACT_SEEDS} seeds; with more, {RESAMPLES:,} random sign patterns and "
        f"p of at least {1 / (RESAMPLES + 1):g})"
    )


def _limits(experiment: Experiment, report: dict[str, Any], splits: list[str]) -> list[str]:
    if not report["samples"]:
        return ["No run is finished."]
    comparisons = len(experiment.variants) - 1
    correction = "Bonferroni" if experiment.margin else "Holm"
    looks, level, fewest = [], f"p < {ALPHA:g}", seeds_needed(comparisons)
    if experiment.max_seeds and experiment.round_seeds:
        looks, level = plan_looks(experiment.round_seeds, experiment.max_seeds), "p below the level of a look"
        fewest = next((look.seeds for look in looks if can_confirm(look.seeds, comparisons, look.alpha)), None)
    lines = [
        "Accuracy is that of the last epoch, never that of the best one. Differences are paired by seed. The interval "
        "is that of the paired t test, and not corrected for the number of variants. d is the mean difference divided "
        "by the standard deviation of the differences.",
        f"A difference is confirmed when the paired t test and the {_sign_flip(experiment)} both give {level} after "
        f"{correction} correction for the {comparisons} planned comparison{'s' * (comparisons > 1)}. "
        f"{f'That takes at least {count_seeds(fewest)}' if fewest else 'No look can reach its level'}. Preliminary: "
        "the interval excludes 0, but p cannot be that small with so few seeds.",
    ]
    if looks:
        levels = ", ".join(f"{look.alpha:.2g} after {look.seeds} seeds" for look in looks)
        lines.append(f"The levels of the looks are {levels}. They add up to {ALPHA:g}.")
    if experiment.margin:
        lines.append(
            f"Equivalent: two one-sided t tests place the difference within ±{experiment.margin:g} points "
            f"({level} after {correction} correction)."
        )
    lines.append("FLOPs: forward pass of one image, matrix products and convolutions only; a multiply-add counts as 2.")
    for split in splits:
        evaluated = report["evaluated"][split]
        rows = [*report["results"][split], *report.get("shared", {}).get("results", {}).get(split, [])]
        means = [value for row in rows for value in row["by_seed"].values()]
        share = float(np.mean(means)) / 100
        error = 100 * np.sqrt(share * (1 - share) / evaluated)
        lines.append(
            f"Every variant is evaluated on the same {evaluated:,} images of the {SPLITS[split]}. Other images would "
            f"change an accuracy (standard error about {error:.2f} points); the intervals do not include that."
        )
    lines.append(
        "The test split was reported because of --final."
        if report["final"]
        else "The test split was neither used nor shown. train.py evaluates it once at the end of a run, and this "
        "report drops the counts as it reads the file. `--final` reports them, once, after all choices are made."
    )
    if report.get("shared"):
        lines.append(
            "The tuned comparison is the answer. The one with the shared value shows what tuning changes; its p are "
            "corrected for its own comparisons alone. A variant whose chosen value is the shared one has the same runs "
            "in both."
        )
    budget = f"{experiment.budget_text}: {report['samples']:,} images trained on"
    rates, other = "one learning rate for all variants", "another learning rate"
    if experiment.tuning:
        rates, other = "the candidates of tuning", "a value that was not tried"
    lines.append(
        f"The result holds for this budget ({budget}), these sizes, {rates}, and one dataset. A variant may need "
        f"{other} or a longer run."
    )
    devices = ", ".join(report["hardware"]["devices"])
    lines.append(f"Images/s and training seconds depend on the device ({devices}) and on its other load.")
    dirty = ", with uncommitted changes" if report["uncommitted_changes"] else ""
    found = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    sources = f"; source {', '.join(report['sources'])}" if report["sources"] else ""
    lines.append(
        f"Commit {', '.join(commit[:12] for commit in report['commits'])}{dirty}{sources}; {found}; "
        f"dataset {report['dataset']['name']} {report['dataset']['fingerprint'][:19]}."
    )
    return [f"- {line}" for line in lines]
