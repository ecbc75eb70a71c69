"""A search for good settings: an experiment file with a table `[search]` instead of variants, read and checked.

    question = "Which learning rate and depth suit the small network?"
    preset = "cpu"                  # settings that all trials start from
    epochs = 10                     # the budget of one trial: epochs or steps
    hold_out = 0.1                  # the validation split; its accuracy is what the search maximizes

    [search]
    trials = 40                     # how many settings are tried, by all machines together
    sampler = "tpe"                 # default; or "random"
    pruner = "asha"                 # default; or "none": every trial trains to its end
    min_evaluations = 1             # with "asha": evaluations before a trial can be pruned (default: 1)
    reduction_factor = 3            # with "asha": one in so many trials continues after each rung (default: 3)
    seed = 1000000                  # of the sampler, and of every trial (default: 1000000, which no comparison has)

    [search.space]
    optimizer.params.lr = { low = 1e-4, high = 1e-2, log = true }
    model.depth = { low = 2, high = 6 }                 # whole numbers; step = 2 takes every second one
    model.feed_forward = ["mlp", "geglu"]

Every other key is a setting for all trials. `compare.py` runs the file as it runs comparisons. Sampler and pruner are
Optuna's: tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011) and asynchronous successive halving (Li et
al., arXiv 1810.05934).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import SettingsError, unknown
from comparison.experiment import Experiment, Variant
from comparison.experiment_file import NAME, as_overrides, resolve_quietly
from comparison.search_space import Choice, Range, is_number, is_whole, read_space
from comparison.tuning import FIRST_SEED
from config.overrides import path_of
from config.settings import check_keys, combine
from config.toml_file import read_toml

FILE_KEYS: dict[str, Any] = {"question": None, "preset": "cpu", "dataset": "cifar100", "hold_out": 0.1}
BUDGETS = ("epochs", "steps")
NOT_HERE = {
    "variants": "a search makes its variants itself; compare the best ones in a file of their own",
    "arms": "a search makes its variants itself; compare the best ones in a file of their own",
    "sizes": "a search has one size; use a file for each",
    "seeds": "a search trains each trial once; compare the best ones with several seeds in a file of their own",
    "seconds": "the budget of a search is in epochs or steps",
    "match": "a search does not resize networks",
}
SEARCH_KEYS: dict[str, Any] = {
    "trials": None,
    "sampler": "tpe",
    "pruner": "asha",
    "min_evaluations": 1,
    "reduction_factor": 3,
    "seed": FIRST_SEED,
    "space": None,
}
SAMPLERS, PRUNERS = ("tpe", "random"), ("asha", "none")
MOST_TRIALS = 100_000  # against a typing mistake
PROBES = 20  # random combinations that are checked before the first run


@dataclass(frozen=True)
class Search:
    """A search: what all trials share, and the space of what they differ in.

    Attributes:
        experiment: name, question, preset, budget and dataset, with the settings of all trials as its one variant.
        space: path of a setting -> its possible values.
    """

    experiment: Experiment
    space: dict[str, Range | Choice]
    trials: int
    sampler: str
    pruner: str
    min_evaluations: int
    reduction_factor: int
    seed: int

    def variant(self, name: str, values: Mapping[str, Any]) -> Variant:
        """Return the variant of one trial. Raises SettingsError where the values do not fit together."""
        overrides, _ = combine(self.experiment.preset, self.experiment.variants[0].overrides, as_overrides(values))
        return Variant(name, describe(values), overrides, resolve_quietly(self.experiment.preset, overrides))

    def definition(self) -> dict[str, Any]:
        """Return what must not change while the trials of one study are made; their number may."""
        return {
            "preset": Path(self.experiment.preset).name,
            "dataset": self.experiment.dataset,
            "hold_out": self.experiment.hold_out,
            "budget": [self.experiment.budget, self.experiment.budget_amount],
            "settings": self.experiment.variants[0].settings.as_dict(),
            "space": {path: str(values) for path, values in self.space.items()},
            "pruner": [self.pruner, self.min_evaluations, self.reduction_factor],
            "seed": self.seed,
        }


def is_search(path: Path) -> bool:
    """Whether an experiment file has a table [search]; False for a file that cannot be read."""
    try:
        return "search" in read_toml(path, str(path))
    except SettingsError:
        return False


def read_search(path: Path, overrides: list[str]) -> Search:
    """Read a file with [search].

    Args:
        overrides: texts `path=value` for all trials.

    Raises:
        SettingsError: the file cannot be used; the message names the file and the key.
    """
    tree = read_toml(path, str(path))
    where = path.name
    facts = _check_facts(where, tree)
    budget = _check_budget(where, tree)
    found = _check_search(where, tree["search"])
    fixed = {key: value for key, value in tree.items() if key not in (*FILE_KEYS, *BUDGETS, "search")}
    for text in overrides:
        key = path_of(text)
        if key.split(".")[0] in (*FILE_KEYS, *BUDGETS, *NOT_HERE):
            raise SettingsError(f"--set {text} has no effect on a search; set {key} in the experiment file")
    own = as_overrides(fixed)
    set_already = {path_of(text) for text in own + overrides}
    for name in found["space"]:
        if name.removeprefix("engine.") in set_already:
            raise SettingsError(f"{where}: [search.space] varies {name}, which is also set for all trials; remove one")
    preset = facts["preset"]
    if preset.endswith(".toml"):  # a file next to this one, or an absolute path
        preset = str((path.parent / preset).resolve())
    try:
        base, _ = combine(preset, own, overrides)
        settings = resolve_quietly(preset, base)
    except SettingsError as error:
        raise SettingsError(f"{where}: {error}") from None
    one = Variant("search", facts["question"], base, settings)
    experiment = Experiment(
        name=path.stem,
        question=facts["question"],
        preset=preset,
        dataset=facts["dataset"],
        seeds=1,
        hold_out=float(facts["hold_out"]),
        budget=budget,
        budget_amount=tree[budget],
        variants=[one],
    )
    if not NAME.fullmatch(path.stem):
        raise SettingsError(f"{where}: name the file with letters, digits, '.', '_' and '-'; run folders are named so")
    return Search(experiment, **found)


def check_space(search: Search, where: str, build: Callable[[Variant], object]) -> None:
    """Build the networks of every extreme value by itself and of some random combinations.

    Args:
        build: builds the network of a variant without training it. Raises SettingsError where that is impossible.

    Raises:
        SettingsError: a value is wrong in every combination that was tried; the message names it.
    """
    for name, values in search.space.items():
        for value in values.extremes():
            if problem := _problem(search, {name: value}):  # a name, a type or a range, whatever the others are
                raise SettingsError(f"{where}: [search.space] {name} = {value}: {problem}")
    generator = random.Random(search.seed)
    for name, values in search.space.items():
        for value in values.extremes():
            problems = []
            for attempt in range(PROBES):  # with others at their first values, then at random ones
                drawn = {
                    path: its.draw(generator) if attempt else its.extremes()[0] for path, its in search.space.items()
                }
                problems.append(_problem(search, drawn | {name: value}, build))
                if problems[-1] is None:
                    break
            else:
                raise SettingsError(f"{where}: [search.space] {name} = {value}: {problems[0]}")


def _problem(
    search: Search, values: Mapping[str, Any], build: Callable[[Variant], object] = lambda variant: None
) -> str | None:
    """Return why a combination of values cannot be trained; None where it can."""
    try:
        build(search.variant("trial", values))
    except SettingsError as error:
        return str(error).removeprefix("variant 'trial': ")
    return None


def describe(values: Mapping[str, Any]) -> str:
    """Return the values of a trial in one line: `model.depth = 3, optimizer.params.lr = 0.00123`."""
    texts = (f"{value:.3g}" if isinstance(value, float) else str(value) for value in values.values())
    return ", ".join(f"{path} = {text}" for path, text in zip(values, texts, strict=True))


def _check_facts(where: str, tree: dict[str, Any]) -> dict[str, Any]:
    """Return the values of FILE_KEYS. Raises SettingsError for a wrong value or a key that a search does not have."""
    for key, reason in NOT_HERE.items():
        if key in tree:
            raise SettingsError(f"{where}: {key} does not go with [search]: {reason}")
    check_keys(where, tree, [*FILE_KEYS, *BUDGETS, "search"])
    facts = {key: tree.get(key, default) for key, default in FILE_KEYS.items()}
    for key in ("question", "preset", "dataset"):
        if not isinstance(facts[key], str):
            raise SettingsError(f'{where}: {key} must be a text, such as {key} = "...", not {facts[key]!r}')
    if not is_number(facts["hold_out"]) or not 0 < facts["hold_out"] < 1:
        raise SettingsError(
            f"{where}: hold_out must lie between 0 and 1, not {facts['hold_out']!r}: "
            "the search maximizes the accuracy on the validation split"
        )
    return facts


def _check_budget(where: str, tree: dict[str, Any]) -> str:
    """Return which of BUDGETS the file gives. Raises SettingsError unless it gives exactly one, at least 1."""
    budgets = [key for key in BUDGETS if key in tree]
    if len(budgets) != 1 or not is_whole(tree[budgets[0]], 1, 10**12):
        given = " and ".join(f"{key} = {tree[key]!r}" for key in budgets) or "none"
        raise SettingsError(f"{where}: give exactly one budget, epochs = N or steps = N, N at least 1, not {given}")
    return budgets[0]


def _check_search(where: str, table: Any) -> dict[str, Any]:
    """Return the values of the table [search], its space read. Raises SettingsError."""
    if not isinstance(table, dict):
        raise SettingsError(f"{where}: [search] must be a table, not {table!r}")
    for key in table:
        if key not in SEARCH_KEYS:
            raise SettingsError(f"{where}: [search]: " + unknown("key", key, list(SEARCH_KEYS)))
    found = {key: table.get(key, default) for key, default in SEARCH_KEYS.items()}
    for key, known in (("sampler", SAMPLERS), ("pruner", PRUNERS)):
        if found[key] not in known:
            raise SettingsError(f"{where}: [search]: " + unknown(key, str(found[key]), list(known)))
    limits = {
        "trials": (1, MOST_TRIALS),
        "min_evaluations": (1, 10**9),
        "reduction_factor": (2, 1000),
        "seed": (0, 2**32 - 1),
    }
    for key, (low, high) in limits.items():
        if not is_whole(found[key], low, high):
            raise SettingsError(
                f"{where}: [search]: {key} must be a whole number from {low} to {high}, not {found[key]!r}"
            )
    if found["pruner"] == "none" and {"min_evaluations", "reduction_factor"} & set(table):
        raise SettingsError(f'{where}: [search]: min_evaluations and reduction_factor need pruner = "asha"')
    if not isinstance(found["space"], dict) or not found["space"]:
        raise SettingsError(
            f"{where}: [search.space] is missing; add for example model.depth = {{ low = 2, high = 6 }}"
        )
    found["space"] = read_space(f"{where}: [search.space]", found["space"])
    for name in found["space"]:
        if name.split(".")[0] in (*FILE_KEYS, *BUDGETS, *NOT_HERE):
            raise SettingsError(f"{where}: [search.space] {name} is the same for all trials; set it outside [search]")
    return found
