"""`compare.py` for a file with [search]: the plan on the screen, the trials, and the report."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common.display import escape_markdown
from common.errors import EXIT_STOPPED, RunError, SettingsError
from common.files import write_atomically
from common.paths import near_path
from common.stop_signal import StopSignal
from comparison.experiment_file import as_overrides
from comparison.planned_run import PlannedRun
from comparison.planning import Data, data_of_runs, dataset_facts
from comparison.run_queue import device_slots
from comparison.search import Search, check_space, describe, read_search
from config.differences import leaves
from config.overrides import path_of
from config.own_parts import without_folders
from config.settings import as_typed
from records.provenance import commit_of_project, versions

COMPARED_SEEDS = 6  # of the comparison that the report suggests: the fewest that can confirm a difference
STATES = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "not finished"}
Start = Callable[[PlannedRun, dict[str, str]], Any]


def run_search(args: argparse.Namespace, start: Start, command: str, extra: tuple[str, ...] = ()) -> int:
    """Make the trials that are missing and write the report, as the arguments of compare.py ask. Returns the exit code.

    Args:
        start: starts a run, as for run_queue.run_all.
        command: that makes this report, for the report.
        extra: further arguments of every run.

    Raises:
        SettingsError: anything wrong in the file.
        RunError: the study or a run folder cannot be used, or no trial has finished.
    """
    _check_arguments(args)
    search = read_search(args.experiment, args.set)
    runs = args.runs_dir.resolve() / search.experiment.name
    data = (
        data_of_runs(search.experiment, runs, args.data_dir)
        if args.report_only
        else dataset_facts(search.experiment, args.data_dir, args.dry_run)
    )
    from comparison.variant_costs import cost_of  # after the arguments, since it imports PyTorch

    def parameters(variant: Any) -> int:
        return cost_of(variant, data.num_classes, data.image_side).parameters

    check_space(search, args.experiment.name, parameters)
    from comparison.search_study import STUDY, open_study, trials_of

    exists = (runs / STUDY).exists()
    for line in plan_lines(search):
        print(line)
    if args.dry_run and not exists:
        return 0
    if args.report_only and not exists:
        raise RunError(f"{near_path(runs)} has no study to report on; leave out --report-only")
    study = open_study(search, runs, args.redo_changed and not (args.dry_run or args.report_only))
    trials = [facts_of(trial) for trial in trials_of(search, study)]
    print(f"study     {near_path(runs / STUDY)}: {summary(search, trials)}")
    if args.dry_run:
        return 0
    if not args.report_only:
        stop = StopSignal()
        study = _make_trials(search, study, data, runs, stop, args, start, extra)
        if stop.number:
            print("stopped; start the same command again to resume")
            return EXIT_STOPPED
    trials = [facts_of(trial) for trial in trials_of(search, study)]
    path = write_report(search, trials, args.results_dir / search.experiment.name, command)
    print(f"\n{summary(search, trials)}\nreport    {near_path(path)}")
    if left := sum(trial["state"] == STATES["RUNNING"] for trial in trials):
        print(f"{left} trial(s) are still trained by other processes; the last one writes the report again")
    return 1 if any(trial["state"] == STATES["FAIL"] for trial in trials) else 0


def _make_trials(
    search: Search,
    study: Any,
    data: Data,
    runs: Path,
    stop: StopSignal,
    args: argparse.Namespace,
    start: Start,
    extra: tuple[str, ...],
) -> Any:
    """Train the trials that are missing. Returns the study, which is a new one where the former was renamed aside."""
    from comparison.search_runs import SearchRuns
    from comparison.search_study import open_study, rename_aside, storage_errors_named

    slots = device_slots(args.parallel)
    made = SearchRuns(search, study, data, runs, slots, stop, start, extra)
    if problem := made.problem():
        if not args.redo_changed:
            raise RunError(problem)
        rename_aside(runs)
        study = open_study(search, runs, redo=False)
        made = SearchRuns(search, study, data, runs, slots, stop, start, extra)
    with storage_errors_named(runs):
        made.run()
    return study


def _check_arguments(args: argparse.Namespace) -> None:
    for flag, is_given, instead in (
        ("--seeds", args.seeds, "a search trains each trial once"),
        ("--size", args.size, "a search has one size"),
        ("--final", args.final, "a search looks at the validation split only"),
        ("--parallel auto", args.parallel == "auto", "name the number of trials at once: --parallel N"),
        ("--shard", args.shard, "start the same command on every machine, and all work on one study"),
    ):
        if is_given:
            raise SettingsError(f"{flag} does not go with [search]: {instead}")
    if find_spec("optuna") is None:
        raise SettingsError("[search] needs the package optuna, which is not installed: pip install optuna")


# --- text -----------------------------------------------------------------------------------------------------------


def plan_lines(search: Search) -> list[str]:
    """Return what is printed before the first run: the question, the budget and the space."""
    one = search.experiment
    batch = one.variants[0].settings.engine["train_batch_size"]
    lines = [
        f"question  {one.question}",
        f"search    {search.trials} trials by {search.sampler}, {one.budget_text} each, preset "
        f"{Path(one.preset).stem}, batch {batch}; maximizes the accuracy on the validation split "
        f"({100 * one.hold_out:g} % of train)",
    ]
    width = max(map(len, search.space))
    for i, (name, values) in enumerate(search.space.items()):
        lines.append(f"{'space' if not i else '':10}{name:{width}}  {values}")
    if search.pruner == "asha":
        most = one.budget_amount if one.budget == "epochs" else float("inf")
        rungs = [search.min_evaluations * search.reduction_factor**i for i in range(3)]
        shown = ", ".join(str(rung) for rung in rungs if rung < most)
        lines.append(
            f"pruner    asha: after evaluation {shown}, ... the best 1 in {search.reduction_factor} trials continues"
            if shown
            else "pruner    asha, which prunes nothing: a trial has fewer evaluations than min_evaluations"
        )
    return lines


def facts_of(trial: Any) -> dict[str, Any]:
    """Return what the report says of one Optuna trial. Accuracies are in points."""
    value, seen = trial.value, trial.intermediate_values
    if value is None and seen:
        value = seen[max(seen)]
    return {
        "trial": f"trial-{trial.number:04d}",
        "state": STATES[trial.state.name],
        "accuracy": None if value is None else 100 * value,
        "evaluations": len(seen),
        "values": trial.params,
        "reason": trial.user_attrs.get("reason", ""),
    }


def ranked(trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return finished trials by accuracy, then pruned ones, then the others."""
    order = list(STATES.values())
    return sorted(trials, key=lambda one: (order.index(one["state"]), -(one["accuracy"] or 0.0)))


