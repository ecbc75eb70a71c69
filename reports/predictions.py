"""The predictions of a trained network image by image: losses, labels, misclassified images, attention maps."""

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

from config.own_parts import find_entry
from config.settings import ModelSettings
from image_data.pixels import denormalize
from models.calibration import Calibration, CalibrationCounts
from models.classification_metrics import image_results
from models.pooling import POOLINGS

if TYPE_CHECKING:
    from dali_pipeline import Batches
    from image_data.dataset import Dataset


@dataclass(frozen=True)
class Predictions:
    """One result per image of a split, in the order of its list.

    Attributes:
        labels, predicted: true and predicted class, (N,) each.
        probability: of the predicted class (the confidence), (N,).
        loss: cross-entropy in nats, (N,).
    """

    labels: np.ndarray
    predicted: np.ndarray
    probability: np.ndarray
    loss: np.ndarray

    def confusion(self, num_classes: int) -> np.ndarray:
        """Return counts (K, K), rows true and columns predicted."""
        counts = np.bincount(self.labels * num_classes + self.predicted, minlength=num_classes**2)
        return counts.reshape(num_classes, num_classes)

    def calibration(self) -> Calibration:
        """Return the counts by confidence."""
        counts = CalibrationCounts(torch.device("cpu"))
        is_correct = torch.from_numpy(self.labels == self.predicted)
        counts.add_confidences(torch.from_numpy(self.probability), is_correct, torch.ones_like(is_correct))
        return counts.result()

    def worst(self, count: int) -> np.ndarray:
        """Return the positions of the misclassified images of the highest loss, the highest first."""
        ranked = np.argsort(-self.loss, kind="stable")
        return ranked[self.labels[ranked] != self.predicted[ranked]][:count]


@dataclass(frozen=True)
class Mistake:
    """A misclassified image."""

    pixels: np.ndarray  # uint8 (S, S, 3)
    true: str
    predicted: str
    probability: float


def predict(model: nn.Module, batches: Batches, autocast: bool) -> Predictions:
    """Run the network over a split. Batches keep the order of the list; padding rows have the label -1."""
    parts: list[tuple[Tensor, ...]] = []
    for images, labels in batches.epoch():
        parts.append(tuple(part.cpu() for part in image_results(scores_of(model, images, autocast), labels)))
    return Predictions(*(torch.cat(part).numpy() for part in zip(*parts, strict=True)))


def scores_of(model: nn.Module, images: Tensor, autocast: bool) -> Tensor:
    """Return fp32 class scores (B, K), computed in the precision of the weights or, with `autocast`, in bf16."""
    context = torch.autocast(images.device.type, torch.bfloat16) if autocast else nullcontext()
    with torch.inference_mode(), context:
        return model(images.to(next(model.parameters()).dtype)).float()


def load_images(dataset: Dataset, split: str, positions: np.ndarray, **source: Any) -> Tensor:
    """Return the images at these positions of a split, as the input of the network: (N, 3, S, S)."""
    from dali_pipeline import Batches

    few = replace(dataset, splits={split: dataset.splits[split].take(positions)})
    batches = Batches(few, split, len(positions), **source)
    images = next(iter(batches.epoch()))[0]
    batches.close()
    return images


def mistakes(found: Predictions, dataset: Dataset, split: str, count: int, **source: Any) -> list[Mistake]:
    """Return the misclassified images of the highest loss, the highest first."""
    positions = found.worst(count)
    if not len(positions):
        return []
    pixels = denormalize(load_images(dataset, split, positions, **source), dataset.mean, dataset.std)
    return [
        Mistake(
            pixels[i],
            dataset.classes[found.labels[at]],
            dataset.classes[found.predicted[at]],
            float(found.probability[at]),
        )
        for i, at in enumerate(positions)
    ]


class NoAttention(RuntimeError):
    """The attention of a network cannot be recorded; the message is a sentence for the report."""


def attention_maps(model: nn.Module, settings: ModelSettings, images: Tensor, autocast: bool) -> np.ndarray:
    """Return how much attention each patch receives in each block: (blocks, B, grid, grid), each map with a mean of 1.

    This is for the architecture `vit`, whose token order is known. A map is the mean over the heads of the attention of
    the CLS token or, without one, of all patches.

    Raises:
        NoAttention: a block does not call scaled_dot_product_attention once, or its tokens are not one per patch.
    """
    if images.device.type == "cpu":  # bf16 on a CPU may use other kernels; in fp32 AttentionRecorder sees the function
        model, autocast = copy.deepcopy(model).float(), False
    with AttentionRecorder() as recorder:
        scores_of(model, images, autocast)
    pooling = find_entry(POOLINGS, "pooling", settings.pooling)
    grid, prefix = images.shape[-1] // settings.patch, getattr(pooling, "num_prefix", 0)
    weights, num_tokens = recorder.weights, prefix + grid**2
    if len(weights) != settings.depth:
        calls = f"{len(weights)} calls of torch.nn.functional.scaled_dot_product_attention in {settings.depth} blocks"
        raise NoAttention(
            f"No attention map: the attention '{settings.attention}' made {calls}; the report needs one per block."
        )
    if any(part.ndim != 4 or min(part.shape[-2:]) < num_tokens for part in weights):
        raise NoAttention(
            f"No attention map: the attention '{settings.attention}' does not have one token for each of the "
            f"{grid} x {grid} patches."
        )
    patches = slice(prefix, num_tokens)  # the CLS token comes before them, head tokens after them
    queries = slice(0, 1) if prefix else patches
    maps = torch.stack([part[:, :, queries, patches].mean(dim=(1, 2)) for part in weights])
    return (maps / maps.mean(dim=-1, keepdim=True)).unflatten(-1, (grid, grid)).cpu().numpy()


class AttentionRecorder(TorchFunctionMode):
    """While active, it records the weights (B, H, T, T) of every scaled dot-product attention that is computed."""

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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return the weights that scaled_dot_product_attention multiplies the values with: (B, H, T, T), rows sum to 1.

    The arguments are those of that function. A boolean `attn_mask` is true where attention is allowed; a float one is
    added to the scores.
    """
    if enable_gqa:
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3)
    scores = (q.float() @ k.float().transpose(-2, -1)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None:
        is_allowed = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, float("-inf")) if is_allowed else scores + attn_mask
    return scores.softmax(dim=-1)
