"""Processes of the systems that `training_step.py` compares: our engines here, baselines in `step_baselines.py`.

Each system has its own process (or several), which keeps its network between its turns.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.lib.communication_trace import time_exchanges
from benchmarks.lib.process_groups import keep_to
from benchmarks.lib.step_baselines import BASELINES, TOTAL_STEPS, Unavailable
from benchmarks.lib.step_breakdown import Marks
from benchmarks.lib.workload import Spent, Subject, Workload, memory_bytes, resident_bytes
from common.errors import DatasetError, SettingsError
from config.settings import Settings


class Ours:
    """One of our engines."""

    def __init__(self, subject: Subject, request: dict[str, Any]):
        self.work = Workload(subject, request["source"], TOTAL_STEPS, request["synthetic"])
        self.device, self.feed, self.num_parameters = (
            self.work.engine.device,
            self.work.feed,
            self.work.engine.num_parameters,
        )
        self.describe = self.work.engine.describe()

    def steps(self, count: int) -> list[Tensor]:
        return self.work.steps(count)

    def turn(self, count: int) -> tuple[Spent, list[float]]:
        return self.work.timed(count)

    def parts(self, count: int) -> dict[str, float]:
        """Return seconds by part for `count` steps."""
        engine, feed = self.work.engine, self.work.feed
        marks = Marks(self.device)
        model = engine.engine.module if hasattr(engine, "engine") else engine.model
        # DeepSpeed wraps PyTorch's optimizer.
        handles = marks.on(model, getattr(engine.optimizer, "optimizer", engine.optimizer))
        engine.loss, self.work.feed = marks.around_loss(engine.loss), marks.around_batches(feed)
        try:
            self.steps(count)
            marks("rest")
            return marks.seconds()
        finally:
            del engine.loss
            self.work.feed = feed
            for handle in handles:
                handle.remove()

    def close(self) -> None:
        self.work.close()


def serve(connection: Any, request: dict[str, Any], environment: dict[str, str]) -> None:
    """Build a system in this process, then answer requests until the connection is closed."""
    os.environ.update(environment)
    try:
        keep_to(request["threads"], request["pin"])
        idle = resident_bytes()
        subject = Subject(Settings.from_dict(request["settings"]), Path(request["data_dir"]))
        system = BASELINES.get(request["name"], Ours)(subject, request)
        connection.send(
            {
                "num_parameters": system.num_parameters,
                "describe": system.describe,
                "side": subject.side,
                "device": str(system.device),
                "source": system.feed.batches.source,
            }
        )
        while (asked := connection.recv()) is not None:
            connection.send(ANSWERS[asked[0]](system, asked[1], idle))
        system.close()
    except (Unavailable, SettingsError, DatasetError, ImportError) as reason:
        connection.send({"left_out": str(reason)})
    except EOFError:  # the benchmark has ended
        pass


def take_turn(system: Any, count: int, idle: int) -> dict[str, Any]:
    """Time `count` steps."""
    spent, losses = system.turn(count)
    return {"seconds": spent.running, "data_seconds": spent.data, "losses": losses}


def look_closer(system: Any, count: int, idle: int) -> dict[str, Any]:
    """Return memory, parts of a step and communication. Memory comes first: the profiler needs some itself."""
    answer: dict[str, Any] = {"memory_bytes": memory_bytes(system.device, idle)}
    try:
        answer["parts"] = {part: seconds / count for part, seconds in system.parts(count).items()}
    except Unavailable as reason:
        answer["no_parts"] = str(reason)
    if int(os.environ["WORLD_SIZE"]) > 1:
        answer |= time_exchanges(lambda: system.steps(count), system.device).shares()
    return answer


def warm_up(system: Any, count: int, idle: int) -> dict[str, Any]:
    """Train `count` steps that do not count."""
    system.steps(count)
    return {}


ANSWERS = {"warm up": warm_up, "turn": take_turn, "look": look_closer}
