"""Seeds in rounds: a group-sequential comparison that ends when every variant is decided.

After each round (a look) the variants are tested at a part of the error rate of 5 %. The parts are increments of the
O'Brien-Fleming-type spending function of Lan and DeMets (Biometrika 70, 1983), and add up to 5 %. Hence all claims of
all looks together are wrong in at most 5 of 100 comparisons, whatever the test (union bound). A decided variant gets no
further seeds, nor does one that is identical to the first with at least 3 seeds. A variant is dropped as hopeless when
even the largest number of seeds would decide it with a probability below 10 %, given its current effect. One whose runs
failed is left out of the looks, and nothing is claimed of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from scipy import stats

from comparison.paired_tests import ALPHA, power_of
from comparison.significance import CONFIRMED, Difference, compare

LEAST_POWER = 0.1
LEAST_SEEDS_IDENTICAL = 3  # below this, the same number of correct images may be chance, not a change without effect
DECIDED = (*CONFIRMED, "equivalent")


@dataclass(frozen=True)
class Look:
    """One look at the results: after `seeds` seeds, at the error rate `alpha`."""

    number: int  # from 1
    seeds: int
    alpha: float


@dataclass(frozen=True)
class Outcome:
    """The state of a sequential comparison after the looks that its runs allow."""

    differences: dict[str, Difference]  # variant -> verdict at the look that decided or dropped it, else at the newest
    active: list[str]  # variants without a decision that took part in the newest look
    looks: int  # that were made
    at: dict[str, Look]  # variant -> the look of its verdict; one that is not tested has none


def plan_looks(first: int, most: int) -> list[Look]:
    """Return the looks of a comparison that starts with `first` seeds and adds as many in each round, up to `most`."""
    counts = [*range(first, most, first), most]
    quantile = stats.norm.ppf(1 - ALPHA / 2)
    spent = [float(2 * stats.norm.sf(quantile / math.sqrt(count / most))) for count in counts]
    return [
        Look(i + 1, count, total - before)
        for i, (count, total, before) in enumerate(zip(counts, spent, [0.0, *spent], strict=False))
    ]


def evaluate(
    accuracies: dict[str, dict[int, float]], first: str, looks: list[Look], margin: float | None, planned: int
) -> Outcome:
    """Repeat all looks that the finished seeds allow.

    A look tests the variants that have all of its seeds, if the first one has them; a variant that lacks one does not
    take part in this look and later ones. The result depends on the accuracies alone, so it is the same while the
    comparison runs, after a restart, and in the report.

    Args:
        accuracies: variant -> seed -> accuracy in points.
        planned: number of comparisons, for Holm's correction; variants that are decided still count.
    """
    active = [name for name in accuracies if name != first]
    found: dict[str, Difference] = {}
    at: dict[str, Look] = {}
    made = 0
    for look in looks:
        seeds = range(look.seeds)
        ready = [name for name in [first, *active] if all(seed in accuracies[name] for seed in seeds)]
        if first not in ready or len(ready) == 1:
            break
        active, made = ready[1:], look.number
        now = {name: {seed: accuracies[name][seed] for seed in seeds} for name in [first, *active]}
        for name, one in compare(now, first, margin, planned, look.alpha, looks[-1].alpha).items():
            note, at[name] = _note(look, looks), look
            is_identical = one.verdict == "identical" and one.seeds >= LEAST_SEEDS_IDENTICAL
            if one.verdict not in DECIDED and not is_identical:
                if look.number == len(looks) or not is_hopeless(one, looks[-1], margin, planned):
                    found[name] = replace(one, sentence=one.sentence + note)
                    continue
                one = replace(one, verdict="inconclusive", sentence=one.sentence + note + "; dropped as hopeless")
            else:
                one = replace(one, sentence=one.sentence + note)
            found[name] = one
            active.remove(name)
    untested = {name: by_seed for name, by_seed in accuracies.items() if name not in found}
    return Outcome(compare(untested, first, margin, planned, alpha=None) | found, active, made, at)


def on_another_split(
    accuracies: dict[str, dict[int, float]],
    outcome: Outcome,
    first: str,
    looks: list[Look],
    margin: float | None,
    planned: int,
) -> dict[str, Difference]:
    """Test another split once: each variant with the seeds and at the level of the look of its verdict.

    What the looks saw is correlated with this split, as the networks are the same. Their levels add up to 5 %, so at
    most 5 of 100 comparisons make a wrong claim here too, whichever look was chosen.

    Args:
        accuracies, margin, planned: as for `evaluate`.
        outcome: of the split that the looks saw.
    """
    found: dict[str, Difference] = {}
    for look in looks:
        names = [name for name, its in outcome.at.items() if its == look]
        now = {
            name: {seed: accuracy for seed, accuracy in accuracies[name].items() if seed < look.seeds}
            for name in [first, *names]
        }
        for name, one in compare(now, first, margin, planned, look.alpha, looks[-1].alpha).items():
            found[name] = replace(one, sentence=one.sentence + _note(look, looks))
    untested = {name: by_seed for name, by_seed in accuracies.items() if name not in found}
    return compare(untested, first, margin, planned, alpha=None) | found


def _note(look: Look, looks: list[Look]) -> str:
    return f" (look {look.number} of {len(looks)}, level {look.alpha:.2g})"


def is_hopeless(one: Difference, last: Look, margin: float | None, planned: int) -> bool:
    """Whether the last look would decide a variant with a probability below 10 %, given its current effect."""
    if one.effect is None:
        return False
    if power_of(one.effect, last.seeds, planned, last.alpha) >= LEAST_POWER:
        return False
    if not margin:
        return True
    room = (margin - abs(one.mean)) / abs(one.mean / one.effect) if one.mean else math.inf
    critical = stats.t.ppf(1 - last.alpha / planned, last.seeds - 1)
    return float(stats.nct.sf(critical, last.seeds - 1, room * math.sqrt(last.seeds))) < LEAST_POWER
