"""What GPUs, CPU and memory do while a run trains: one line of `utilisation.jsonl` every two seconds, from a thread of the main process.

    {"seconds": 4.0, "cpu_percent": 96.8, "ram_gib": 7.1, "process_ram_gib": 1.4, "gpu_percent": [97.0], "gpu_memory_gib": [3.2]}

`seconds` count while the run runs, stops left out. `cpu_percent` and `ram_gib` are the whole machine's, `process_ram_gib` the
main process's; GPUs are those that this process may use on its own machine (other machines of a job are not looked at),
null where a GPU does not say. psutil asks the kernel, NVIDIA's nvidia-ml-py the driver; without it there are no GPU numbers.
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
# Samples are taken more rarely as a run grows long: 1,800 in its first hour, 6,000 in a day, 9,000 in a week.
SHARE_OF_RUN = EVERY_SECONDS / 3600


class Gpus:
    """The GPUs that this process may use, asked through the driver's library; none where there is no driver or no nvidia-ml-py."""

    def __init__(self, visible: str | None = None):
        """`visible` as in CUDA_VISIBLE_DEVICES, which is what it is by default."""
        self.nvml: Any = None
        self.handles: list[Any] = []
        try:
            import pynvml

            pynvml.nvmlInit()
        except Exception:  # no package, no driver, a driver that answers oddly: a run trains without these numbers
            return
        self.nvml = pynvml
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") if visible is None else visible
        names = range(pynvml.nvmlDeviceGetCount()) if visible is None else visible.split(",") if visible else []
        for name in (str(name).strip() for name in names):
            handle = self._ask(lambda name=name: self._handle(name))
            if handle is None:  # as CUDA does: what follows a name that is not there does not count
                break
            self.handles.append(handle)

    def _handle(self, name: str) -> Any:
        by_number = name.isdecimal()
        return (
            self.nvml.nvmlDeviceGetHandleByIndex(int(name)) if by_number else self.nvml.nvmlDeviceGetHandleByUUID(name)
        )

    def _ask(self, question: Any) -> Any:
        """An answer, or None where this GPU has none (a MIG slice does not tell how busy it is)."""
        try:
            return question()
        except self.nvml.NVMLError:
            return None

    def percent(self) -> list[float | None]:
        """Share of the last moment in which each GPU ran something."""
        rates = [
            self._ask(lambda handle=handle: self.nvml.nvmlDeviceGetUtilizationRates(handle)) for handle in self.handles
        ]
        return [None if rate is None else float(rate.gpu) for rate in rates]

    def memory_gib(self) -> list[float | None]:
        """What is taken of each GPU's memory, by all programs."""
        infos = [self._ask(lambda handle=handle: self.nvml.nvmlDeviceGetMemoryInfo(handle)) for handle in self.handles]
        return [None if info is None else round(info.used / 2**30, 3) for info in infos]


class Sampler:
    """A thread that samples from `start` to `stop`. It never ends a run: where a file cannot be written, it gives up."""

    def __init__(self, folder: Path, every_seconds: float = EVERY_SECONDS):
        self.path, self.every_seconds = folder / FILE, every_seconds
        self.seconds = 0.0  # of CPU time that sampling has cost
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="utilisation", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End."""
        self._stopped.set()
        self._thread.join(timeout=5)

    def _work(self) -> None:
        import psutil

        before, began = _seconds_so_far(self.path), time.monotonic()
        process, gpus = psutil.Process(), Gpus()
        psutil.cpu_percent()  # the first answer is about nothing
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
    """Where a resumed run's clock goes on; a torn last line (power cut) is cut off, so that the next one is whole."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return 0.0
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        path.write_bytes(whole)
    return json.loads(whole.splitlines()[-1])["seconds"] if whole else 0.0
