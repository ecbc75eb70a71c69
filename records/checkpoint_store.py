"""Checkpoints on the disk, which are intact or not there. `state/step-00000780/` holds

    state.safetensors          the tensors of Engine.gather_state: weights, optimizer states and others
    engine.json progress.json  number of steps and conditions; position of the run
    run.json metrics.jsonl     copies of the run folder's files at that step, to restore them from
    SHA256SUMS                 checksum of every file, for `sha256sum -c SHA256SUMS`

A checkpoint is written as `unfinished-step-...`, flushed, read back, compared and renamed; only then are older ones
removed. So the previous checkpoint stays intact whenever writing ends: by a kill, a power loss or a full disk. The next
start sets aside as `damaged-step-...` what is unfinished or does not match its checksums.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import RunError
from common.files import bytes_text, flush_to_disk, room_left, sha256_of

STATE, ENGINE, PROGRESS, SUMS = "state.safetensors", "engine.json", "progress.json", "SHA256SUMS"
UNFINISHED, REPLACED, DAMAGED = "unfinished-", "replaced-", "damaged-"
KEEP_DAMAGED = 2  # newest damaged checkpoints, kept for inspection
BYTES_PER_VALUE = 4  # fp32
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def step_name(step: int) -> str:
    """Return the folder name of the checkpoint after optimizer step `step`."""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """Inverse of `step_name`."""
    return int(folder.name.removeprefix("step-"))


def checkpoints_in(folder: Path) -> list[Path]:
    """Return all complete checkpoints in a folder `state/`, oldest first; complete ones may still be damaged."""
    return sorted(folder.glob("step-*"))


@dataclass(frozen=True)
class Interval:
    """Interval between checkpoints or evaluations: optimizer steps, seconds, and epochs whose ends count."""

    steps: float = float("inf")
    seconds: float = float("inf")
    epochs: int = 1

    @classmethod
    def parse(cls, text: str) -> Interval:
        """Parse the interval of checkpoints: `500steps`, `10min`, `30s` or `epochs:5`. Raises ValueError."""
        if found := re.fullmatch(r"epochs:0*([1-9][0-9]{0,8})", text):
            return cls(epochs=int(found[1]))
        found = re.fullmatch(r"([0-9]+)(steps?|min|s)", text)
        if not found or int(found[1]) < 1:
            raise ValueError(f"write it as 500steps, 10min, 30s or epochs:5, not {text}")
        number = int(found[1])
        return (
            cls(steps=number) if found[2].startswith("step") else cls(seconds=number * (60 if found[2] == "min" else 1))
        )

    def __str__(self) -> str:
        """The interval of evaluations as `parse_evaluations` reads it."""
        return f"{self.epochs}epochs" if self.steps == float("inf") else f"{self.steps}steps"

    @classmethod
    def parse_evaluations(cls, text: str) -> Interval:
        """Parse the interval of evaluations: `100steps`, `2epochs` or `2`, which means epochs. Raises ValueError."""
        found = re.fullmatch(r"0*([1-9][0-9]{0,8})(steps?|epochs?)?", text)
        if not found:
            raise ValueError(f"write it as 100steps or 2epochs, not {text}")
        number = int(found[1])
        return cls(steps=number) if (found[2] or "").startswith("step") else cls(epochs=number)


class Checkpoints:
    """The checkpoints of one run in its folder `state/`: the newest `keep`, and the best one."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep

    def all(self) -> list[Path]:
        """Return all complete checkpoints, oldest first; complete ones may still be damaged."""
        return checkpoints_in(self.folder)

    # --- writing --------------------------------------------------------------------------------------------------

    def write(self, step: int, tensors: dict[str, Any], texts: dict[str, str], best_step: int = 0) -> None:
        """Write and verify a checkpoint, then remove older ones; the one at `best_step` stays.

        Raises:
            RunError: it could not be written; earlier checkpoints are unchanged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        final = self.folder / step_name(step)
        unfinished, replaced = self.folder / f"{UNFINISHED}{final.name}", self.folder / f"{REPLACED}{final.name}"
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            save_file(tensors, unfinished / STATE)
            for name, text in texts.items():
                (unfinished / name).write_text(text)
            verify_written(unfinished, tensors, texts)
            # A checkpoint of the same step exists when a run is stopped twice there. It gets its name back if the next
            # rename is not reached.
            if final.exists():
                final.rename(replaced)
            unfinished.rename(final)
            flush_to_disk(self.folder)
        except (OSError, SafetensorError) as error:
            self._put_back_replaced()
            shutil.rmtree(unfinished, ignore_errors=True)  # a partial checkpoint is useless and may fill the disk
            raise RunError(
                f"the checkpoint after step {step:,} could not be written ({self._reason(error)}); "
                f"{self._what_is_left()}"
            ) from error
        self._prune(best_step)

    def _prune(self, best_step: int) -> None:
        kept = {step_name(best_step), *(path.name for path in self.all()[-self.keep :])}
        for path in self.all():
            if path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)
        self._put_back_replaced()
        for path in sorted(self.folder.glob(f"{DAMAGED}*"), key=lambda path: path.stat().st_mtime)[:-KEEP_DAMAGED]:
            shutil.rmtree(path, ignore_errors=True)

    def _reason(self, error: Exception) -> str:
        text = getattr(error, "strerror", None) or re.sub(
            r"^Error while serializing: (I/O error: )?| \(os error \d+\)$", "", str(error)
        )
        if getattr(error, "errno", None) in NO_ROOM or "No space left" in text or "File too large" in text:
            return f"{text}: {bytes_text(room_left(self.folder))} are free in {self.folder.parent.name}/"
        return text

    def _what_is_left(self) -> str:
        intact = self.all()
        before = f"the one after step {step_of(intact[-1]):,} is intact" if intact else "there is no earlier one"
        return f"{before}; free or repair the disk and start the same run again"

    # --- reading --------------------------------------------------------------------------------------------------

    def newest_intact(self) -> tuple[Path | None, list[str]]:
        """Return the newest intact checkpoint, and a sentence for each damaged one, which is set aside."""
        said = []
        shutil.rmtree(self.folder / f"{UNFINISHED}replaced", ignore_errors=True)  # as earlier versions named it
        self._put_back_replaced()
        for path in sorted(self.folder.glob(f"{UNFINISHED}*")):
            name = path.name.removeprefix(UNFINISHED)
            said.append(
                f"the run ended while {name} was being written; the partial checkpoint is now "
                f"state/{self._rename_aside(path, name)}"
            )
        for path in reversed(self.all()):
            problem = find_damage(path)
            if problem is None:
                return path, said
            said.append(f"{path.name} is damaged ({problem}); it is now state/{self._rename_aside(path, path.name)}")
        return None, said

    def _put_back_replaced(self) -> None:
        """Give a replaced checkpoint its name back where its successor was not completed."""
        for path in self.folder.glob(f"{REPLACED}*"):
            final = self.folder / path.name.removeprefix(REPLACED)
            if final.exists():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.rename(final)

    def _rename_aside(self, path: Path, name: str) -> str:
        number, aside = 1, self.folder / f"{DAMAGED}{name}"
        while aside.exists():
            number += 1
            aside = self.folder / f"{DAMAGED}{name}-{number}"
        path.rename(aside)
        return aside.name


def read_facts(folder: Path, name: str) -> dict[str, Any]:
    """Return the content of `engine.json` or `progress.json` of a checkpoint."""
    return json.loads((folder / name).read_text())


# --- checksums --------------------------------------------------------------------------------------------------------


def verify_written(folder: Path, tensors: dict[str, Any], texts: dict[str, str]) -> None:
    """Flush a checkpoint, read it back from the disk, compare it and write its checksums. Raises OSError."""
    import torch
    from safetensors.torch import load_file

    sums = {}
    for name in (STATE, *texts):
        flush_to_disk(folder / name, forget=True)
        sums[name] = sha256_of(folder / name)
    stored = load_file(folder / STATE)
    same = stored.keys() == tensors.keys() and all(
        torch.equal(_bits(stored[key]), _bits(tensors[key])) for key in tensors
    )
    if not same or any(sums[name] != hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()):
        raise OSError(errno.EIO, "the disk returns other bytes than were written")
    (folder / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    flush_to_disk(folder / SUMS)
    flush_to_disk(folder)


def _bits(tensor: Any) -> Any:
    """Return the bytes of a tensor, so that two NaN with the same bits are equal."""
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8)


def find_damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint; None when every byte is as written."""
    try:
        *lines, rest = (folder / SUMS).read_text().split("\n")
        matches = [match for line in lines if (match := re.fullmatch(r"([0-9a-f]{64})  (.+)", line))]
        if len(matches) < len(lines):
            raise ValueError("a line of another form")
        sums = {name: digest for digest, name in (match.groups() for match in matches)}
    except OSError as error:
        return f"{SUMS}: {error.strerror}"
    except ValueError:
        return f"{SUMS} does not have the format that was written"
    if rest:
        return f"{SUMS} is cut short"
    present = {path.name for path in folder.iterdir()} - {SUMS}
    for name in (STATE, ENGINE, PROGRESS, *sorted(sums.keys() | present)):
        if name not in present:
            return f"{name} is missing"
        if name not in sums:
            return f"{name} is not in {SUMS}"
        try:
            if sha256_of(folder / name) != sums[name]:
                return f"{name} does not match its checksum"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


# --- disk space -------------------------------------------------------------------------------------------------------


def disk_space_needed(num_values: int, keep: int) -> int:
    """Return the bytes that a run's checkpoints and weights need at most.

    They are `keep` checkpoints, the best one, one in flight, and three files of weights. A checkpoint has `num_values`
    fp32 values; the weights are a third of them at most, because Adam keeps two numbers per parameter.
    """
    return BYTES_PER_VALUE * (num_values * (keep + 2) + num_values)
