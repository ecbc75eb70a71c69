"""The network of a finished run, loaded from the run folder alone: no dataset, no DeepSpeed, any number of processes.

    trained = TrainedModel.open("runs/mine")
    network = trained.network()                        # evaluation mode
    scores = network(trained.normalize(pixels))        # uint8 (B, S, S, 3) -> float32 (B, K)
    print(trained.classes[scores[0].argmax()])

This module imports PyTorch only when a network is built.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import RunError, unknown
from common.text import first_line
from config.own_parts import without_folders
from config.settings import Settings
from image_data.augmentation import CENTER_CROP
from records.own_part_files import kept_settings
from records.run_folder import RunFolder

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class TrainedModel:
    """A run folder, read for the use of its network."""

    record: RunFolder
    facts: dict[str, Any]  # the content of run.json

    @classmethod
    def open(cls, folder: str | Path) -> TrainedModel:
        """Read a run folder. Raises RunError where the folder holds no run."""
        record = RunFolder(Path(folder))
        return cls(record, record.facts())

    @property
    def name(self) -> str:
        return self.record.folder.resolve().name

    @property
    def classes(self) -> list[str]:
        return self.facts["dataset"]["classes"]

    @cached_property
    def settings(self) -> Settings:
        """The settings; user-defined parts refer to the copies of their files in the run folder."""
        return Settings.from_dict(kept_settings(self.record.folder, self.facts))

    @property
    def side(self) -> int:
        """S: side of the network's input, in pixels."""
        return self.facts["settings"]["image_side"] or self.facts["dataset"]["image_side"]

    @property
    def resize_side(self) -> int:
        """Shorter side of an image after resizing, in pixels; the network takes the central S x S crop of that."""
        return self.side if self.facts["dataset"]["image_side"] else round(self.side * CENTER_CROP)

    @property
    def preprocessing_text(self) -> str:
        """The preprocessing as a phrase for model cards and exported files."""
        return (
            f"RGB, shorter side resized to {self.resize_side} pixels (bilinear, antialiased), "
            f"center crop of {self.side} x {self.side}"
        )

    def network(self, weights: str = WEIGHTS, device: torch.device | str = "cpu", precision: str = "fp32") -> nn.Module:
        """Return the network in evaluation mode, with weights from a file of the run folder: (B, 3, S, S) -> (B, K).

        Raises:
            RunError: the file does not exist, is damaged, or holds the weights of another network.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from model import build_model
        from parallel.buffers import normalize_in_fp32

        path = self.record.folder / weights
        if not path.is_file():
            there = sorted(file.name for file in self.record.folder.glob("*.safetensors"))
            if not there and not self.record.metrics():
                raise self.record.no_epoch()
            fix = unknown("weights", weights, there) if there else "restore it, or train the run again with --fresh"
            raise RunError(f"{path} does not exist; {fix}")
        model = build_model(self.settings.model, len(self.classes), self.side)
        try:
            model.load_state_dict(load_file(path))  # safetensors hold numbers only, so this runs no code from the file
        except (OSError, SafetensorError, RuntimeError) as error:
            raise RunError(f"{path} is damaged or holds the weights of another network: {first_line(error)}") from None
        if precision == "bf16":  # as in training: buffers, such as BatchNorm's statistics, stay in fp32
            normalize_in_fp32(model)
            for parameter in model.parameters():
                parameter.data = parameter.data.bfloat16()
        return model.to(device).eval()

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata of a file of weights, so that the file can be used without its folder."""
        facts, dataset = self.facts, self.facts["dataset"]
        kept = {
            "model": without_folders(facts["settings"]["model"]),
            "classes": self.classes,
            "image_side": self.side,
            "mean": dataset["mean"],
            "std": dataset["std"],
            "preparation": self.preprocessing_text,
            "dataset": dataset["name"],
            "dataset_fingerprint": dataset["fingerprint"],
            "commit": facts["commit"] or "unknown",
        }
        return {name: value if isinstance(value, str) else json.dumps(value) for name, value in kept.items()}

    def normalize(self, pixels: Any) -> Tensor:
        """Convert pixels uint8 (B, S, S, 3), an array or a tensor, to the network's input: float32 (B, 3, S, S)."""
        import torch

        pixels = pixels if isinstance(pixels, torch.Tensor) else torch.tensor(pixels)
        mean, std = (
            torch.tensor(self.facts["dataset"][name], device=pixels.device).view(3, 1, 1) for name in ("mean", "std")
        )
        return (pixels.permute(0, 3, 1, 2).float() - 255 * mean) / (255 * std)

    normalise = normalize  # the name in model cards written before the spelling changed
