"""Export of a run's network as one ONNX file, checked against PyTorch: `python evaluate.py runs/mine --export onnx`.

Input of the graph: `images` uint8 (B, S, S, 3), RGB pixels, any batch size B; the graph scales and normalizes them.
Output: `scores` float32 (B, K), whose softmax gives probabilities. The metadata of the file holds the class names,
S, and the preprocessing of larger images.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.errors import DatasetError, RunError
from common.files import write_atomically
from common.packages import check_torch
from common.text import first_line
from image_data.dataset import Dataset
from image_data.image_file import decode_image
from image_data.image_file import reason as image_problem
from inference.predict_images import fit
from inference.trained_model import TrainedModel

NUM_CHECKED = 500  # images, evenly spaced in the test split
TOLERANCE = 1e-3  # relative to the largest score; reordered fp32 sums differ by 1e-6
MAX_BYTES = 2**31 - 2**24  # of weights: an ONNX file holds at most 2 GiB


class FromPixels(nn.Module):
    """A network with its preprocessing: uint8 (B, S, S, 3) -> float32 (B, K)."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, trained: TrainedModel):
        super().__init__()
        self.network = network
        for name in ("mean", "std"):
            self.register_buffer(name, 255 * torch.tensor(trained.facts["dataset"][name]).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images.permute(0, 3, 1, 2).float() - self.mean) / self.std)


def export(trained: TrainedModel, weights: str, output: Path, pixels: np.ndarray, what: str) -> None:
    """Write `output` and print its difference from PyTorch on `pixels`, uint8 (B, S, S, 3), which `what` names.

    Raises:
        RunError: the network has an operation without ONNX form, is too large, or gives other results in ONNX Runtime;
            or `output` cannot be written.
    """
    network = FromPixels(trained.network(weights), trained).eval()
    if sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values()) > MAX_BYTES:
        raise RunError("the weights exceed 2 GiB, the limit of one ONNX file. Use them in PyTorch, from the run folder")
    program = to_onnx(network, trained.side)
    for part in (program.model, program.model.graph, *program.model.graph.all_nodes()):
        part.metadata_props.clear()  # source locations: half of a small file, and paths of this machine
    program.model.metadata_props.update({**trained.metadata, "run": trained.name, "weights": weights})
    content = program.model_proto.SerializeToString()
    difference = compare(network, content, pixels, what)
    write_atomically(output, content)
    print(f"wrote {output} ({len(content) / 1e6:.1f} MB)")
    side, num_classes = trained.side, len(trained.classes)
    print(f"  images uint8 (B, {side}, {side}, 3) -> scores float32 (B, {num_classes}), any batch size B")
    print(f"  {difference}", flush=True)


def to_onnx(network: nn.Module, side: int) -> Any:
    """Return the ONNX program of a network that takes pixels.

    Raises:
        RunError: an operation has no ONNX form.
        SettingsError: this PyTorch has no such exporter.
    """
    check_torch("--export onnx", (2, 6))
    example = torch.zeros(
        2, side, side, 3, dtype=torch.uint8
    )  # two images: a batch size of one would become a constant of the graph
    try:
        with quiet():
            return torch.onnx.export(
                network,
                (example,),
                dynamo=True,
                dynamic_shapes=({0: "B"},),
                input_names=["images"],
                output_names=["scores"],
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise RunError(
            f"this network cannot be exported to ONNX: {reason(error)}. Use it in PyTorch, from the run folder"
        ) from None


def reason(error: BaseException) -> str:
    """Return the cause of a failed export in one sentence; the exporter's own message fills a page."""
    while error.__cause__ is not None:
        error = error.__cause__
    operation = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", str(error))
    return f"PyTorch's operation {operation[1]} has no ONNX form" if operation else first_line(error)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the exporter's warnings and listings, which concern its internals."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def pixels_to_check(trained: TrainedModel, dataset: Dataset | None) -> tuple[np.ndarray, str]:
    """Return pixels uint8 (B, S, S, 3) and a phrase that names them: test images or, without a dataset, noise.

    Raises:
        DatasetError: an image cannot be read.
    """
    if dataset is None:
        shape = (32, trained.side, trained.side, 3)
        noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        return noise, "images of noise (no test images found)"
    test = dataset.splits["test"]
    chosen = test.take(np.linspace(0, len(test) - 1, min(NUM_CHECKED, len(test))).astype(np.int64))
    if test.packed is not None:
        images = list(chosen.pixels()[chosen.rows])
    else:
        images = [_read(dataset.root / path) for path in chosen.paths]
    return np.stack([fit(image, trained) for image in images]), "test images"


def _read(path: Path) -> np.ndarray:
    try:
        return decode_image(path, max_megapixels=None)[0]  # any size, as in training
    except Exception as error:  # see `decode_image`
        raise DatasetError(f"{path} cannot be read ({image_problem(error)}). Check the folder of the dataset") from None


def compare(network: nn.Module, content: bytes, pixels: np.ndarray, what: str) -> str:
    """Run the network and its ONNX file on the same pixels and return a sentence about the difference.

    Raises:
        RunError: the scores differ by more than TOLERANCE.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        ours = np.concatenate(
            [network(torch.from_numpy(part)).numpy() for part in np.array_split(pixels, -(-len(pixels) // 100))]
        )
    theirs = session.run(None, {"images": pixels})[0]
    one = session.run(None, {"images": pixels[:1]})[0]  # another batch size: the graph must not depend on it
    largest = max(np.abs(theirs - ours).max(), np.abs(one - ours[:1]).max())
    equal, count = int((theirs.argmax(1) == ours.argmax(1)).sum()), len(pixels)
    difference = (
        f"against PyTorch on {count} {what}: scores differ by {largest:.1e} at most, top-1 equal on {equal} of {count}"
    )
    if not largest <= TOLERANCE * max(1.0, np.abs(ours).max()):
        raise RunError(
            f"the exported network gives other results than the trained one: {difference}. Nothing was written. "
            "Please report this with the run's settings"
        )
    return difference
