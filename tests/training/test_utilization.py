"""training/utilization.py: samples of the hardware utilization, and which GPUs are sampled.

Run: python -m pytest tests/training/test_utilization.py
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

from common.files import read_lines
from reports.utilization import utilization
from training.utilization import FILE, Gpus, Sampler


def sampled(folder: Path, at_least: int) -> list[dict]:
    sampler = Sampler(folder, every_seconds=0.01)
    sampler.start()
    deadline = time.monotonic() + 30
    while len(read_lines(folder / FILE)) < at_least and time.monotonic() < deadline:
        time.sleep(0.01)
    sampler.stop()
    assert 0 < sampler.seconds < 10
    return read_lines(folder / FILE)


def test_samples_are_plausible_and_a_resumed_run_continues_their_clock(tmp_path):
    first = sampled(tmp_path, 3)
    assert len(first) >= 3 and all(
        0 <= line["cpu_percent"] <= 100 and line["ram_gib"] > 0.05 and line["process_ram_gib"] > 0.01 for line in first
    )
    with (tmp_path / FILE).open("a") as file:
        file.write('{"seconds": 99')  # truncated by a power failure
    both = sampled(tmp_path, len(first) + 2)
    assert both[: len(first)] == first
    seconds = [line["seconds"] for line in both]
    assert seconds == sorted(seconds) and seconds[-1] < first[-1]["seconds"] + 30


def test_without_psutil_there_are_no_samples(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "psutil", None)  # an import of it fails
    failures: list = []
    monkeypatch.setattr(threading, "excepthook", failures.append)
    sampler = Sampler(tmp_path)
    sampler.start()
    sampler.stop()
    assert not failures and not list(tmp_path.iterdir())


def test_samples_that_cannot_be_written_end_no_run(tmp_path):
    sampler = Sampler(tmp_path / "nowhere", every_seconds=0.01)
    sampler.start()
    sampler._thread.join(timeout=30)
    assert not sampler._thread.is_alive()
    sampler.stop()


class Driver(ModuleType):
    """NVIDIA's library with three GPUs, the last of which does not report its utilization."""

    class NVMLError(Exception):
        pass

    def __init__(self):
        super().__init__("pynvml")

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return 3

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index >= 3:
            raise self.NVMLError
        return index

    def nvmlDeviceGetHandleByUUID(self, name: str) -> int:
        return int(name.removeprefix("GPU-"))

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> SimpleNamespace:
        if handle == 2:
            raise self.NVMLError
        return SimpleNamespace(gpu=10 * handle + 1)

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(used=(handle + 1) * 2**30)


def test_only_visible_gpus_are_sampled(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", Driver())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert Gpus().percent() == [1.0, 11.0, None] and Gpus().memory_gib() == [1.0, 2.0, 3.0]
    assert Gpus("1,0").percent() == [11.0, 1.0] and Gpus("GPU-1").percent() == [11.0]
    assert Gpus("0,7,1").percent() == [1.0]  # CUDA ignores all entries after an invalid one
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    assert (Gpus().percent(), Gpus().memory_gib()) == ([None], [3.0])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert Gpus().percent() == []


def test_without_a_driver_there_are_no_gpus(monkeypatch):
    broken = Driver()
    broken.nvmlInit = lambda: (_ for _ in ()).throw(Driver.NVMLError)
    for module in (broken, None):  # None: the package is not installed
        monkeypatch.setitem(sys.modules, "pynvml", module)
        assert (Gpus().percent(), Gpus().memory_gib()) == ([], [])


def test_a_run_that_went_from_a_gpu_to_a_cpu_has_a_picture():
    samples = [
        {
            "seconds": float(i),
            "cpu_percent": 50.0,
            "ram_gib": 4.0,
            "process_ram_gib": 1.0,
            "gpu_percent": gpu,
            "gpu_memory_gib": gpu,
        }
        for i, gpu in enumerate([[90.0], [None], [], []])
    ]
    assert utilization(samples, "from a GPU to a CPU").axes
