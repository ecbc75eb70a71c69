"""The network of a run as one ONNX file, checked against PyTorch: `python evaluate.py runs/mine --export onnx`.

In the graph: `images` uint8 (B, S, S, 3), RGB pixels as every image library gives them, B free; scaling and normalisation
are inside. Out of it: `scores` float32 (B, K), whose softmax are probabilities. The file's metadata holds the class names,
S, and how larger images are brought to S x S.
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

from common.errors import RunError
from image_data.dataset import Dataset
from inference.predict_images import fit, read_image
from inference.trained_model import TrainedModel

CHECKED = 500  # images, spread over the test split
TOLERANCE = 1e-3  # of the largest score; fp32 sums in another order differ by 1e-6
LARGEST = 2**31 - 2**24  # bytes of weights: an ONNX file ends at 2 GiB


class FromPixels(nn.Module):
    """A network with what comes before it: uint8 (B, S, S, 3) -> float32 (B, K)."""

    def __init__(self, network: nn.Module, trained: TrainedModel):
        super().__init__()
        self.network = network
        for name in ("mean", "std"):
            self.register_buffer(name, 255 * torch.tensor(trained.facts["dataset"][name]).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images.permute(0, 3, 1, 2).float() - self.mean) / self.std)


def export(trained: TrainedModel, weights: str, output: Path, dataset: Dataset | None) -> None:
    """Write `output`, and say how far it is from PyTorch on test images of `dataset`, or on noise where there is none.

    Raises:
        RunError: the network uses an operation that has no ONNX form, is too large, or gives something else there.
    """
    network = FromPixels(trained.network(weights), trained).eval()
    if sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values()) > LARGEST:
        raise RunError("these weights are more than one ONNX file can hold (2 GiB)")
    program = to_onnx(network, trained.side)
    for part in (program.model, program.model.graph, *program.model.graph.all_nodes()):
        part.metadata_props.clear()  # where in the source it came from: half of a small file, and paths of this machine
    program.model.metadata_props.update({**trained.metadata, "run": trained.name, "weights": weights})
    temporary = output.with_name(output.name + ".unfinished")
    try:
        program.save(temporary, external_data=False)
        said = compare(network, temporary, *pixels_to_check(trained, dataset))
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
    print(
        f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB)\n  images uint8 (B, {trained.side}, {trained.side}, 3) -> scores float32 "
        f"(B, {len(trained.classes)}), any batch size B\n  {said}"
    )


def to_onnx(network: nn.Module, side: int) -> Any:
    """The ONNX program of a network that takes pixels."""
    if not hasattr(torch, "export"):
        raise RunError(f"the export to ONNX needs PyTorch 2.6 or newer, and this is {torch.__version__}")
    example = torch.zeros(2, side, side, 3, dtype=torch.uint8)  # two: a batch of one would be taken for a constant
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
            f"this network cannot be exported to ONNX: {reason(error)}. It goes on working in PyTorch, from the run folder"
        ) from None


def reason(error: BaseException) -> str:
    """What the exporter stumbled over, in one sentence: its own message is a page."""
    while error.__cause__ is not None:
        error = error.__cause__
    operation = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", str(error))
    return f"PyTorch's operation {operation[1]} has no ONNX form" if operation else str(error).strip().splitlines()[0]


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's warnings and listings, which speak of its own insides."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def pixels_to_check(trained: TrainedModel, dataset: Dataset | None) -> tuple[np.ndarray, str]:
    """Pixels uint8 (B, S, S, 3), and what they are."""
    if dataset is None:
        return np.random.default_rng(0).integers(
            0, 256, (32, trained.side, trained.side, 3), dtype=np.uint8
        ), "images of noise (no dataset here)"
    test = dataset.splits["test"]
    chosen = test.take(np.linspace(0, len(test) - 1, min(CHECKED, len(test))).astype(np.int64))
    if test.packed is not None:
        images = list(chosen.pixels()[chosen.rows])
    else:
        images = [read_image(dataset.root / path) for path in chosen.paths]
    return np.stack([fit(image, trained) for image in images]), "test images"


def compare(network: nn.Module, path: Path, pixels: np.ndarray, what: str) -> str:
    """Both on the same pixels; a sentence about the difference. Raises RunError when it is more than rounding."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        ours = np.concatenate(
            [network(torch.from_numpy(part)).numpy() for part in np.array_split(pixels, -(-len(pixels) // 100))]
        )
    theirs = session.run(None, {"images": pixels})[0]
    one = session.run(None, {"images": pixels[:1]})[0]  # another batch size: the graph must not have kept one
    largest = max(np.abs(theirs - ours).max(), np.abs(one - ours[:1]).max())
    equal = int((theirs.argmax(1) == ours.argmax(1)).sum())
    said = f"against PyTorch on {len(pixels)} {what}: scores differ by {largest:.1e} at most, top-1 equal on {equal} of {len(pixels)}"
    if not largest <= TOLERANCE * max(1.0, np.abs(ours).max()):
        raise RunError(
            f"the exported network is not the trained one: {said}. Nothing was written; please report this with the run's settings"
        )
    return said
