"""What a trained network makes of a split, image by image: losses, predictions, the worst mistakes, attention maps."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from config.settings import ModelSettings
from image_data.pixels import denormalize
from models.classification_metrics import image_results
from models.pooling import POOLINGS

if TYPE_CHECKING:
    from dali_pipeline import Batches
    from image_data.dataset import Dataset


@dataclass(frozen=True)
class Predictions:
    """For each image of a split, in the order of its list, (N,) each: label, predicted label, its probability, cross-entropy."""

    labels: np.ndarray
    predicted: np.ndarray
    probability: np.ndarray
    loss: np.ndarray

    def confusion(self, num_classes: int) -> np.ndarray:
        """Counts (K, K), rows true and columns predicted."""
        counts = np.bincount(self.labels * num_classes + self.predicted, minlength=num_classes**2)
        return counts.reshape(num_classes, num_classes)

    def worst(self, count: int) -> np.ndarray:
        """Positions of the wrongly classified images of the highest loss, the worst first."""
        ranked = np.argsort(-self.loss, kind="stable")
        return ranked[self.labels[ranked] != self.predicted[ranked]][:count]


@dataclass(frozen=True)
class Mistake:
    """An image taken for something else."""

    pixels: np.ndarray  # uint8 (S, S, 3)
    path: str
    true: str
    predicted: str
    probability: float
    loss: float


def predict(model: nn.Module, batches: Batches, autocast: bool) -> Predictions:
    """Run the network over a split. Batches hold the images in the order of the list and are padded with the label -1."""
    parts: list[tuple[Tensor, ...]] = []
    for images, labels in batches.epoch():
        parts.append(tuple(part.cpu() for part in image_results(scores_of(model, images, autocast), labels)))
    return Predictions(*(torch.cat(part).numpy() for part in zip(*parts, strict=True)))


def scores_of(model: nn.Module, images: Tensor, autocast: bool) -> Tensor:
    """Class scores (B, K), fp32, in the precision that the weights have or, with `autocast`, as training had it."""
    context = torch.autocast(images.device.type, torch.bfloat16) if autocast else nullcontext()
    with torch.inference_mode(), context:
        return model(images.to(next(model.parameters()).dtype)).float()


def load_images(dataset: Dataset, split: str, positions: np.ndarray, **source: Any) -> Tensor:
    """The images at these positions of a split, as the network sees them: (N, 3, S, S)."""
    from dali_pipeline import Batches

    few = replace(dataset, splits={split: dataset.splits[split].take(positions)})
    batches = Batches(few, split, len(positions), **source)
    images = next(iter(batches.epoch()))[0]
    batches.close()
    return images


def mistakes(found: Predictions, dataset: Dataset, split: str, count: int, **source: Any) -> list[Mistake]:
    """The images that the network is most wrong about, the worst first."""
    positions = found.worst(count)
    if not len(positions):
        return []
    pixels = denormalize(load_images(dataset, split, positions, **source), dataset.mean, dataset.std)
    return [
        Mistake(
            pixels[i],
            dataset.splits[split].paths[at],
            dataset.classes[found.labels[at]],
            dataset.classes[found.predicted[at]],
            float(found.probability[at]),
            float(found.loss[at]),
        )
        for i, at in enumerate(positions)
    ]


def attention_maps(model: nn.Module, settings: ModelSettings, images: Tensor, autocast: bool) -> np.ndarray:
    """How much the patches of each image are looked at in each block: (blocks, B, grid, grid), the mean of each map is 1.

    For the architecture `vit`, whose tokens are known. It is the mean over the heads of what the class token looks at or, where
    there is none, of what the patches look at.
    """
    if images.device.type == "cpu":  # in fp32, where attention is the one function that AttentionRecorder sees
        model, autocast = copy.deepcopy(model).float(), False
    with AttentionRecorder() as looks:
        scores_of(model, images, autocast)
    grid, prefix = images.shape[-1] // settings.patch, POOLINGS[settings.pooling].num_prefix
    patches = slice(prefix, prefix + grid**2)  # a class token stands before them, head tokens after them
    queries = slice(0, 1) if prefix else patches
    maps = torch.stack([weights[:, :, queries, patches].mean(dim=(1, 2)) for weights in looks.weights])
    return (maps / maps.mean(dim=-1, keepdim=True)).unflatten(-1, (grid, grid)).cpu().numpy()


class AttentionRecorder(TorchFunctionMode):
    """While it is active: keeps the weights (B, H, T, T) of every scaled dot product attention that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            self.weights.append(attention_weights(*args, **kwargs))
        return function(*args, **kwargs)


def attention_weights(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0
) -> Tensor:
    """What scaled_dot_product_attention multiplies the values with: (B, H, T, T), rows sum to 1. `attn_mask` is true where a token may look."""
    scores = (q.float() @ k.float().transpose(-2, -1)) * q.shape[-1] ** -0.5
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    return scores.softmax(dim=-1)
