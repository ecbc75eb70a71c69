"""A planned run of train.py, and whether its folder already holds it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import RunError
from common.text import last_error
from config.differences import comparable, differences
from config.settings import resolve
from records.run_folder import RunFolder

NON_FINITE = re.compile(r"^error: the (loss|gradient's norm) is (nan|-?inf)\b")  # training/non_finite.py


@dataclass(frozen=True)
class PlannedRun:
    """One run of one variant. `expected` are the facts that its run.json must hold to count as this run."""

    name: str
    folder: Path
    arguments: list[str]  # of train.py
    expected: dict[str, Any]
    variant: str = ""  # all runs of one variant have the same source code
    row: str = ""  # in the table of progress; empty: the variant

    def state(self) -> str:
        """Return "new", "unfinished", "finished", or what differs between the existing run and this one."""
        record = RunFolder(self.folder)
        if not record.exists:
            return "new"
        try:
            facts = record.facts()
            facts["fingerprint"] = facts.get("dataset", {}).get("fingerprint")
        except (RunError, AttributeError):
            return "its run.json is damaged"
        changed = [
            text for key, value in self.expected.items() for text in differences(comparable(facts, key), value, key)
        ]
        if changed:
            return "; ".join(changed)
        return "finished" if record.is_finished() else "unfinished"

    def why_missing(self) -> str:
        """Return why a report cannot use the run, which is not finished."""
        state = self.state()
        reasons = {"new": "was not run", "unfinished": self.divergence() or "is not finished"}
        return reasons.get(state) or f"its folder holds a run of other settings ({state})"

    def has_diverged(self) -> bool:
        """Whether an unfinished run ended because its loss became NaN or infinite, so that it is not run again."""
        return self.divergence() is not None

    def divergence(self) -> str | None:
        """Return the error of a run that has diverged; None for every other run."""
        if self.state() != "unfinished" or not self.log.is_file():
            return None
        error = last_error(self.log.read_text(errors="replace")) or ""
        return error if NON_FINITE.search(error) else None

    def changed_settings(self) -> list[str]:
        """Return how the settings that the run would train with now differ from the planned ones.

        They follow from its arguments, and from the preset and `ds_config.json` as they are on the disk now.
        """
        pairs = list(zip(self.arguments, self.arguments[1:], strict=False))
        presets = [value for flag, value in pairs if flag == "--preset"]
        if not presets:
            return []
        overrides = [value for flag, value in pairs if flag == "--set"]
        now = resolve(presets[-1], overrides, epochs=self.expected["settings"]["epochs"])
        return differences(self.expected["settings"], now.as_dict())

    def is_left(self) -> bool:
        """Whether the run is still to be made: it has neither finished nor diverged."""
        return self.state() != "finished" and not self.has_diverged()

    @property
    def log(self) -> Path:
        """Output of the run."""
        return self.folder.with_name(f"{self.folder.name}.log")
