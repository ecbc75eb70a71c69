"""What the plan and the report say about tuning: candidates, rungs, cost, and the value of each variant."""

from __future__ import annotations

from typing import Any

from comparison.experiment import Experiment, Variant
from comparison.run_costs import RunCost, spent
from comparison.tuning import DIVERGED, Search, Tuning, mean
from comparison.tuning_runs import Tuned, tuning_of
from config.own_parts import without_folders


def plan_lines(experiment: Experiment, tuning_cost: RunCost, comparison_cost: RunCost) -> list[str]:
    """Return the lines of the plan: what is tuned, the rungs, and what it costs next to the comparison."""
    tuning = tuning_of(experiment)
    candidates = "; ".join(tuning.describe(i) for i in range(len(tuning.candidates)))
    lines = [
        f"tuning    {', '.join(tuning.keys)} of each variant on the validation split, {tuning.num_seeds} seeds kept "
        f"for it ({tuning.seeds[0]} to {tuning.seeds[-1]})",
        f"          candidates: {candidates}",
        f"          rungs (eta {tuning.eta:g}): {rungs_text(tuning)}",
    ]
    lines += [f"note: {text}" for text in _notes(experiment, tuning)]
    times = 2 if tuning.report_shared else 1
    what = "comparison twice (tuned, and the shared value for all)" if times == 2 else "comparison (tuned)"
    lines.append(f"cost      tuning at most {tuning_cost}; {what} at most {comparison_cost * times}")
    if tuning_cost.hours is None:
        lines.append("note: hours are known after the first run of this preset")
    return lines


def rungs_text(tuning: Tuning) -> str:
    """Return such as "3 candidates for 25 % of the budget, the best 2 for 100 %, the best 1 is chosen"."""
    first, *others = tuning.rungs()
    text = f"{first.candidates} candidates for {100 * first.share:g} % of the budget"
    text += "".join(f", the best {rung.candidates} for {100 * rung.share:g} %" for rung in others)
    return f"{text}, the best one is chosen"


def _notes(experiment: Experiment, tuning: Tuning) -> list[str]:
    """What the user may want to change before the first run."""
    texts = []
    for i, key in enumerate(tuning.keys):
        values = {str(one[i]) for one in tuning.candidates}
        is_edge = any(text.startswith(f"{key} = ") for text in tuning.at_edge(0))  # numbers have one, names have none
        if len(values) == 2 and is_edge:
            texts.append(f"{key} has two values, so each is at the edge of the grid; three or more show a maximum")
    if tuning.report_shared and (shared := shared_values(experiment.variants[0], tuning)) not in [
        tuning.values(i) for i in range(len(tuning.candidates))
    ]:
        texts.append(f"the shared value ({_text(shared)}) is not among the candidates")
    return texts


def shared_values(variant: Variant, tuning: Tuning) -> dict[str, Any]:
    """Return the file's own values of the tuned settings for a variant; None for an option that it does not set.

    A user-defined part is without its folder, as in `Tuning.values`.
    """
    settings = without_folders(variant.settings.as_dict())
    return {key: _at(settings if key.split(".")[0] in settings else settings["engine"], key) for key in tuning.keys}


def _at(tree: Any, path: str) -> Any:
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def chosen_lines(tuned: Tuned) -> list[str]:
    """Return one line per variant: its value, or why it has none; nothing before the first run."""
    if all(task.state() == "new" for task in tuned.tasks):
        return []
    tuning, lines = tuning_of(tuned.experiment), []
    for variant in tuned.experiment.variants:
        found = tuned.searches.get(variant.name)
        if found is None or found.chosen is None:
            lines.append(f"tuned     {variant.name}: {tuned.undecided[variant.name]}")
            continue
        edges = "".join(f"; warning: {text}" for text in tuning.at_edge(found.chosen))
        lines.append(f"tuned     {variant.name}: {tuning.describe(found.chosen)}{edges}")
    return lines


# --- the report -----------------------------------------------------------------------------------------------------


def tuning_facts(tuned: Tuned) -> dict[str, Any]:
    """Return the part `tuning` of report.json."""
    tuning, cost = tuning_of(tuned.shared), spent(tuned.tasks)
    return {
        "settings": list(tuning.keys),
        "candidates": [tuning.values(i) for i in range(len(tuning.candidates))],
        "seeds": list(tuning.seeds),
        "eta": tuning.eta,
        "rungs": [{"share": rung.share, "candidates": rung.candidates} for rung in tuning.rungs()],
        "cost": {"runs": cost.runs, "images": cost.images, "hours": cost.hours},
        "variants": {
            variant.name: _facts_of(
                variant, tuning, tuned.searches.get(variant.name), tuned.undecided.get(variant.name)
            )
            for variant in tuned.shared.variants
        },
    }


