"""Trackers of services that keep many runs: Weights & Biases, and MLflow.

Both get the numbers of metrics.jsonl under their names. The run folder keeps the id of the run there, so that a resumed
run continues it; a run that starts over has a new folder, hence a new id.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import RunError
from common.files import write_atomically
from common.text import first_line
from config.differences import leaves
from training.tracker import Tracker, numbers_of

MLFLOW_BATCH = 100  # parameters that MLflow takes at once
MLFLOW_TEXT = 6000  # characters of a parameter or a tag that MLflow takes


class WeightsAndBiases(Tracker):
    """A run at Weights & Biases. A resumed run continues the same one and does not log repeated steps again."""

    def __init__(
        self,
        folder: Path,
        facts: dict[str, Any],
        step: int,
        project: str | None,
        silent: bool,
        group: str | None = None,
    ):
        """Raises RunError when the service is unreachable or nobody is logged in."""
        import wandb

        name = folder / "wandb_run.txt"
        identity = name.read_text().strip() if step and name.is_file() else secrets.token_hex(4)
        write_atomically(name, identity + "\n")
        keys = ("settings", "preset", "seed", "command", "commit", "versions", "dataset", "device")
        config = {key: facts[key] for key in keys}
        try:
            self.run = wandb.init(
                project=project,
                name=folder.name,
                id=identity,
                group=group,
                resume="allow",
                dir=str(folder),
                config=config,
                settings=wandb.Settings(silent=silent, quiet=True),
            )
        except wandb.errors.Error as error:
            raise RunError(
                f"Weights & Biases reports '{first_line(error)}'. To log to this disk only, set WANDB_MODE=offline"
            ) from error
        self.image = wandb.Image
        self._norms: dict[int, dict[str, float]] = {}  # by step, until the loss of the step comes

    def _log(self, step: int, numbers: dict[str, Any]) -> None:
        if step >= self.run.step:  # wandb rejects earlier steps; a repeated step has the same numbers anyway
            self.run.log(numbers, step=step)

    def batch(self, pixels: np.ndarray) -> None:
        from reports.images import tile

        self._log(0, {"first_batch": self.image(tile(pixels))})

    def loss(self, step: int, mean: float, steps: int) -> None:
        for skipped in [earlier for earlier in self._norms if earlier < step]:  # its loss was not logged
            self._log(skipped, self._norms.pop(skipped))
        self._log(step, {"step_loss": mean} | self._norms.pop(step, {}))

    def gradients(self, step: int, norms: dict[str, float]) -> None:
        self._norms[step] = norms  # comes before the losses of earlier steps, which wandb would reject then

    def epoch(self, line: dict[str, Any]) -> None:
        self._log(line["step"], numbers_of(line))

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class MLflow(Tracker):
    """A run in MLflow: on the server of MLFLOW_TRACKING_URI, or in mlflow.db (SQLite) next to the run folder.

    A resumed run continues the same one and does not log repeated steps again.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], step: int, experiment: str, group: str | None = None):
        """Raises RunError when the store cannot be used."""
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        for name in ("alembic", "mlflow"):  # each new database would print its migrations
            logging.getLogger(name).setLevel(logging.WARNING)
        store = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.resolve().parent / 'mlflow.db'}"
        path = folder / "mlflow_run.txt"
        try:
            self.client = MlflowClient(store)
            if step and path.is_file():
                self.run_id = path.read_text().strip()
                self.client.update_run(self.run_id, status="RUNNING")
            else:
                found = self.client.get_experiment_by_name(experiment)
                where = found.experiment_id if found else self.client.create_experiment(experiment)
                tags = {"group": group} if group else {}
                self.run_id = self.client.create_run(where, run_name=folder.name, tags=tags).info.run_id
                write_atomically(path, self.run_id + "\n")
                for params in _batches(_texts(facts)):
                    self.client.log_batch(self.run_id, params=params)
            known = self.client.get_run(self.run_id).data.metrics
            self.logged = {name: self._last_step(name) if name in known else -1 for name in ("step_loss", "train_loss")}
        except (MlflowException, ImportError, OSError) as error:
            raise RunError(
                f"MLflow reports '{first_line(error)}'. Set MLFLOW_TRACKING_URI to a store that works, "
                "or leave out --mlflow"
            ) from error

    def _last_step(self, name: str) -> int:
        return max(point.step for point in self.client.get_metric_history(self.run_id, name))

    def _log(self, step: int, numbers: dict[str, float], marker: str) -> None:
        """Log numbers at a step, unless the run had logged its `marker` there before it was resumed."""
        from mlflow.entities import Metric

        if step > self.logged[marker]:
            now = round(1000 * time.time())  # in ms
            metrics = [Metric(name, float(value), now, step) for name, value in numbers.items()]
            self.client.log_batch(self.run_id, metrics=metrics)

    def loss(self, step: int, mean: float, steps: int) -> None:
        self._log(step, {"step_loss": mean}, "step_loss")

    def gradients(self, step: int, norms: dict[str, float]) -> None:
        self._log(step, norms, "step_loss")

    def epoch(self, line: dict[str, Any]) -> None:
        self._log(line["step"], numbers_of(line), "train_loss")

    def close(self, failed: bool) -> None:
        self.client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")


def _texts(facts: dict[str, Any]) -> dict[str, str]:
    """Return settings and provenance as parameters of MLflow."""
    values = dict(leaves(facts["settings"])) | {key: facts[key] for key in ("preset", "seed", "commit", "device")}
    values |= {"command": " ".join(facts["command"]), "dataset": facts["dataset"]["name"]}
    return {name: str(value)[:MLFLOW_TEXT] for name, value in values.items()}


def _batches(texts: dict[str, str]) -> Iterator[list[Any]]:
    """Yield parameters of MLflow in lists of the size that it takes."""
    from mlflow.entities import Param

    params = [Param(name, text) for name, text in texts.items()]
    for start in range(0, len(params), MLFLOW_BATCH):
        yield params[start : start + MLFLOW_BATCH]
