"""A system that `training_step.py` measures, as the benchmark sees it: its processes, its turns, its answers."""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from benchmarks.lib import step_report
from benchmarks.lib.options import note, step_settings
from benchmarks.lib.process_groups import Failed
from benchmarks.strategies import CASES, concerns
from common.errors import SettingsError
from common.machine import free_port
from config.settings import Settings


class System:
    """One measured system."""

    def __init__(self, name: str, bf16: bool, compile: str, options: argparse.Namespace):
        self.name, self.bf16, self.compile, self.options = name, bf16, compile, options
        self.left_out: str | None = None  # the reason, if it cannot run
        self.facts: dict[str, Any] = {}
        self.turns: list[dict[str, Any]] = []
        self.children: list[tuple[Any, Any]] = []

    @property
    def label(self) -> str:
        bf16 = ", bf16" if self.bf16 and self.name != "bare, bf16 weights" else ""
        return f"{self.name}{bf16}{step_report.compiled_label(self.compile)}"

    def start(self, context: Any) -> None:
        """Start its processes, which build their networks in the background."""
        from benchmarks.lib.step_systems import serve

        options = self.options
        try:
            request = {
                "name": self.name,
                "settings": self.settings().as_dict(),
                "data_dir": str(options.data_dir.resolve()),
                **{key: getattr(options, key) for key in ("source", "synthetic", "threads", "pin", "processes")},
                "compile": self.compile,
            }
        except SettingsError as error:
            self.left_out = str(error)
            return
        world = {
            "WORLD_SIZE": str(options.processes),
            "LOCAL_WORLD_SIZE": str(options.processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        for rank in range(options.processes):
            near, far = context.Pipe()
            environment = {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            child = context.Process(target=serve, args=(far, request, environment), daemon=True)
            child.start()
            far.close()
            self.children.append((child, near))

    def warm_up(self) -> None:
        """Wait for its processes and train the warm-up steps, alone: some libraries tune themselves by timing."""
        if not self.left_out:
            self.facts = self._answers()[0]
        self.ask("warm up", self.options.warm_up)
        note(f"{self.label}: {'skipped: ' + self.left_out if self.left_out else 'ready'}")

    def settings(self) -> Settings:
        """Return the settings of this system. Raises SettingsError for an unknown preset or setting."""
        case, options = CASES.get(self.name, CASES["ddp"]), self.options
        try:
            chosen = [override for override in options.set if concerns(override, case.strategy)]
        except ImportError as error:
            raise SettingsError(f"strategy {case.strategy} needs {error.name}, which is not installed") from error
        ours = [f"bf16.enabled={str(self.bf16).lower()}", f"compile={self.compile}"]
        return step_settings(options.preset, [*chosen, *case.overrides, *ours], strategy=case.strategy)

    def ask(self, what: str, count: int) -> list[dict[str, Any]]:
        """Send a request to all processes and return their answers; an empty list if the system is skipped."""
        if not self.left_out:
            for _, near in self.children:
                near.send((what, count))
        return self._answers() if not self.left_out else []

    def _answers(self) -> list[dict[str, Any]]:
        try:
            return [self._answer(child, near) for child, near in self.children]
        except Failed as reason:
            self.left_out = str(reason)
            self.end()
            return [{}]

    def _answer(self, child: Any, near: Any) -> dict[str, Any]:
        limit = self.options.limit_seconds
        try:
            if not near.poll(limit):
                raise Failed(f"still running after {limit:g} s")
            answer = near.recv()
        except (EOFError, OSError):
            child.join(5)
            raise Failed(f"its process ended with exit code {child.exitcode}; its output is above") from None
        if "left_out" in answer:
            raise Failed(answer["left_out"])
        return answer

    def turn(self) -> str:
        """Train one turn and return a short text for the screen."""
        answers = self.ask("turn", self.options.steps)
        if self.left_out:
            return f"skipped: {self.left_out}"
        seconds = max(answer["seconds"] for answer in answers)
        self.turns.append(
            {
                "seconds": seconds,
                "data_seconds": statistics.mean(answer["data_seconds"] for answer in answers),
                "loss": statistics.mean(answer["losses"][-1] for answer in answers),
            }
        )
        return f"{1e3 * seconds / self.options.steps:.2f} ms per step"

    def end(self) -> None:
        """End its processes."""
        for _, near in self.children:
            if not self.left_out:
                near.send(None)
            near.close()
        for child, _ in self.children:
            child.join(20)
            if child.is_alive():
                child.kill()
                child.join()
        self.children = []
