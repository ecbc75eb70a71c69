"""DALI backend of the `resident` and `files` sources: one graph for GPU and CPU, for DALI 1.34 to 2.4.

The graph draws no random numbers: it receives the augmentation plan as inputs. Color and geometric operations are
conditional branches, so each image passes only through its own operation. The arithmetic follows torchvision's. DALI
rounds where torchvision truncates, so pixels may differ by one level of 255.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nvidia.dali import __version__ as DALI_VERSION
from nvidia.dali import fn, math, pipeline_def
from nvidia.dali import types as dali_types
from nvidia.dali.plugin.pytorch import feed_ndarray
from torch import Tensor

from common.errors import DatasetError
from image_data.augmentation import CENTER_CROP
from image_data.auto_augment import (
    AUTOCONTRAST,
    BRIGHTNESS,
    COLOR,
    CONTRAST,
    EQUALIZE,
    POSTERIZE,
    SHARPNESS,
    SOLARIZE,
    WARP,
)
from image_data.batch_plan import BatchIndex, BatchPlanner, LoaderSpec, PlannedBatch
from image_data.readers import FileReader, PackedReader

types: Any = dali_types  # its enumerations come from C++, which static checks do not see

PREFETCH = 2  # batches in flight inside DALI


class DaliBackend:
    """Makes augmented batches with a DALI pipeline that keeps PREFETCH batches in flight."""

    def __init__(self, spec: LoaderSpec, planner: BatchPlanner, reader: PackedReader | FileReader):
        self.spec, self.planner, self.reader = spec, planner, reader
        fed = planner.augmentation.plan(0, 0, 1) if planner.augmentation is not None else None
        self.graph = Graph(
            side=spec.side,
            source_side=spec.source_side,
            decode=spec.decode,
            training=spec.training,
            mean=spec.mean,
            std=spec.std,
            crop_offset=fed is not None and fed.crop_offset is not None,
            crop_box=fed is not None and fed.crop_box is not None,
            num_operations=len(fed.operations) if fed is not None else 0,
        )
        self.device_id = (spec.device.index or 0) if spec.device.type == "cuda" else None
        self.pipeline = self.graph.build(spec.batch_size, spec.num_threads, self.device_id, prefetch=PREFETCH)
        self._in_flight: deque[PlannedBatch] = deque()
        self._num_fed = 0

    def images(self, batch: BatchIndex) -> tuple[Tensor, PlannedBatch]:
        """Return the augmented and normalized images of a batch, float32 (B, 3, S, S), and its plan.

        DALI processes the following batches meanwhile.
        """
        while self._in_flight and self._in_flight[0].batch.key != batch.key:
            self._output()  # discard: it was prefetched for a consumer that jumped to another batch
        while len(self._in_flight) < PREFETCH:
            self._feed(self._in_flight[-1].batch.next(self.spec.training) if self._in_flight else batch)
        return self._output()

    def _feed(self, batch: BatchIndex) -> None:
        planned = self.planner.plan(batch)
        for name, value in self._inputs(planned).items():
            self.pipeline.feed_input(name, value)
        self._in_flight.append(planned)
        self._num_fed += 1
        # DALI 1.34 to 2.4: the first run consumes a full queue of inputs, each later run a single input.
        if self._num_fed >= PREFETCH:
            self.pipeline.schedule_run()

    def _inputs(self, planned: PlannedBatch) -> dict[str, Any]:
        inputs: dict[str, Any] = {"images": self.reader.read(planned.readable)}
        plan = planned.augmentation
        if plan is None:
            return inputs
        inputs["flip"] = plan.flip
        if self.graph.crop_offset:
            inputs["crop_offset"] = plan.crop_offset
        if self.graph.crop_box:
            inputs["crop_box"] = plan.crop_box
        for i, operation in enumerate(plan.operations):
            inputs |= {f"kind{i}": operation.kind, f"value{i}": operation.magnitude, f"matrix{i}": operation.matrix}
        return inputs

    def _output(self) -> tuple[Tensor, PlannedBatch]:
        """Take the next batch from DALI. It is copied, because DALI reuses its buffers."""
        planned = self._in_flight.popleft()
        try:
            (output,) = self.pipeline.share_outputs()
        except RuntimeError as error:
            self.reader.raise_for_unreadable(planned.readable)
            self._raise_for_refused(planned)
            raise DatasetError(f"DALI failed to make a batch: {_cause(error)}") from error
        device, side = self.spec.device, self.spec.side
        images = torch.empty(len(planned.positions), 3, side, side, device=device)
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        feed_ndarray(output.as_tensor(), images, cuda_stream=stream)
        self.pipeline.release_outputs()
        return images, planned

    def _raise_for_refused(self, planned: PlannedBatch) -> None:
        """Find the file that Pillow decodes and DALI does not. Raises DatasetError."""
        if not isinstance(self.reader, FileReader):
            return
        on_gpu = self.device_id is not None
        pipeline = pipeline_def(_decode_one)(
            on_gpu, batch_size=1, num_threads=1, device_id=self.device_id, prefetch_queue_depth=1
        )
        pipeline.build()
        for position in planned.readable:
            pipeline.feed_input("images", self.reader.read(np.array([position])))
            try:
                pipeline.run()
            except RuntimeError as error:
                raise DatasetError(
                    f"DALI {DALI_VERSION} cannot decode {self.reader.paths[position]} "
                    f"({_cause(error)}). Save the image again, for example as PNG"
                ) from None


@dataclass(frozen=True)
class Graph:
    """Description of a pipeline.

    Args:
        side: side of the output images in pixels.
        source_side: side of all input images in pixels; None if their sizes differ.
        decode: whether the input is encoded files instead of pixels (H, W, 3).
        training: whether an augmentation plan is fed.
        crop_offset, crop_box, num_operations: the parts of the plan that are fed (see `AugmentationPlan`).
    """

    side: int
    source_side: int | None
    decode: bool
    training: bool
    crop_offset: bool = False
    crop_box: bool = False
    num_operations: int = 0
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def build(self, batch_size: int, num_threads: int, device_id: int | None, prefetch: int):
        """Build a pipeline with one output: normalized images, float32 (B, 3, S, S).

        Its inputs are named `images` and, in training, `flip`, `crop_offset`, `crop_box`, `kind<i>`, `value<i>` and
        `matrix<i>`. `device_id` None runs it on the CPU.
        """
        pipeline = pipeline_def(enable_conditionals=True)(_graph)(
            self,
            device_id is not None,
            batch_size=batch_size,
            num_threads=num_threads,
            device_id=device_id,
            prefetch_queue_depth=prefetch,
            seed=0,
        )
        pipeline.build()
        return pipeline


def _cause(error: Exception) -> str:
    """Return the line of DALI's message that says what failed, after its own traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    at = lines.index("encountered:") + 1 if "encountered:" in lines else 0
    return (lines[at:] or [type(error).__name__])[0]


