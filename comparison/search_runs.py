"""The runs of a search: proposed by Optuna, trained like every other run, and pruned where they fall behind.

Several processes work on one study (comparison/search_study.py). Each trial is a run folder `trial-0007`. Pruned ones
are kept, and run.json says in `search` what became of each. A trial whose process was killed or stopped is resumed by
the next process.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from common.errors import EXIT_STOPPED, RunError, SettingsError
from common.stop_signal import StopSignal
from common.text import duration, last_error
from comparison.planned_run import PlannedRun
from comparison.planning import Data, make_task
from comparison.run_queue import check_existing_runs
from comparison.search import Search, describe
from comparison.search_study import ALIVE, OWNER, REASON, SAME_AS, best_of, choose_sampler, has_owner, lock, trials_of
from records.run_folder import RunFolder

POLL_SECONDS = 0.2  # between checks of the child processes
READ_SECONDS = 1.0  # between readings of the metrics of a running trial
ALIVE_SECONDS = 30.0  # between notes of a process that it still works on a trial


@dataclass
class Running:
    """A trial that this process trains."""

    trial: Trial
    task: PlannedRun
    child: Any  # has `poll()` and `terminate()` as subprocess.Popen
    began: float
    read: float = 0.0
    noted: float = 0.0
    evaluations: int = 0  # that Optuna knows
    is_pruned: bool = False


class SearchRuns:
    """Makes the trials of a search that are left.

    Args:
        slots: what each of the concurrent runs adds to its environment.
        start: starts a run, as for run_queue.run_all.
        extra: further arguments of train.py, such as those of trackers.
    """

    def __init__(
        self,
        search: Search,
        study: optuna.Study,
        data: Data,
        runs: Path,
        slots: list[dict[str, str]],
        stop: StopSignal,
        start: Callable[[PlannedRun, dict[str, str]], Any],
        extra: tuple[str, ...] = (),
    ):
        self.search, self.study, self.data, self.runs = search, study, data, runs
        self.slots, self.stop, self.start, self.extra = slots, stop, start, extra
        self.owner = f"{socket.gethostname()} {os.getpid()}"
        self.running: dict[int, Running] = {}
        with lock(runs):
            choose_sampler(search, study)

    def run(self) -> None:
        """Train until the study has all its trials, or until `stop` is requested; then running ones save first."""
        has_more, is_stopping = True, False
        try:
            while self.running or (has_more and not self.stop.number):
                for slot, one in list(self.running.items()):
                    if one.child.poll() is not None:
                        del self.running[slot]
                        self._end(one)
                    else:
                        self._watch(one)
                for slot in range(len(self.slots)):
                    if slot not in self.running and has_more and not self.stop.number:
                        has_more = self._begin(slot)
                if self.stop.number and not is_stopping:
                    is_stopping = True
                    print(f"stopping: {len(self.running)} trial(s) save first (a second Ctrl-C does not wait)")
                    self._terminate()
                time.sleep(POLL_SECONDS)
        except BaseException:
            self._terminate()
            raise

    def _terminate(self) -> None:
        for one in self.running.values():
            one.child.terminate()

    def problem(self) -> str | None:
        """Return why no further trial may be made: the source code has changed since one of those so far."""
        trials = trials_of(self.search, self.study)
        if len(trials) == self.search.trials and all(trial.state.is_finished() for trial in trials):
            return None
        begun = []
        for trial in trials:
            with suppress(SettingsError):  # a failed trial, whose values do not fit together
                begun.append(self.task_of(trial.number, trial.params))
        try:
            check_existing_runs([task for task in begun if RunFolder(task.folder).exists], redo=False)
        except RunError as error:
            return str(error)
        return None

    def task_of(self, number: int, values: dict[str, Any]) -> PlannedRun:
        """Return the run of a trial. Raises SettingsError where its values do not fit together, or not to the data."""
        name, experiment = f"trial-{number:04d}", self.search.experiment
        variant = self.search.variant(name, values)
        steps = int(experiment.budget_amount) if experiment.budget == "steps" else None
        task = make_task(experiment, variant, self.search.seed, self.data, self.runs / name, steps)
        return replace(task, variant="search", arguments=[*task.arguments, *self.extra])

    # --- one trial ---------------------------------------------------------------------------------------------------

    def _begin(self, slot: int) -> bool:
        """Start or resume a trial on a free slot. Returns whether the study may have more for this process."""
        trial = self._claim()
        if trial is None:
            return False
        values = {name: its.suggest(trial, name) for name, its in self.search.space.items()}
        if twin := self._twin(trial, values):
            trial.set_user_attr(SAME_AS, twin.number)
            self._tell(trial, twin.value, TrialState.COMPLETE, f"same values as trial-{twin.number:04d}")
            return True
        try:
            task = self.task_of(trial.number, values)
        except SettingsError as error:
            self._tell(trial, None, TrialState.FAIL, str(error))
            return True
        verb = "resumed" if RunFolder(task.folder).exists else "started"
        task.folder.parent.mkdir(parents=True, exist_ok=True)
        known = len(self._frozen(trial).intermediate_values)
        child = self.start(task, self.slots[slot])
        self.running[slot] = Running(trial, task, child, time.monotonic(), evaluations=known)
        self._say(f"{task.name} {verb}: {describe(values)}")
        return True

    def _claim(self) -> Trial | None:
        """Return a trial that this process now works on: one that was abandoned, else a new one; None without any."""
        with lock(self.runs):  # two processes must not take the same one
            trial = self._abandoned()
            if trial is None and len(trials_of(self.search, self.study)) < self.search.trials:
                trial = self.study.ask()
            if trial is not None:
                self._note(trial)
            return trial

    def _abandoned(self) -> Trial | None:
        """Return a trial that no process works on any more, if there is one."""
        mine = {one.trial.number for one in self.running.values()}
        for frozen in trials_of(self.search, self.study):
            # This process's own number on a trial that it does not train is that of an earlier process, as in a
            # container, where each is number 1.
            is_free = not has_owner(frozen) or frozen.user_attrs.get(OWNER) == self.owner
            if frozen.state == TrialState.RUNNING and frozen.number not in mine and is_free:
                return Trial(self.study, frozen._trial_id)
        return None

    def _note(self, trial: Trial) -> None:
        """Write down that this process works on a trial."""
        trial.set_user_attr(OWNER, self.owner)
        trial.set_user_attr(ALIVE, time.time())

    def _twin(self, trial: Trial, values: dict[str, Any]) -> FrozenTrial | None:
        """Return a finished trial of the same values: its run would be the same, bit for bit."""
        for other in trials_of(self.search, self.study):
            if other.state == TrialState.COMPLETE and other.number != trial.number and other.params == values:
                return other
        return None

    def _watch(self, one: Running) -> None:
        """Report new evaluations of a running trial, and end it where the pruner says so."""
        now = time.monotonic()
        if now - one.noted >= ALIVE_SECONDS:
            one.noted = now
            self._note(one.trial)
        if one.is_pruned or now - one.read < READ_SECONDS:
            return
        one.read = now
        if self._report(one) and not self.stop.number:
            one.is_pruned = True
            one.child.terminate()

    def _report(self, one: Running) -> bool:
        """Report the evaluations that Optuna does not know. Returns whether the trial should be pruned."""
        for value in accuracies(one.task)[one.evaluations :]:
            one.evaluations += 1
            one.trial.report(value, one.evaluations)
            if one.trial.should_prune():
                return True
        return False

    def _end(self, one: Running) -> None:
        """Tell the study what became of a trial whose run has ended."""
        code, state = one.child.poll(), one.task.state()
        took, is_finished = duration(time.monotonic() - one.began), state == "finished"
        if not one.is_pruned and is_finished:
            while self._report(one):  # the last evaluations, which decide nothing any more
                pass
        found = accuracies(one.task)
        if is_finished and found:
            self._tell(one.trial, found[-1], TrialState.COMPLETE, f"{100 * found[-1]:.2f} % ({took})", one.task)
        elif one.is_pruned:
            value = 100 * found[one.evaluations - 1]
            text = f"pruned after {one.evaluations} evaluation(s) at {value:.2f} % ({took})"
            self._tell(one.trial, None, TrialState.PRUNED, text, one.task)
        elif self.stop.number or code == EXIT_STOPPED:
            one.trial.set_user_attr(OWNER, "")  # saved: the next process resumes it
        elif self._is_mine(one.trial):
            log = one.task.log.read_text(errors="replace") if one.task.log.exists() else ""
            reason = last_error(log) or f"ended with exit code {code} and no output"
            self._tell(one.trial, None, TrialState.FAIL, reason, one.task)

    def _frozen(self, trial: Trial) -> FrozenTrial:
        return next(one for one in self.study.get_trials(deepcopy=False) if one.number == trial.number)

    def _is_mine(self, trial: Trial) -> bool:
        frozen = self._frozen(trial)
        return frozen.user_attrs.get(OWNER) == self.owner and frozen.state == TrialState.RUNNING

    def _tell(
        self, trial: Trial, value: float | None, state: TrialState, text: str, task: PlannedRun | None = None
    ) -> None:
        trial.set_user_attr(REASON, text)
        self.study.tell(trial, value, state=state)
        if task:
            mark(task, state, trial.number)
        prefix = "FAILED: " if state == TrialState.FAIL else ""
        self._say(f"trial-{trial.number:04d} {prefix}{text}")

    def _say(self, text: str) -> None:
        trials = trials_of(self.search, self.study)
        ended = sum(trial.state.is_finished() for trial in trials)
        best = best_of(trials)
        tail = f"; best {100 * best.value:.2f} % (trial-{best.number:04d})" if best and best.value is not None else ""
        print(f"[{ended}/{self.search.trials}] {text}{tail}", flush=True)


def mark(task: PlannedRun, state: TrialState, number: int) -> None:
    """Write into run.json what became of a trial: `search` = {"trial": 7, "state": "pruned"}."""
    record = RunFolder(task.folder)
    if record.exists:
        record.create(record.facts() | {"search": {"trial": number, "state": state.name.lower()}})


def accuracies(task: PlannedRun) -> list[float]:
    """Return the accuracy on the validation split at each evaluation so far. The test split is not read."""
    with suppress(OSError, ValueError):  # written by another process at this moment
        lines = RunFolder(task.folder).metrics()
        return [line["validation_accuracy"] for line in lines if "validation_accuracy" in line]
    return []
