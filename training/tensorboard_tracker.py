"""Event files for TensorBoard in <run>/tensorboard/, with tags grouped by what they measure.

A tag is `<group>/<name in metrics.jsonl>`. TensorBoard orders groups by name, so accuracy and loss come first:

    accuracy/  loss/  optimizer/  other/  speed/  system/

The tab "hparams" lists every run with the settings that differ from the defaults, beside its newest accuracy and loss.
"""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np

from common.display import printable
from config.differences import changed_settings
from training.tracker import Tracker, numbers_of

GROUPS = {  # group -> pattern of the whole name; the first that fits counts
    "accuracy": r".*_accuracy",
    "loss": r".*_loss",
    "optimizer": r"learning_rate",
    "gradients": r"(gradient_norm|update_ratio).*",
    "speed": r"images_per_second|.*_seconds",
    "system": r"memory_gib|.*_gib|.*_percent",
}
REST = "other"  # its place in the alphabet is after accuracy and loss
CHARTS = {  # TensorBoard's tab "custom scalars": title -> patterns of tags
    "accuracy": [r"accuracy/.*"],
    "loss": [r"loss/.*"],
    "learning rate": [r"optimizer/learning_rate"],
    "gradients": [r"gradients/gradient_norm", r"gradients/update_ratio"],
    "images/s": [r"speed/images_per_second"],
    "seconds": [r"speed/.*_seconds"],
}
CHART_WITHOUT_GROUPS = rb".*_accuracy$"  # in the event files of earlier versions, whose tags had no groups


def tag_of(name: str) -> str:
    """Return the tag of a number of metrics.jsonl: test_loss -> loss/test_loss."""
    group = next((group for group, pattern in GROUPS.items() if re.fullmatch(pattern, name)), REST)
    return f"{group}/{name}"


class TensorBoard(Tracker):
    """Event files in <run>/tensorboard/. Events of steps that a resumed run repeats are purged.

    A run that was started before tags had groups keeps its tags when it resumes, so that no curve breaks in two.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], step: int):
        from torch.utils.tensorboard import SummaryWriter

        ignore_full_disks()
        self.has_groups = not (step and started_without_groups(folder / "tensorboard"))
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else 0, flush_secs=10)
        if not step:
            self.writer.add_custom_scalars({"this run": {title: ["Multiline", tags] for title, tags in CHARTS.items()}})
            for name in ("settings", "command", "commit", "versions", "dataset"):
                self.writer.add_text(name, as_markdown(facts[name] or "unknown"), 0)
            self._add_hyperparameters(facts)

    def _add_hyperparameters(self, facts: dict[str, Any]) -> None:
        """Write what the tab hparams shows. `SummaryWriter.add_hparams` would make a second run of one point."""
        from torch.utils.tensorboard.summary import hparams

        split = "validation" if facts.get("hold_out") else "test"
        shown = [tag_of(f"{split}_accuracy"), tag_of(f"{split}_loss"), tag_of("train_loss")]
        for summary in hparams(hyperparameters(facts), dict.fromkeys(shown, 0.0)):
            self.writer._get_file_writer().add_summary(summary)

    def _tag(self, name: str) -> str:
        return tag_of(name) if self.has_groups else name

    def batch(self, pixels: np.ndarray) -> None:
        from reports.images import tile

        self.writer.add_image("first_batch", tile(pixels), 0, dataformats="HWC")

    def loss(self, step: int, mean: float, steps: int) -> None:
        self.writer.add_scalar(self._tag("step_loss"), mean, step)

    def gradients(self, step: int, norms: dict[str, float]) -> None:
        for name, value in norms.items():
            self.writer.add_scalar(self._tag(name), value, step)

    def epoch(self, line: dict[str, Any]) -> None:
        for name, value in numbers_of(line).items():
            self.writer.add_scalar(self._tag(name), value, line["step"])
        self.writer.flush()

    def close(self, failed: bool) -> None:
        self.writer.close()


def hyperparameters(facts: dict[str, Any]) -> dict[str, bool | float | str]:
    """Return preset, seed and the settings that differ from the defaults, as TensorBoard takes them."""
    values = {"preset": Path(facts["preset"]).stem, "seed": facts["seed"]}
    values |= {path.removeprefix("engine."): value for path, value, _ in changed_settings(facts["settings"])}
    values = {
        name: value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
        for name, value in values.items()
    }
    return {name: printable(value) if isinstance(value, str) else value for name, value in values.items()}


def started_without_groups(folder: Path) -> bool:
    """Whether the first event file of a run is of a version whose tags had no groups."""
    first = min(folder.glob("events.out.tfevents.*"), default=None)
    return first is not None and CHART_WITHOUT_GROUPS in first.read_bytes()


def ignore_full_disks() -> None:
    """Print no traceback of TensorBoard's writer thread on a full disk: the run reports it in one sentence."""
    usual = threading.excepthook

    def hook(details: threading.ExceptHookArgs) -> None:
        if not (issubclass(details.exc_type, OSError) and type(details.thread).__name__ == "_AsyncWriterThread"):
            usual(details)

    threading.excepthook = hook


def as_markdown(value: Any) -> str:
    """Return a value as an indented block of Markdown, which TensorBoard shows verbatim."""
    if isinstance(value, list):
        text = " ".join(value)
    else:
        text = value if isinstance(value, str) else json.dumps(value, indent=2)
    return "\n".join("    " + printable(row) for row in text.splitlines())