def _decode_one(on_gpu: bool):
    encoded = fn.external_source(name="images", dtype=types.UINT8, ndim=1)
    return fn.decoders.image(encoded, device="mixed" if on_gpu else "cpu", output_type=types.RGB)


def _graph(what: Graph, on_gpu: bool):
    S = what.side
    images: Any
    if what.decode:
        encoded = fn.external_source(name="images", dtype=types.UINT8, ndim=1)
        images = fn.decoders.image(encoded, device="mixed" if on_gpu else "cpu", output_type=types.RGB)
    else:
        images = fn.external_source(
            name="images", device="gpu" if on_gpu else "cpu", layout="HWC", dtype=types.UINT8, ndim=3
        )
    if what.crop_box:
        box = fn.external_source(name="crop_box", dtype=types.FLOAT, ndim=1)
        images = fn.resize(
            images,
            roi_start=box[0:2],
            roi_end=box[2:4],
            roi_relative=True,
            size=[S, S],
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )
    elif what.source_side is None:
        size, corner = _center_crop(fn.peek_image_shape(encoded), S)
        images = fn.resize(images, size=size, interp_type=types.INTERP_LINEAR, antialias=True)
        images = fn.slice(images, corner, [S, S], axes=(0, 1), normalized_anchor=False, normalized_shape=False)
    elif what.source_side != S:
        images = fn.resize(images, size=[S, S], interp_type=types.INTERP_LINEAR, antialias=True)
    if what.crop_offset:
        corner = fn.external_source(name="crop_offset", dtype=types.INT32, ndim=1)
        images = fn.slice(
            images,
            corner,
            [S, S],
            axes=(0, 1),
            normalized_anchor=False,
            normalized_shape=False,
            out_of_bounds_policy="pad",
            fill_values=0,
        )
    if what.training:
        images = fn.flip(images, horizontal=fn.external_source(name="flip", dtype=types.INT32, ndim=0), vertical=0)
    for i in range(what.num_operations):
        kind = fn.external_source(name=f"kind{i}", dtype=types.INT32, ndim=0)
        value = fn.external_source(name=f"value{i}", dtype=types.FLOAT, ndim=0)
        matrix = fn.external_source(name=f"matrix{i}", dtype=types.FLOAT, ndim=2)
        images = _apply_operation(images, kind, value, matrix, S, on_gpu)
    images = fn.crop_mirror_normalize(
        images,
        dtype=types.FLOAT,
        output_layout="CHW",
        mean=[255 * m for m in what.mean],
        std=[255 * s for s in what.std],
    )
    return images