def summary(search: Search, trials: list[dict[str, Any]]) -> str:
    """Return the state of the search in one line."""
    counts = {state: sum(trial["state"] == state for trial in trials) for state in STATES.values()}
    text = ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "none begun"
    text = f"{search.trials} trials: {text}"
    first = next(iter(ranked(trials)), None)
    if first and first["state"] == "finished":
        text += f"; best {first['accuracy']:.2f} % ({first['trial']}: {describe(first['values'])})"
    return text


def write_report(search: Search, trials: list[dict[str, Any]], folder: Path, command: str) -> Path:
    """Write search.md and search.json. Returns the path of the first.

    Raises:
        RunError: no trial has finished.
    """
    rows = ranked(trials)
    if not rows or rows[0]["state"] != "finished":
        raise RunError("no trial has finished, so there is nothing to report; each run's .log file says why")
    one = search.experiment
    facts = {
        "question": one.question,
        "command": command,
        "search": without_folders(search.definition()) | {"trials": search.trials, "sampler": search.sampler},
        "commit_of_report": commit_of_project()[0],
        "versions": versions(),
        "trials": rows,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "search.json", json.dumps(facts, indent=2) + "\n")
    path = folder / "search.md"
    write_atomically(path, markdown(search, rows, command))
    return path


def markdown(search: Search, rows: list[dict[str, Any]], command: str) -> str:
    """Return the text of the report: the best values, what to do with them, and all trials."""
    one, best = search.experiment, rows[0]
    text = [f"# {one.question}", "", f"Made by `{command}`.", "", "## Result", ""]
    text += [f"{summary(search, rows)}.", ""]
    seeds = "on other seeds"
    if search.seed < COMPARED_SEEDS:
        seeds = f"on several seeds (seed {search.seed} favors the trial, which was chosen with it)"
    text += [
        f"The best of {len(rows)} trials was chosen on the validation split with one seed, so its accuracy there is "
        f"biased upward. To find out whether it is better than the preset, compare the two {seeds}:",
        "",
        "```toml",
        *comparison_file(search, best),
        "```",
        "",
    ]
    names = list(search.space)
    text += [f"| trial | state | accuracy (%) | evaluations | {' | '.join(f'`{name}`' for name in names)} |"]
    text += ["|---|---|--:|--:|" + "---|" * len(names)]
    for row in rows:
        values = [
            describe({"": row["values"][name]}).removeprefix(" = ") if name in row["values"] else "" for name in names
        ]
        accuracy = "" if row["accuracy"] is None else f"{row['accuracy']:.2f}"
        text += [f"| {row['trial']} | {row['state']} | {accuracy} | {row['evaluations']} | {' | '.join(values)} |"]
    failed = [row for row in rows if row["state"] == "failed"]
    if failed:
        text += ["", "## Failed trials", ""]
        text += [f"- {row['trial']}: {escape_markdown(row['reason'])}" for row in failed]
    text += ["", "## Method", "", "```", *plan_lines(search)[1:], "```", ""]
    text += ["Pruned trials show the accuracy at their last evaluation. The test split was not looked at."]
    return "\n".join(text) + "\n"


def comparison_file(search: Search, best: dict[str, Any]) -> list[str]:
    """Return the lines of an experiment file that compares the best trial with the settings that all trials share."""
    one = search.experiment
    preset = Path(one.preset).name if one.preset.endswith(".toml") else one.preset
    lines = [f'question = "Is the best trial of {one.name} better than its preset?"', f"preset = {json.dumps(preset)}"]
    lines += [
        f"dataset = {json.dumps(one.dataset)}",
        f"{one.budget} = {one.budget_number}",
        f"seeds = {COMPARED_SEEDS}",
        f"hold_out = {one.hold_out}",
    ]
    lines += toml_lines(one.variants[0].overrides)
    lines += ["", "[[variants]]", 'name = "preset"', 'idea = "The settings that the search started from."']
    lines += ["", "[[variants]]", 'name = "best"', f"idea = {json.dumps('The best values: ' + best['trial'] + '.')}"]
    return lines + toml_lines(as_overrides(best["values"]))


def toml_lines(overrides: list[str]) -> list[str]:
    """Return overrides as lines of an experiment file, each setting once: the last one wins.

    A user-defined part is named without its folder, as everywhere in a report.
    """
    given: dict[str, Any] = {}
    for text in overrides:
        given |= dict(leaves(as_typed(text.partition("=")[2]), path_of(text)))
    return [f"{path} = {json.dumps(without_folders(value), ensure_ascii=False)}" for path, value in given.items()]
