"""Hardware utilization of a run: one line of `utilisation.jsonl` every two seconds, from a thread of the main process.

    {"seconds": 4.0, "cpu_percent": 96.8, "ram_gib": 7.1, "process_ram_gib": 1.4, "gpu_percent": [97.0],
     "gpu_memory_gib": [3.2]}

`seconds` is the running time, without the time when the run was stopped. `cpu_percent` and `ram_gib` are of the whole
machine, `process_ram_gib` is of the main process. The GPU lists hold the GPUs that this process may use on its own
machine; a value is null where a GPU does not report it. Other machines of a job are not sampled. The GPU numbers come
from NVIDIA's nvidia-ml-py; without that package there are none. Without psutil there are no samples.
"""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

FILE = "utilisation.jsonl"
EVERY_SECONDS = 2.0
# Sampling slows down in long runs: 1,800 samples in the first hour, 6,000 in a day, 9,000 in a week.
SHARE_OF_RUN = EVERY_SECONDS / 3600


class Gpus:
    """The GPUs that this process may use, queried through NVML; none where there is no driver or no nvidia-ml-py."""

    def __init__(self, visible: str | None = None):
        """`visible` has the format of CUDA_VISIBLE_DEVICES, which is the default."""
        self.nvml: Any = None
        self.handles: list[Any] = []
        try:
            import pynvml

            pynvml.nvmlInit()
        except Exception:  # no package, no driver, or a faulty driver: the run trains without these numbers
            return
        self.nvml = pynvml
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") if visible is None else visible
        names = range(pynvml.nvmlDeviceGetCount()) if visible is None else visible.split(",") if visible else []
        for name in (str(name).strip() for name in names):
            handle = self._query(lambda name=name: self._handle(name))
            if handle is None:  # CUDA ignores all entries after an invalid one
                break
            self.handles.append(handle)

    def _handle(self, name: str) -> Any:
        by_number = name.isdecimal()
        return (
            self.nvml.nvmlDeviceGetHandleByIndex(int(name)) if by_number else self.nvml.nvmlDeviceGetHandleByUUID(name)
        )

    def _query(self, function: Any) -> Any:
        """Return the value, or None where this GPU does not report it (a MIG slice reports no utilization)."""
        try:
            return function()
        except self.nvml.NVMLError:
            return None

    def percent(self) -> list[float | None]:
        """Return the utilization of each GPU in percent of the last sampling period."""
        rates = [
            self._query(lambda handle=handle: self.nvml.nvmlDeviceGetUtilizationRates(handle))
            for handle in self.handles
        ]
        return [None if rate is None else float(rate.gpu) for rate in rates]

    def memory_gib(self) -> list[float | None]:
        """Return the used memory of each GPU in GiB, by all programs."""
        infos = [
            self._query(lambda handle=handle: self.nvml.nvmlDeviceGetMemoryInfo(handle)) for handle in self.handles
        ]
        return [None if info is None else round(info.used / 2**30, 3) for info in infos]


class Sampler:
    """A thread that samples from `start` to `stop`. It never ends a run: it stops where its file cannot be written."""

    def __init__(self, folder: Path, every_seconds: float = EVERY_SECONDS):
        self.path, self.every_seconds = folder / FILE, every_seconds
        self.seconds = 0.0  # CPU time of sampling so far
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="utilisation", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join(timeout=5)

    def _work(self) -> None:
        try:
            import psutil
        except ImportError:
            return
        before, began = _seconds_so_far(self.path), time.monotonic()
        process, gpus = psutil.Process(), Gpus()
        psutil.cpu_percent()  # the first value has no period to refer to
        try:
            with self.path.open("a") as file:
                while not self._stopped.wait(
                    max(self.every_seconds, SHARE_OF_RUN * (before + time.monotonic() - began))
                ):
                    sample = {
                        "seconds": round(before + time.monotonic() - began, 2),
                        "cpu_percent": psutil.cpu_percent(),
                        "ram_gib": round(psutil.virtual_memory().used / 2**30, 3),
                        "process_ram_gib": round(process.memory_info().rss / 2**30, 3),
                        "gpu_percent": gpus.percent(),
                        "gpu_memory_gib": gpus.memory_gib(),
                    }
                    file.write(json.dumps(sample) + "\n")
                    file.flush()
                    self.seconds = time.thread_time()
        except OSError:
            return


def _seconds_so_far(path: Path) -> float:
    """Return the running time before a resume. A truncated last line (power failure) is removed from the file."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return 0.0
    complete = text[: text.rfind(b"\n") + 1]
    if len(complete) < len(text):
        path.write_bytes(complete)
    return json.loads(complete.splitlines()[-1])["seconds"] if complete else 0.0
