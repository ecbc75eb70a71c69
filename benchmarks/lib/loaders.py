"""The loaders that `input_pipeline.py` compares: ours with each of its sources, and the baselines.

Each is created from (dataset, Task) and yields full epochs of normalized float32 images (B, 3, S, S) and int64 labels
(B,) on the device, reshuffled every epoch, the remainder dropped. The baselines are what their documentation suggests:

    imagefolder   torchvision's ImageFolder and v2 transforms in a DataLoader with one worker per thread
    memory        the same with the decoded pixels in memory, as torchvision.datasets.CIFAR100 holds them
    whole_batch   operations on full batches only: a gather of windows, a flip, two passes to normalize
    ffcv          FFCV in a separate process, which may use another Python (`ffcv_loader.py`)
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from torch.utils.data import Dataset as TorchDataset

from benchmarks.lib.loader_tasks import OURS, PADDING, Task, Unavailable
from benchmarks.lib.timing import Look, Window, consume
from common.packages import is_installed
from common.paths import PROJECT
from config.settings import AugmentationSettings
from dali_pipeline import Batches
from image_data.dataset import Dataset

FFCV_LOADER = PROJECT / "benchmarks" / "lib" / "ffcv_loader.py"


class InProcess:
    """A loader that this process iterates over."""

    versions: dict[str, str] = {}  # of packages that this process may lack

    def __init__(self, dataset: Dataset, task: Task):
        self.task, self.side, self.num_epochs = task, dataset.image_side, 0

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        raise NotImplementedError

    def turn(self, epochs: int) -> Window:
        """Iterate over the next `epochs` epochs."""
        return self._consume(epochs, None)

    def warm_up(self) -> tuple[Window, float, float]:
        """Return the first epoch with mean and standard deviation. Raises ValueError for batches of another form."""
        torch.manual_seed(0)  # of the order and the crops, also those of worker processes: always the same images
        look = Look(self.task.batch_size, self.side, self.task.device)
        return self._consume(1, look), look.mean, look.std

    def close(self) -> None:
        """End the threads or processes of the loader, where it has any."""

    def _consume(self, epochs: int, look: Look | None) -> Window:
        first, self.num_epochs = self.num_epochs, self.num_epochs + epochs
        numbers = range(first, first + epochs)
        return consume(map(self.epoch, numbers), epochs * self.task.num_batches, self.task.device, look)


class Ours(InProcess):
    """`dali_pipeline.Batches` with one of its sources."""

    def __init__(self, dataset: Dataset, task: Task, source: str):
        super().__init__(dataset, task)
        options = (
            {} if task.job == "crop" else {"policy": "rand_augment", "rand_augment_ops": 2, "rand_augment_magnitude": 9}
        )
        augmentation = AugmentationSettings(crop_padding=PADDING, flip=0.5, **options)
        self.batches = Batches(
            dataset,
            "train",
            task.batch_size,
            augmentation=augmentation,
            device=task.device,
            source=source,
            num_threads=task.threads,
        )

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        return self.batches.epoch(number, 0, self.task.num_batches)

    def close(self) -> None:
        self.batches.close()


class PerSample(InProcess):
    """A torch Dataset, sample by sample, in worker processes that live as long as the loader.

    Workers are spawned: a fork of a process with threads of DALI and torch can end with a segmentation fault in the
    child.
    """

    def __init__(self, dataset: Dataset, task: Task, samples: TorchDataset):
        super().__init__(dataset, task)
        need_psutil()
        sampler = RandomSampler(samples, num_samples=task.num_batches * task.batch_size)
        self.loader = DataLoader(
            samples,
            task.batch_size,
            sampler=sampler,
            num_workers=task.threads,
            drop_last=True,
            persistent_workers=True,
            pin_memory=task.device.type == "cuda",
            multiprocessing_context="spawn",
        )

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.loader:
            yield images.to(self.task.device, non_blocking=True), labels.to(self.task.device, non_blocking=True)

    def close(self) -> None:
        del self.loader  # a DataLoader ends its workers when nothing refers to it


class Pictures(TorchDataset):
    """Decoded pixels and labels in memory; a sample becomes a Pillow image, as in torchvision.datasets.CIFAR100."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, transform: Callable):
        self.pixels, self.labels, self.transform = pixels, labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


class WholeBatch(InProcess):
    """All images padded once, channels first; a batch is one gather of windows.

    On a CPU, NumPy gathers faster than PyTorch.
    """

    def __init__(self, dataset: Dataset, task: Task):
        super().__init__(dataset, task)
        if task.job != "crop":
            raise Unavailable("RandAugment differs from image to image; this loader does the job crop only")
        S, device = self.side, task.device
        pixels = resident_pixels(dataset).transpose(0, 3, 1, 2)
        padded = np.pad(pixels, ((0, 0), (0, 0), (PADDING, PADDING), (PADDING, PADDING)))
        self.labels = torch.from_numpy(dataset.splits["train"].labels).to(device)
        mean, std = (255 * torch.tensor(values, device=device).view(3, 1, 1) for values in (dataset.mean, dataset.std))
        self.scale, self.shift = 1 / std, -mean / std
        if device.type == "cuda":
            self.windows = torch.from_numpy(padded).to(device).unfold(2, S, 1).unfold(3, S, 1)
        else:
            self.windows = np.lib.stride_tricks.sliding_window_view(padded, (S, S), axis=(2, 3))

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        B, device = self.task.batch_size, self.task.device
        order = torch.randperm(len(self.labels), device=device)
        corners = torch.randint(0, 2 * PADDING + 1, (len(order), 2), device=device)
        flips = torch.rand(len(order), device=device) < 0.5
        for begin in range(0, self.task.num_batches * B, B):
            chosen = slice(begin, begin + B)
            images = self._crops(order[chosen], corners[chosen], flips[chosen])
            yield images.float().mul_(self.scale).add_(self.shift), self.labels[order[chosen]]

    def _crops(self, rows: Tensor, corner: Tensor, flip: Tensor) -> Tensor:
        """Return uint8 crops (B, 3, S, S)."""
        if isinstance(self.windows, Tensor):
            images = self.windows[rows, :, corner[:, 0], corner[:, 1]]
            return torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)
        flip = flip.numpy()
        images = self.windows[rows.numpy(), :, corner[:, 0].numpy(), corner[:, 1].numpy()]
        images[flip] = images[flip][..., ::-1]
        return torch.from_numpy(images)