def _center_crop(shape, side):
    """Return the size to resize an (H, W, 3) image to, and the corner of its center crop, rounded as in torchvision."""
    height, width = fn.cast(shape[0], dtype=types.FLOAT), fn.cast(shape[1], dtype=types.FLOAT)
    scale = round(side * CENTER_CROP) / math.min(height, width)
    size = fn.stack(math.floor(height * scale + 1e-4), math.floor(width * scale + 1e-4))
    extra = size - side
    half = math.floor(extra * 0.5)
    odd, half_is_odd = extra - 2.0 * half, half - 2.0 * math.floor(half * 0.5)
    return size, fn.cast(half + odd * half_is_odd, dtype=types.INT32)  # round half to even


def _apply_operation(images, kind, value, matrix, side, on_gpu):
    """Apply one operation per image, selected by `kind`; IDENTITY takes no branch."""
    factor = value.gpu() if on_gpu else value  # both operands of DALI arithmetic must be on one device
    if kind == WARP:
        images = fn.warp_affine(images, matrix=matrix, inverse_map=True, fill_value=0, interp_type=types.INTERP_NN)
    elif kind == BRIGHTNESS:
        images = _to_uint8(images * factor)
    elif kind == COLOR:
        images = _to_uint8(factor * images + (1.0 - factor) * _grayscale(images))
    elif kind == CONTRAST:
        images = _to_uint8(
            factor * images + (1.0 - factor) * fn.reductions.mean(_grayscale(images), axes=[0, 1], keep_dims=True)
        )
    elif kind == SHARPNESS:
        images = _sharpness(images, factor, side)
    elif kind == POSTERIZE:
        # Clearing the lowest bits rounds down to a multiple of 2 ** (8 - bits).
        step = 2.0 ** (8.0 - factor)
        images = _to_uint8(math.floor(images / step) * step)
    elif kind == SOLARIZE:
        keep = images < factor
        images = _to_uint8(keep * images + (keep ^ True) * (255.0 - images))
    elif kind == AUTOCONTRAST:
        images = _autocontrast(images)
    elif kind == EQUALIZE:
        images = _equalize(images, side)
    return images


def _to_uint8(values):
    """Convert floats to pixels as torchvision does: clip to 0..255 and truncate (DALI's own cast would round)."""
    return fn.cast(math.floor(values), dtype=types.UINT8)


def _grayscale(images):
    """Return luma, rounded down: float (H, W, 1), with torchvision's weights."""
    weights = types.Constant(np.array([0.2989, 0.587, 0.114], dtype=np.float32))
    return math.floor(fn.reductions.sum(images * weights, axes=[2], keep_dims=True))


def _sharpness(images, factor, side):
    """Blend with a smoothed image, kernel (1 1 1; 1 5 1; 1 1 1) / 13, rounded; border pixels are unchanged."""
    kernel = types.Constant(np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], dtype=np.float32) / 13)
    inner = np.zeros((side, side, 1), dtype=np.float32)
    inner[1:-1, 1:-1] = 1
    inner = types.Constant(inner)
    smooth = math.floor(FILTER_OPERATOR(images, kernel, dtype=types.FLOAT) + 0.5)
    return _to_uint8(images + inner * (1.0 - factor) * (smooth - images))


def _autocontrast(images):
    """Stretch each channel to 0..255; a constant channel is unchanged."""
    low = fn.reductions.min(images, axes=[0, 1], keep_dims=True)
    high = fn.reductions.max(images, axes=[0, 1], keep_dims=True)
    flat = high == low
    range_ = (fn.cast(high, dtype=types.FLOAT) - low) * (1 / 255) + flat
    return _to_uint8((fn.cast(images, dtype=types.FLOAT) - low * (flat ^ True)) / range_)


def _equalize(images, side):
    """Compute Pillow's histogram equalization from OpenCV's, which is the one in DALI.

    Pillow maps a value to (r + step // 2) // step. Here r is the number of pixels below the value, and step is r of the
    largest value // 255. On small images this differs strongly from OpenCV's result. But OpenCV's result for the
    inverted image, inverted again, is 255 r / r_max, which recovers r up to a rounding of one level.
    """
    highest = fn.reductions.max(images, axes=[0, 1], keep_dims=True)
    r_max = side**2 - fn.reductions.sum(fn.cast(images == highest, dtype=types.FLOAT), axes=[0, 1], keep_dims=True)
    r = r_max * (255.0 - EQUALIZE_OPERATOR(_to_uint8(255.0 - images))) * (1 / 255)
    step = math.floor(r_max * (1 / 255) + 1e-4)
    too_few = step == 0
    spread = math.floor((r + math.floor(step * 0.5) + 0.5) / (step + too_few))
    return _to_uint8(math.min(spread, 255.0) * (too_few ^ True) + images * too_few)


# DALI 2 moved these two operators out of its experimental module.
EQUALIZE_OPERATOR = getattr(fn, "equalize", None) or fn.experimental.equalize  # type: ignore[attr-defined]  # DALI 1
FILTER_OPERATOR = getattr(fn, "filter", None) or fn.experimental.filter  # type: ignore[attr-defined]  # DALI 1
