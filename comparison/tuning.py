"""Settings that are tuned for each variant: candidates, rungs of successive halving, and the choice.

    [tune]                                               # in an experiment file; tune = { ... } is the same
    "optimizer.params.lr" = [1.5e-3, 5e-3, 1.5e-2]       # values to try; the lists of several settings form a grid
    seeds = 2                                            # kept for tuning: never those of the comparison (default: 2)
    rungs = [0.25, 1.0]                                  # shares of the budget that the runs get (default)
    eta = 2                                              # a rung passes the best 1/eta on, at least 2 (default: 2)
    report_shared = true                                 # also compare with the file's own value for all (default)

Instead of lists, `candidates = [{ "optimizer.params.lr" = 1e-3, "schedule.warmup_fraction" = 0.1 }, ...]` names each
combination. All candidates of a variant train on the first rung, the best of them on the next, which is longer. Each
run starts from scratch, and its learning-rate schedule has the length of its rung. The best of the last rung is chosen:
the highest mean accuracy on the validation split over the tuning seeds. Of equal means, the first in the file wins. A
candidate that diverges with any seed is out. A short run often prefers a larger learning rate than a long one; a small
eta keeps the neighbors of its best value.

Successive halving: Jamieson and Talwalkar, arXiv 1502.07943. Nothing here imports PyTorch or reads a file.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from common.errors import SettingsError, unknown
from config.own_parts import without_folders

FIRST_SEED = 1_000_000  # of tuning; a comparison has seeds from 0 to at most MOST_SEEDS - 1 of experiment_keys.py
LEAST_SEEDS, MOST_SEEDS = 2, 100
MOST_CANDIDATES = 100  # against a typing mistake in a grid
OPTIONS = ("candidates", "seeds", "rungs", "eta", "report_shared")
MOST = 1e300  # numbers must be smaller; NaN and infinity are not
DIVERGED = -math.inf  # the accuracy of a run whose loss became NaN or infinite


@dataclass(frozen=True)
class Rung:
    """One round of successive halving: so many candidates, each trained for a share of the budget."""

    share: float
    candidates: int  # at most; fewer where some diverged


@dataclass(frozen=True)
class Tuning:
    """The table `tune` of an experiment file."""

    keys: tuple[str, ...]  # paths of the settings
    candidates: tuple[tuple[Any, ...], ...]  # one value per key
    num_seeds: int = 2
    shares: tuple[float, ...] = (0.25, 1.0)  # of the budget, one per rung
    eta: float = 2.0
    report_shared: bool = True

    @property
    def seeds(self) -> range:
        """The seeds kept for tuning."""
        return range(FIRST_SEED, FIRST_SEED + self.num_seeds)

    def rungs(self) -> list[Rung]:
        """Return the rungs. One after which no candidate would be dropped is left out."""
        found, alive = [], len(self.candidates)
        for i, share in enumerate(self.shares):
            is_last = i == len(self.shares) - 1
            after = 1 if is_last else max(2, math.ceil(alive / self.eta))
            if after < alive:
                found.append(Rung(share, alive))
                alive = after
        return found

    def overrides(self, candidate: int) -> list[str]:
        """Return a candidate as texts `path=value`."""
        return [f"{key}={json.dumps(value)}" for key, value in zip(self.keys, self.candidates[candidate], strict=True)]

    def values(self, candidate: int) -> dict[str, Any]:
        """Return a candidate as path -> value, as it is published: a user-defined part without its folder."""
        return dict(zip(self.keys, without_folders(list(self.candidates[candidate])), strict=True))

    def name_of(self, candidate: int) -> str:
        """Return a candidate as a part of a folder name, such as `lr=0.005`. It depends on the values alone."""
        return "-".join(f"{name}={text}" for name, text in self._words(candidate))

    def describe(self, candidate: int) -> str:
        """Return a candidate for people, such as "lr 0.005"."""
        return ", ".join(f"{name} {text}" for name, text in self._words(candidate))

    def _words(self, candidate: int) -> list[tuple[str, str]]:
        last = [key.rpartition(".")[2] for key in self.keys]
        names = last if len(set(last)) == len(last) else self.keys
        values = without_folders(list(self.candidates[candidate]))
        texts = [re.sub(r"[^A-Za-z0-9.+-]+", "_", json.dumps(value)).strip("_") for value in values]
        return list(zip(names, texts, strict=True))

    def at_edge(self, candidate: int) -> list[str]:
        """Return a sentence for every number of a candidate that is the smallest or largest one tried."""
        found = []
        for i, key in enumerate(self.keys):
            value, tried = self.candidates[candidate][i], [one[i] for one in self.candidates]
            if all(_is_number(one) for one in tried) and min(tried) < max(tried) and value in (min(tried), max(tried)):
                side = "smallest" if value == min(tried) else "largest"
                found.append(f"{key} = {json.dumps(value)} is the {side} value of the grid: widen the grid")
        return found


@dataclass(frozen=True)
class Search:
    """The search of one variant, as far as its finished runs tell."""

    accuracies: list[dict[int, dict[int, float]]]  # of each rung begun: candidate -> seed -> points, or DIVERGED
    waiting: list[int]  # candidates of the newest rung that have runs left; empty where the search has ended
    chosen: int | None  # None while runs are left, and where every candidate diverged


def search(tuning: Tuning, accuracy: Callable[[int, int, int], float | None]) -> Search:
    """Repeat successive halving with the runs that are finished.

    The result depends on the accuracies alone, so it is the same while the runs are made, after a restart, and in the
    report.

    Args:
        accuracy: of a rung, a candidate and a seed, in points on the validation split; None for an unfinished run.
    """
    rungs, alive = tuning.rungs(), list(range(len(tuning.candidates)))
    found: list[dict[int, dict[int, float]]] = []
    for i in range(len(rungs)):
        seen: dict[int, dict[int, float]] = {}
        for one in alive:
            values = {seed: accuracy(i, one, seed) for seed in tuning.seeds}
            seen[one] = {seed: value for seed, value in values.items() if value is not None}
        found.append(seen)
        if waiting := [one for one in alive if not _is_complete(seen[one], tuning)]:
            return Search(found, waiting, None)
        ranked = rank(seen)
        if len(ranked) < 2 or i == len(rungs) - 1:
            return Search(found, [], ranked[0] if ranked else None)
        alive = sorted(ranked[: rungs[i + 1].candidates])
    raise AssertionError("a tuning has at least one rung")


def _is_complete(by_seed: Mapping[int, float], tuning: Tuning) -> bool:
    return len(by_seed) == tuning.num_seeds or DIVERGED in by_seed.values()


def rank(accuracies: Mapping[int, Mapping[int, float]]) -> list[int]:
    """Return the candidates by their mean accuracies, the best first, without those that diverged.

    Of equal means, the smaller number comes first. Means are rounded, because the order of summation must not decide.
    """
    means = {one: round(mean(by_seed), 9) for one, by_seed in accuracies.items()}
    alive = [one for one in means if means[one] > DIVERGED]
    return sorted(alive, key=lambda one: (-means[one], one))


def mean(by_seed: Mapping[int, float]) -> float:
    """Return the mean over seeds, DIVERGED where one diverged."""
    return DIVERGED if DIVERGED in by_seed.values() else math.fsum(by_seed.values()) / len(by_seed)


# --- the table of the file ------------------------------------------------------------------------------------------


def read_tuning(where: str, table: Any) -> Tuning:
    """Read the table `tune`.

    Args:
        where: begins every message, such as "pairs.toml".

    Raises:
        SettingsError: the table cannot be used. Whether its settings exist is checked with each variant.
    """
    if not isinstance(table, dict):
        raise SettingsError(
            f'{where}: tune must be a table such as {{ "optimizer.params.lr" = [1e-3, 3e-3] }}, not {table!r}'
        )
    lists = _flatten(where, {key: value for key, value in table.items() if key not in OPTIONS})
    if "candidates" in table:
        if lists:
            raise SettingsError(
                f"{where}: tune names {next(iter(lists))} next to candidates; put it into each candidate, or leave "
                "candidates out"
            )
        keys, candidates = _read_candidates(where, table["candidates"])
    else:
        keys, candidates = _read_grid(where, lists)
    if not 2 <= len(candidates) <= MOST_CANDIDATES:
        problem = "nothing to choose from" if len(candidates) < 2 else f"more than {MOST_CANDIDATES} candidates"
        raise SettingsError(f"{where}: tune has {len(candidates)} candidate(s), which is {problem}; change its lists")
    for i, one in enumerate(candidates):
        if _exactly(one) in map(_exactly, candidates[:i]):
            raise SettingsError(f"{where}: tune.candidates names {dict(zip(keys, one, strict=True))} twice; remove one")
    found = Tuning(keys, candidates, *_read_options(where, table))
    names = [found.name_of(i) for i in range(len(candidates))]
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise SettingsError(
            f"{where}: tune: two candidates would both be called {twice}, also in the names of their run folders; "
            "rename a file or a class"
        )
    return found


def _flatten(where: str, tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return path -> value; a path may be written as one quoted key or as nested tables."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        for inner, leaf in (_flatten(where, value, f"{path}.") if isinstance(value, dict) else {path: value}).items():
            inner = inner.removeprefix("engine.")
            if inner in found:
                raise SettingsError(f"{where}: tune names {inner} twice; remove one")
            found[inner] = leaf
    return found


def _read_grid(where: str, lists: dict[str, Any]) -> tuple[tuple[str, ...], tuple[tuple[Any, ...], ...]]:
    if not lists:
        raise SettingsError(
            f'{where}: tune names no setting; add one, such as "optimizer.params.lr" = [1e-3, 3e-3, 1e-2]'
        )
    for path, values in lists.items():
        if not isinstance(values, list):
            problem = f"{path} must be a list of values to try, not {values!r}"
            if "." not in path:
                problem = unknown("option", path, list(OPTIONS))
            raise SettingsError(f"{where}: tune: {problem}")
        if len(values) < 2:
            raise SettingsError(f"{where}: tune: {path} needs at least two values to choose from, not {values!r}")
        for i, value in enumerate(values):
            _check_finite(where, path, value)
            if _exactly(value) in map(_exactly, values[:i]):
                raise SettingsError(f"{where}: tune: {path} lists {value!r} twice; remove one")
    return tuple(lists), tuple(itertools.product(*lists.values()))


def _read_candidates(where: str, candidates: Any) -> tuple[tuple[str, ...], tuple[tuple[Any, ...], ...]]:
    if not isinstance(candidates, list) or not all(isinstance(one, dict) and one for one in candidates):
        raise SettingsError(
            f'{where}: tune.candidates must be a list of tables such as {{ "optimizer.params.lr" = 1e-3 }}, not '
            f"{candidates!r}"
        )
    flat = [_flatten(where, one) for one in candidates]
    for one in flat:
        if one.keys() != flat[0].keys():
            raise SettingsError(
                f"{where}: every one of tune.candidates must set the same settings; one sets {', '.join(flat[0])}, "
                f"another {', '.join(one)}"
            )
        for path, value in one.items():
            _check_finite(where, path, value)
    keys = tuple(flat[0]) if flat else ()
    return keys, tuple(tuple(one[key] for key in keys) for one in flat)


def _check_finite(where: str, path: str, value: Any) -> None:
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, (int, float)) and not abs(number) < MOST:
            raise SettingsError(f"{where}: tune: {path} must have finite numbers, not {number}")
        if not isinstance(number, (bool, int, float, str)):
            raise SettingsError(f"{where}: tune: {path} must have numbers, texts, or lists of them, not {number!r}")


def _read_options(where: str, table: dict[str, Any]) -> tuple[int, tuple[float, ...], float, bool]:
    seeds, eta, shared = table.get("seeds", 2), table.get("eta", 2), table.get("report_shared", True)
    shares = table.get("rungs", [0.25, 1.0])
    if isinstance(seeds, bool) or not isinstance(seeds, int) or not LEAST_SEEDS <= seeds <= MOST_SEEDS:
        raise SettingsError(
            f"{where}: tune.seeds must be a whole number from {LEAST_SEEDS} to {MOST_SEEDS}, not {seeds!r}: one run "
            "cannot distinguish a better value from a lucky seed"
        )
    is_list = (
        isinstance(shares, list) and bool(shares) and all(_is_number(share) and 0 < share <= 1 for share in shares)
    )
    if not is_list or any(share >= after for share, after in itertools.pairwise(shares)):
        raise SettingsError(
            f"{where}: tune.rungs must be increasing shares of the budget above 0 and up to 1, such as [0.25, 1.0], "
            f"not {shares!r}"
        )
    if not _is_number(eta) or not 1 < eta <= MOST_CANDIDATES:
        raise SettingsError(f"{where}: tune.eta must be a number above 1, such as 2, not {eta!r}")
    if not isinstance(shared, bool):
        raise SettingsError(f"{where}: tune.report_shared must be true or false, not {shared!r}")
    return seeds, tuple(float(share) for share in shares), float(eta), shared


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < MOST


def _exactly(value: Any) -> str:
    """A text that is the same for equal values only: 1 and 1.0 are equal, 1 and true are not."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_exactly, value))}]"
    return repr(float(value)) if _is_number(value) else repr(value)