class Ffcv:
    """FFCV in a child process; a turn is one line of JSON in each direction."""

    def __init__(self, dataset: Dataset, task: Task, python: str, channels_last: bool):
        if task.job != "crop":
            raise Unavailable("FFCV has no RandAugment")
        need_psutil()
        if dataset.splits["train"].packed is None:
            raise Unavailable("the images are not packed")
        self._folder = tempfile.TemporaryDirectory(prefix="ffcv-")
        request = {
            **asdict(task),
            "device": str(task.device),
            "data_dir": str(dataset.folder.resolve()),
            "padding": PADDING,
            "file": f"{self._folder.name}/train.beton",
            "channels_last": channels_last,
        }
        self._errors = open(f"{self._folder.name}/stderr", "w+")  # noqa: SIM115 (open as long as the child)
        try:
            self._child = subprocess.Popen(
                [python, FFCV_LOADER, json.dumps(request)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
            )
        except OSError as error:
            raise Unavailable(f"{python} does not start: {error.strerror}") from error
        try:
            self.versions = {"ffcv": self._answer()["version"]}
        except RuntimeError as error:
            self.close()
            raise Unavailable(f"FFCV does not start: {str(error).splitlines()[-1]}") from error
        except Unavailable:
            self.close()
            raise

    def turn(self, epochs: int) -> Window:
        return Window(**self._ask(epochs=epochs, look=False)["window"])

    def warm_up(self) -> tuple[Window, float, float]:
        answer = self._ask(epochs=1, look=True)
        return Window(**answer["window"]), answer["mean"], answer["std"]

    def close(self) -> None:
        self._child.stdin.close()
        self._child.wait()
        self._child.stdout.close()
        self._errors.close()
        self._folder.cleanup()

    def _ask(self, **request: object) -> dict:
        print(json.dumps(request), file=self._child.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict:
        line = self._child.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise RuntimeError("the FFCV process ended:\n" + "".join(self._errors.readlines()[-12:]))
        answer = json.loads(line)
        if "unavailable" in answer:
            raise Unavailable(answer["unavailable"])
        return answer


def need_psutil() -> None:
    """Raise Unavailable if the CPU time of worker processes cannot be read."""
    if not is_installed("psutil"):
        raise Unavailable("psutil, which reads the CPU time of worker processes, is not installed")


def resident_pixels(dataset: Dataset) -> np.ndarray:
    """Return the training images in memory, uint8 (N, S, S, 3). Raises Unavailable if they are not packed."""
    split = dataset.splits["train"]
    if split.packed is None:
        raise Unavailable("the images are not packed")
    return np.ascontiguousarray(split.pixels()[split.rows])


def transform(dataset: Dataset, job: str) -> Callable:
    """Return the job as torchvision v2 transforms of a Pillow image."""
    from torchvision.transforms import v2

    policy = [v2.RandAugment(2, 9)] if job == "rand_augment" else []
    return v2.Compose(
        [
            v2.RandomCrop(dataset.image_side, padding=PADDING),
            v2.RandomHorizontalFlip(),
            *policy,
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(dataset.mean, dataset.std),
        ]
    )


def image_folder(dataset: Dataset, task: Task) -> PerSample:
    from torchvision.datasets import ImageFolder

    split = dataset.splits["train"]
    samples = ImageFolder(dataset.root / Path(split.paths[0]).parts[0], transform(dataset, task.job))
    if len(samples) != len(split):
        raise Unavailable(f"ImageFolder finds {len(samples)} images, the prepared list has {len(split)}")
    return PerSample(dataset, task, samples)


def memory(dataset: Dataset, task: Task) -> PerSample:
    return PerSample(
        dataset, task, Pictures(resident_pixels(dataset), dataset.splits["train"].labels, transform(dataset, task.job))
    )


def loaders(ffcv_python: str | None = None) -> dict[str, Callable[[Dataset, Task], InProcess | Ffcv]]:
    """Return every loader by name, in the order of `loader_tasks`: ours, the baselines, the optional ones."""
    python = ffcv_python or sys.executable

    def ours(source: str) -> Callable[[Dataset, Task], Ours]:
        return lambda dataset, task: Ours(dataset, task, source)

    def ffcv(channels_last: bool) -> Callable[[Dataset, Task], Ffcv]:
        return lambda dataset, task: Ffcv(dataset, task, python, channels_last)

    return {
        **{source: ours(source) for source in OURS},
        "imagefolder": image_folder,
        "memory": memory,
        "whole_batch": WholeBatch,
        "ffcv": ffcv(channels_last=False),
        "ffcv_channels_last": ffcv(channels_last=True),
    }
