"""The FFCV process of `input_pipeline.py`: `python benchmarks/lib/ffcv_loader.py '{"batch_size": 512, ...}'`.

Writes the training images to an FFCV file and answers every line {"epochs": 3, "look": false} on standard input with
one line on standard output: the result of `timing.consume`. It may run in another Python than the benchmark; that one
needs ffcv, torch, torchvision and NumPy. The JSON argument holds batch size, batches per epoch, threads, device,
padding, the folder of the prepared dataset and the file to write.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from image_data.dataset import Dataset


class Samples:
    """Pixels uint8 (S, S, 3) and label of each training image, for FFCV's writer."""

    def __init__(self, dataset: Dataset):
        split = dataset.splits["train"]
        self.pixels, self.rows, self.labels = split.pixels(), split.rows, split.labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return np.array(self.pixels[self.rows[index]]), int(self.labels[index])


def write(dataset: Dataset, file: str, workers: int) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
    DatasetWriter(file, fields, num_workers=workers).from_indexed_dataset(Samples(dataset), chunksize=500)


def make_loader(dataset: Dataset, request: dict):
    """Return an FFCV loader as in its CIFAR example, with float32 output.

    On a CPU, FFCV's NormalizeImage uses a lookup table, which is faster than Convert and Normalize.
    """
    import torch
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import (
        Convert,
        NormalizeImage,
        RandomHorizontalFlip,
        RandomTranslate,
        Squeeze,
        ToDevice,
        ToTensor,
        ToTorchImage,
    )
    from torchvision.transforms import Normalize

    mean, std = 255 * np.array(dataset.mean), 255 * np.array(dataset.std)
    images = [
        SimpleRGBImageDecoder(),
        RandomHorizontalFlip(),
        RandomTranslate(padding=request["padding"], fill=(0, 0, 0)),
    ]
    labels = [IntDecoder(), ToTensor(), Squeeze(1)]
    to_image = ToTorchImage(channels_last=request["channels_last"])
    if request["device"] == "cpu":
        images += [NormalizeImage(mean, std, np.float32), ToTensor(), to_image]
    else:
        to_device = ToDevice(torch.device(request["device"]), non_blocking=True)
        images += [ToTensor(), to_device, to_image, Convert(torch.float32), Normalize(mean, std)]
        labels += [to_device]
    number = request["num_batches"] * request["batch_size"]
    chosen = np.random.default_rng(0).permutation(len(dataset.splits["train"]))[:number]
    return Loader(
        request["file"],
        batch_size=request["batch_size"],
        num_workers=request["threads"],
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=True,
        indices=chosen,
        pipelines={"image": images, "label": labels},
    )


def serve(request: dict, answer) -> None:
    """Report readiness, then measure each request until the input ends."""
    try:
        import ffcv  # noqa: F401
    except ImportError as error:
        return answer({"unavailable": f"not installed ({error})"})
    import torch

    from benchmarks.lib.timing import Look, consume, version_of

    torch.set_num_threads(request["threads"])
    dataset, device = Dataset.open(request["data_dir"]), torch.device(request["device"])
    write(dataset, request["file"], request["threads"])
    loader = make_loader(dataset, request)
    answer({"version": version_of("ffcv")})
    for line in sys.stdin:
        asked = json.loads(line)
        look = Look(request["batch_size"], dataset.image_side, device) if asked["look"] else None
        window = consume(
            (loader for _ in range(asked["epochs"])), asked["epochs"] * request["num_batches"], device, look
        )
        answer({"window": asdict(window), "mean": look and look.mean, "std": look and look.std})


def main() -> None:
    # FFCV and numba print to standard output: move the pipe to another descriptor and redirect their output to stderr.
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(json.loads(sys.argv[1]), lambda content: print(json.dumps(content), file=pipe, flush=True))


if __name__ == "__main__":
    main()
