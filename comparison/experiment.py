"""An experiment and its variants, as `experiment_file.py` reads them from a file `experiments/<name>.toml`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from common.errors import SettingsError
from comparison.tuning import Tuning
from config.settings import Settings, combine, resolve


@dataclass(frozen=True)
class Variant:
    """One of the things compared. `overrides` are the texts `path=value` that `train.py --set` gets."""

    name: str
    idea: str
    overrides: list[str]
    settings: Settings
    is_matched: bool = True  # False where the variant says match = "none"
    run_prefix: str = ""  # of the names of its run folders; empty: its name
    left_out: tuple[str, ...] = ()  # overrides of the whole file for a part that the variant replaces

    def run_name(self, seed: int) -> str:
        """Return the name of its run folder with a seed."""
        return f"{self.run_prefix or self.name}-seed{seed}"


@dataclass(frozen=True)
class Experiment:
    """An experiment file at one of its sizes."""

    name: str  # of the file, with the size
    question: str
    preset: str
    dataset: str
    seeds: int
    hold_out: float
    budget: str  # epochs, steps or seconds
    budget_amount: float
    variants: list[Variant]
    match: str = "none"  # the cost that is made equal: none, parameters or flops
    margin: float | None = None  # points within which a difference does not matter
    max_seeds: int | None = None  # with until = "decided": seeds are added in rounds up to this many
    round_seeds: int | None = None  # seeds per round; `seeds` is then the number that was reached
    tuning: Tuning | None = None  # settings that are chosen for each variant before the comparison
    max_runs: int | None = None  # of tuning and comparison together
    max_hours: float | None = None  # summed over these runs
    evaluate_every: str | None = None  # interval of evaluations; None: every epoch

    @property
    def budget_text(self) -> str:
        """The budget of a run, for the screen and reports: 10 epochs, 1 epoch."""
        return f"{self.budget_number} {self.budget.removesuffix('s') if self.budget_amount == 1 else self.budget}"

    @property
    def budget_number(self) -> str:
        """The amount of the budget with all its digits, as an experiment file states it."""
        whole = int(self.budget_amount)
        return str(whole if whole == self.budget_amount else self.budget_amount)

    def tasks(self) -> list[tuple[Variant, int]]:
        """Return every variant with every seed."""
        return [(variant, seed) for variant in self.variants for seed in range(self.seeds)]


def with_candidate(variant: Variant, preset: str, tuning: Tuning, candidate: int) -> Variant:
    """Return a variant with a candidate's values, and run folders of their own unless these are its values already."""
    overrides, _ = combine(preset, variant.overrides, tuning.overrides(candidate))
    settings = resolve(preset, overrides)
    if settings == variant.settings:
        return variant
    prefix = f"{variant.name}-{tuning.name_of(candidate)}"
    return replace(variant, overrides=overrides, settings=settings, run_prefix=prefix)


def check_candidates(where: str, variant: Variant, preset: str, tuning: Tuning) -> None:
    """Raise SettingsError where a candidate does not fit a variant, or two of them are the same for it."""
    seen: dict[int, Settings] = {}
    for i in range(len(tuning.candidates)):
        try:
            settings = with_candidate(variant, preset, tuning, i).settings
        except SettingsError as error:
            message = str(error)
            for text in tuning.overrides(i):
                message = message.replace(f"--set {text}: ", "")
            raise SettingsError(f"{where}: tune: variant '{variant.name}': {message}") from None
        for other, of_other in seen.items():
            if settings == of_other:
                raise SettingsError(
                    f"{where}: tune: {tuning.describe(other)} and {tuning.describe(i)} are the same for variant "
                    f"'{variant.name}'; remove one"
                )
        seen[i] = settings


def check_distinct(path_name: str, variants: list[Variant], advice: str = "") -> None:
    """Raise SettingsError where two variants have the same settings, since they would be the same runs twice."""
    for i, variant in enumerate(variants):
        for other in variants[:i]:
            if variant.settings == other.settings:
                raise SettingsError(
                    f"{path_name}: the variants '{other.name}' and '{variant.name}' have the same settings{advice}"
                )