def _facts_of(variant: Variant, tuning: Tuning, found: Search | None, problem: str | None) -> dict[str, Any]:
    chosen = None if found is None else found.chosen
    return {
        "shared": shared_values(variant, tuning),
        "chosen": None if chosen is None else tuning.values(chosen),
        "at_edge": [] if chosen is None else tuning.at_edge(chosen),
        "problem": problem,
        "rungs": [
            [
                {
                    "candidate": candidate,
                    "mean": _finite(mean(by_seed)) if by_seed else None,  # None: diverged, or no run is finished
                    "diverged": DIVERGED in by_seed.values(),
                    "by_seed": {str(seed): _finite(value) for seed, value in by_seed.items()},
                }
                for candidate, by_seed in rung.items()
            ]
            for rung in (found.accuracies if found else [])
        ],
    }


def _finite(value: float) -> float | None:
    return None if value == DIVERGED else value


def tuning_markdown(experiment: Experiment, facts: dict[str, Any]) -> list[str]:
    """Return the section on tuning of report.md, from the part `tuning` of report.json."""
    tuning, cost = tuning_of(experiment), facts["cost"]
    total = RunCost(cost["runs"], cost["images"], cost["hours"])
    seeds = f"{tuning.num_seeds} seeds ({tuning.seeds[0]} to {tuning.seeds[-1]})"
    lines = [
        f"Each variant got its own {', '.join(f'`{key}`' for key in tuning.keys)}: the candidate with the highest mean "
        f"accuracy on the validation split over {seeds}, which the comparison does not use. Successive halving (eta "
        f"{tuning.eta:g}): {rungs_text(tuning)}. The learning-rate schedule has the length of each run.",
        "",
        f"Cost of tuning: {total} of training and evaluation, summed over the runs.",
        "",
        "![accuracy of the candidates](tuning.png)",
        "",
        "Mean accuracy (%) on the longest rung that a candidate reached; the share of the budget is given where it is "
        "not the last rung. The chosen one is bold.",
        "",
    ]
    names = [tuning.describe(i) for i in range(len(tuning.candidates))]
    lines += [f"| variant | shared value | {' | '.join(names)} | chosen |", f"|---|--:|{'--:|' * len(names)}--:|"]
    for name, one in facts["variants"].items():
        chosen = "–" if one["chosen"] is None else _text(one["chosen"])
        chosen += " (edge)" * bool(one["at_edge"])
        cells = [_cell(one, i, tuning) for i in range(len(names))]
        lines.append(f"| {name} | {_text(one['shared'])} | {' | '.join(cells)} | {chosen} |")
    edges = [f"- **{name}**: {text}." for name, one in facts["variants"].items() for text in one["at_edge"]]
    problems = [f"- **{name}**: {one['problem']}." for name, one in facts["variants"].items() if one["problem"]]
    if edges:
        lines += ["", "At the edge of the grid, where a better value may lie beyond:", "", *edges]
    return lines + (["", "Without a value:", "", *problems] if problems else [])


def _cell(variant: dict[str, Any], candidate: int, tuning: Tuning) -> str:
    text = "–"
    for number, (rung, plan) in enumerate(zip(variant["rungs"], tuning.rungs(), strict=False), 1):
        for one in rung:
            if one["candidate"] != candidate or not one["by_seed"]:
                continue
            text = "diverged" if one["diverged"] else f"{one['mean']:.2f}"
            if number < len(tuning.rungs()):
                text += f" ({100 * plan.share:g} %)"
    is_chosen = variant["chosen"] == tuning.values(candidate)
    return f"**{text}**" if is_chosen else text


def _text(values: dict[str, Any]) -> str:
    texts = (f"{value:g}" if isinstance(value, float) else str(value) for value in values.values())
    return ", ".join("–" if text == "None" else text for text in texts)


def tuning_picture(facts: dict[str, Any], tuning: Tuning) -> dict[str, dict[str, Any]]:
    """Return what reports/tuning.py draws: variant -> the accuracies of every rung, and what was chosen."""
    pictures = {}
    for name, one in facts["variants"].items():
        curves = {}
        for rung, plan in zip(one["rungs"], tuning.rungs(), strict=False):
            values = {row["candidate"]: list(row["by_seed"].values()) for row in rung if not row["diverged"]}
            curves[f"{100 * plan.share:g} % of the budget"] = {i: found for i, found in values.items() if found}
        diverged = [row["candidate"] for rung in one["rungs"] for row in rung if row["diverged"]]
        chosen = next((i for i in range(len(tuning.candidates)) if tuning.values(i) == one["chosen"]), None)
        shared = next((i for i in range(len(tuning.candidates)) if tuning.values(i) == one["shared"]), None)
        pictures[name] = {"rungs": curves, "diverged": diverged, "chosen": chosen, "shared": shared}
    return pictures
