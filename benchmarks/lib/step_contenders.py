"""The processes of the contenders that `training_step.py` compares: our engines here, the others in `step_peers.py`.

Each contender has a process (or several) of its own, which holds its network between its turns.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.lib.communication_trace import time_exchanges
from benchmarks.lib.process_groups import keep_to
from benchmarks.lib.step_baselines import PEERS, TOTAL_STEPS, Unavailable
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
        """Seconds by part of that many steps."""
        engine, feed = self.work.engine, self.work.feed
        marks = Marks(self.device)
        model = engine.engine.module if hasattr(engine, "engine") else engine.model
        handles = marks.on(
            model, getattr(engine.optimizer, "optimizer", engine.optimizer)
        )  # inside DeepSpeed's wrapper is PyTorch's
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
    """A contender's process: make it, then do what the connection asks for until it is closed."""
    os.environ.update(environment)
    try:
        keep_to(request["threads"], request["pin"])
        idle = resident_bytes()
        subject = Subject(Settings.from_dict(request["settings"]), Path(request["data_dir"]))
        contender = PEERS.get(request["name"], Ours)(subject, request)
        connection.send(
            {
                "num_parameters": contender.num_parameters,
                "describe": contender.describe,
                "side": subject.side,
                "device": str(contender.device),
                "source": contender.feed.batches.source,
            }
        )
        while (wish := connection.recv()) is not None:
            connection.send(ANSWERS[wish[0]](contender, wish[1], idle))
        contender.close()
    except (Unavailable, SettingsError, DatasetError) as reason:
        connection.send({"left_out": str(reason)})
    except EOFError:  # whoever asked has gone
        pass


def take_turn(contender: Any, count: int, idle: int) -> dict[str, Any]:
    spent, losses = contender.turn(count)
    return {"seconds": spent.running, "data_seconds": spent.data, "losses": losses}


def look_closer(contender: Any, count: int, idle: int) -> dict[str, Any]:
    """Memory first: the profiler needs some of its own."""
    answer: dict[str, Any] = {"memory_bytes": memory_bytes(contender.device, idle)}
    try:
        answer["parts"] = {part: seconds / count for part, seconds in contender.parts(count).items()}
    except Unavailable as reason:
        answer["no_parts"] = str(reason)
    if int(os.environ["WORLD_SIZE"]) > 1:
        answer |= time_exchanges(lambda: contender.steps(count), contender.device).shares()
    return answer


def warm_up(contender: Any, count: int, idle: int) -> dict[str, Any]:
    contender.steps(count)
    return {}


ANSWERS = {"warm up": warm_up, "turn": take_turn, "look": look_closer}
