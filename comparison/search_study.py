"""The study of a search: `study.db` (SQLite) beside the run folders of its trials.

Several processes, also on several machines that share this disk, work on one study. A process notes in the study which
trials it works on, so that others resume those of a process that was killed.
"""

from __future__ import annotations

import fcntl
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from common.errors import RunError
from common.machine import is_alive
from common.paths import near_path
from comparison.search import Search
from records.run_folder import ASIDE

STUDY, LOCK = "study.db", "study.lock"
STALE_SECONDS = 300.0  # after the last note, another machine takes the trial over; clocks may differ by a minute
OWNER, ALIVE, REASON, SAME_AS = "owner", "alive", "reason", "same_as"  # attributes of a trial in the study
DEFINITION, WORKERS = "definition", "workers"  # attributes of the study


def open_study(search: Search, runs: Path, redo: bool) -> optuna.Study:
    """Open or create the study of a search.

    Args:
        runs: folder of its run folders.
        redo: rename a study of another definition aside, with all its runs.

    Raises:
        RunError: without `redo`, the study there is of another definition; or it cannot be opened.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)  # of constant_liar
    definition = search.definition()
    runs.mkdir(parents=True, exist_ok=True)
    with lock(runs):  # processes that start together would create the same tables
        if (runs / STUDY).exists():
            study = _load(search, runs)
            before = study.user_attrs.get(DEFINITION, definition)
            changed = [key for key, value in definition.items() if before.get(key) != value]
            if not changed:
                return study
            if not redo:
                seed = f", or write seed = {before['seed']} under [search] to go on with it"
                raise RunError(
                    f"{near_path(runs)} holds a search of another {' and '.join(changed)}; add --redo-changed to "
                    "rename it aside and start again, or rename the experiment file"
                    + (seed if changed == ["seed"] else "")
                )
            rename_aside(runs)
            runs.mkdir(parents=True)
        study = _load(search, runs)
        study.set_user_attr(DEFINITION, definition)
        return study


def rename_aside(runs: Path) -> None:
    """Rename a search with all its runs; nothing is deleted."""
    number = 1
    while (aside := runs.with_name(f"{runs.name}{ASIDE}{number}")).exists():
        number += 1
    runs.rename(aside)


def _load(search: Search, runs: Path) -> optuna.Study:
    pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
    if search.pruner == "asha":
        pruner = optuna.pruners.SuccessiveHalvingPruner(search.min_evaluations, search.reduction_factor)
    try:
        storage = optuna.storages.RDBStorage(
            f"sqlite:///{runs / STUDY}", engine_kwargs={"connect_args": {"timeout": 60}}
        )
        study = optuna.create_study(
            storage=storage, study_name=search.experiment.name, direction="maximize", pruner=pruner, load_if_exists=True
        )
    except Exception as error:  # of SQLAlchemy or Optuna: a damaged file, a disk without locks, another version
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunError(f"{near_path(runs / STUDY)} cannot be used as a study ({reason}); move it away") from error
    return study


@contextmanager
def storage_errors_named(runs: Path) -> Iterator[None]:
    """Raise RunError where the study can no longer be read or written, as on a full disk."""
    try:
        yield
    except optuna.exceptions.StorageInternalError as error:
        reason = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
        raise RunError(f"{near_path(runs / STUDY)} cannot be read or written ({reason})") from error


@contextmanager
def lock(runs: Path) -> Iterator[None]:
    """Keep other processes out; without effect in a read-only folder or on a file system without locks."""
    with ExitStack() as opened:
        with suppress(OSError):
            fcntl.flock(opened.enter_context((runs / LOCK).open("w")), fcntl.LOCK_EX)
        yield


def choose_sampler(search: Search, study: optuna.Study) -> None:
    """Give a study the sampler of this process, which proposes other values than those of its other processes."""
    workers = study.user_attrs.get(WORKERS, 0)
    study.set_user_attr(WORKERS, workers + 1)
    seed = (search.seed + 7919 * workers) % 2**32
    study.sampler = optuna.samplers.RandomSampler(seed)
    if search.sampler == "tpe":
        # constant_liar: values close to those of running trials are not proposed
        study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)


def trials_of(search: Search, study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials of a study; those that several processes began beyond the number asked for are left out."""
    return [trial for trial in study.get_trials(deepcopy=False) if trial.number < search.trials]


def best_of(trials: list[FrozenTrial]) -> FrozenTrial | None:
    """Return the finished trial of the highest accuracy; the first of several."""
    finished = [trial for trial in trials if trial.state == TrialState.COMPLETE and trial.value is not None]
    return max(finished, key=lambda trial: (trial.value, -trial.number), default=None)


def has_owner(trial: FrozenTrial) -> bool:
    """Whether a process still works on a running trial: on this host by its number, elsewhere by its last note."""
    owner = trial.user_attrs.get(OWNER, "")
    host, _, number = owner.rpartition(" ")
    if host == socket.gethostname():
        return is_alive(int(number))
    return bool(owner) and time.time() - trial.user_attrs.get(ALIVE, 0.0) < STALE_SECONDS
