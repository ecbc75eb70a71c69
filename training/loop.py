"""The training loop: steps, epochs, evaluation, checkpoints and console output.

It knows neither the number of processes (the engine does) nor how images are read (the batches do).
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from functools import partial

from common.errors import RunError, reason_of
from common.paths import near_path
from common.stop_signal import StopSignal
from dali_pipeline import Batches, Synthetic
from inference.model_card import write_card
from optim.lr_schedule import Plan
from parallel.engine import Engine
from records.run_folder import Progress
from training.checkpoint_writer import Snapshot
from training.console import QUIET, Console
from training.epoch_metrics import epoch_line
from training.evaluation import Evaluation
from training.non_finite import NonFiniteLoss
from training.run_start import StartedRun
from training.step_log import StepLog
from training.step_timer import StepTimer
from training.time_plan import TimePlan
from training.time_plan import describe as describe_plan
from training.trackers import gradient_interval

FLUSH_SECONDS = 0.5  # interval of reading the losses, which stay on the device until then


class Loop:
    """One run, from its first or next step to its end."""

    def __init__(
        self,
        engine: Engine,
        training: Batches | Synthetic,
        evaluation: Evaluation,
        steps_per_epoch: int,
        started: StartedRun,
        time_plan: TimePlan | None,
        stop: StopSignal,
        console: Console,
    ):
        """Prepare the loop.

        Args:
            training: batches of the training split.
            time_plan: plans the number of steps; None: the schedule has their number.
        """
        self.engine, self.training, self.evaluation = engine, training, evaluation
        self.steps_per_epoch, self.total_steps = steps_per_epoch, engine.schedule.total
        self.progress, self.writer, self.tracking, self.record, self.profile = (
            started.progress,
            started.writer,
            started.tracking,
            started.record,
            started.profile,
        )
        self.stop, self.console = stop, console
        self.timer = StepTimer(engine, training, time_plan)
        self._images_are_small = False  # in the steps since the last pause
        # No method of the loop: the console would keep it, and with it the lock of the run folder, after a failure.
        self._work = partial(engine.resizing.work, side=training.side)
        folder = self.record.folder if self.record else None
        self.steps = StepLog(engine, training, self.tracking, folder, console.print_field)
        self._sync_progress_with_engine()

    def _sync_progress_with_engine(self) -> None:
        """Continue at the engine's step: under `local` with peers, other peers may have advanced it."""
        step, progress = self.engine.step, self.progress
        if step != progress.epoch * self.steps_per_epoch + progress.step_in_epoch:
            progress.epoch = min(step, self.total_steps - 1) // self.steps_per_epoch  # the last step ends its epoch
            progress.step_in_epoch = step - progress.epoch * self.steps_per_epoch

    def _where(self) -> str:
        """The run folder as a user would type it."""
        return near_path(self.record.folder) if self.record else ""

    # --- the epochs -----------------------------------------------------------------------------------------------

    def run(self, stop_at: int | None = None) -> bool:
        """Train to the end. Returns False when asked to stop earlier; everything is saved then. Collective.

        Raises:
            RunError: nothing is left to train.
            NonFiniteLoss: a loss or a gradient became infinite or NaN. Other processes than the main one exit then.
        """
        self.console.clock.start(self.engine.step, self.total_steps, self._work)
        try:
            with self.tracking:
                finished = self._run(stop_at)
        except NonFiniteLoss:
            self.writer.wait()  # a launcher ends all processes soon after the first: the reason must be told by then
            if self.engine.is_main:
                raise
            raise SystemExit(1) from None
        self.profile.close()
        if finished and self.record and self.record.metrics():
            page = "/report.html" if self.tracking.reports else ""
            self.console.result(self.record.metrics()[-1], self.steps_per_epoch, self._where() + page)
            try:
                write_card(self.record)
            except Exception as error:  # the run is finished, and evaluate.py writes the card again
                self.console.say(f"warning: README.md was not written ({reason_of(error)})", QUIET)
        self.writer.wait()  # the others wait here as long as for a checkpoint: trackers may upload for minutes
        return finished

    def _run(self, stop_at: int | None) -> bool:
        step = self.engine.step
        if step == self.total_steps and not self.progress.num_losses:
            raise RunError(
                "nothing is left to train: the other peers have just made the last step; their runs have the weights"
            )
        if self.engine.any(self.stop.requested):  # while the run started
            resumes = "resumes" if step else "starts"
            self.console.say(f"stopped before step {step + 1:,}; the same command {resumes} the run", QUIET)
            return False
        while not self.progress.finished:
            stopping = self._train(stop_at)
            self._sync_progress_with_engine()
            if self.engine.step == self.total_steps and self.engine.is_exchange_pending():
                return self._stop()  # the weights are not yet those of the run
            is_evaluated = self._is_evaluation_due()
            at_boundary = is_evaluated or self._ends_epoch()
            if is_evaluated:
                self._evaluate_and_record()
            elif at_boundary:
                self._finish_epoch()
            if not self.writer.has_saved_now() and (not at_boundary or self.engine.any(self.writer.is_due())):
                self._save_checkpoint()
            # Checked again: the signal may have come during the evaluation.
            if (stopping or self.engine.any(self.stop.requested)) and not self.progress.finished:
                return self._stop()
        self.writer.wait()
        return True

    def _stop(self) -> bool:
        """Save what is not saved yet, and return that the run is not finished. Collective."""
        if not self.writer.has_saved_now():
            self._save_checkpoint()
        self.writer.wait()
        self.console.say(f"stopped after step {self.engine.step:,} and saved; the same command resumes the run", QUIET)
        return False

    def _ends_epoch(self) -> bool:
        return self.progress.step_in_epoch == self.steps_per_epoch or self.engine.step == self.total_steps

    def _is_evaluation_due(self) -> bool:
        ended_epochs = self.progress.epoch + 1 if self._ends_epoch() else None
        return self.evaluation.is_due(ended_epochs, is_last=self.engine.step == self.total_steps)

    def _steps_until_pause(self) -> int:
        """Return the steps until the next evaluation, or until the images grow.

        Where they have just grown, the next steps compile and warm up as the first ones did, and are not timed either.
        """
        step, grows_at = self.engine.step, self.engine.resizing.num_steps(self.total_steps)
        if self._images_are_small and step >= grows_at:  # also where a new plan has fewer steps with small images
            self.timer.expect_first_steps()
        self._images_are_small = step < grows_at
        return int(min(self.evaluation.next_step, grows_at if step < grows_at else self.total_steps)) - step

    def _train(self, stop_at: int | None) -> bool:
        """Train until the epoch ends or a stop, a checkpoint or an evaluation is due. Returns whether to stop."""
        engine, progress, stopping, pause = self.engine, self.progress, False, False
        accumulation = engine.batch_sizes.accumulation
        epoch_end = min(self.steps_per_epoch, progress.step_in_epoch + self.total_steps - engine.step)
        last = min(epoch_end, progress.step_in_epoch + self._steps_until_pause())
        # To the end of the epoch: the batches that are prefetched at a pause are used after it.
        batches = self.training.epoch(progress.epoch, progress.step_in_epoch * accumulation, epoch_end * accumulation)
        with self.console.bar(progress.epoch + 1, progress.step_in_epoch, epoch_end, engine.batch_sizes.total) as bar:
            self.timer.start(last - progress.step_in_epoch)
            flushed = time.perf_counter()
            while progress.step_in_epoch < last and not pause:
                before = engine.step
                interval = gradient_interval(self.total_steps)
                engine.is_measured_step = (before + 1) % interval == 0 or before + 1 == self.total_steps
                with self.profile.step(before + 1):
                    loss = engine.train_batch(batches)
                self.steps.add(progress, loss, before + 1)
                progress.step_in_epoch += 1
                self.timer.add(progress, loss)
                plan_due = self.timer.is_plan_due()
                if time.perf_counter() - flushed > FLUSH_SECONDS:
                    self.steps.collect(progress)
                    flushed = time.perf_counter()
                    bar.loss(progress.loss_sum / max(1, progress.num_losses))
                bar.advance()
                stop_here = self.stop.requested or (stop_at is not None and before < stop_at <= engine.step)
                stopping, plan_due, *others = engine.any_flags(
                    stop_here, plan_due, self.writer.is_due(), self.writer.has_failed() or self.steps.has_failed()
                )
                if plan_due:
                    loss.item()  # waits for the device
                    self._plan_steps(progress.training_seconds + self.timer.seconds())
                    pause = True
                pause = pause or stopping or any(others) or engine.step != before + 1  # advanced by other peers
            self.profile.finish()
            self.steps.collect(progress)
            self.timer.stop(progress, self.profile.take_seconds())
        if engine.any(self.steps.has_failed()):
            raise self.steps.failure(progress)
        return stopping

    def _plan_steps(self, seconds: float) -> None:
        """Plan the number of steps; `seconds` is the training time of this epoch so far. Collective."""
        time_plan = self.timer.time_plan
        assert time_plan is not None
        spent = seconds + sum(line["training_seconds"] for line in (self.record.metrics() if self.record else []))
        per_step = time_plan.seconds_per_step() or spent / self.engine.step
        full = time_plan.full_step_seconds(self.engine.step, per_step)
        plan = Plan(**self.engine.broadcast_object(asdict(time_plan.make(self.engine.step, spent, full))))
        work = [self._work(step, plan.total_steps) for step in (plan.after_step, plan.total_steps)]
        seconds = spent + full * (work[1] - work[0])
        text = describe_plan(plan, per_step, seconds, self.steps_per_epoch)
        self.engine.schedule.set_plan(plan)
        self.total_steps, self.timer.time_plan = plan.total_steps, None
        self.writer.update_facts({"total_steps": plan.total_steps, "plan": asdict(plan)})
        self.tracking.set_total(plan.total_steps)
        self.console.clock.total = plan.total_steps
        self.console.print_field("plan", text)

    def _finish_epoch(self) -> None:
        """End an epoch that is not evaluated: the next line of metrics.jsonl covers it too. Collective."""
        is_due = self.writer.is_due_after(self.progress.epoch + 1)
        snapshot = self._snapshot_of(["weights.safetensors"], state=True) if is_due else None
        self.progress = replace(self.progress, epoch=self.progress.epoch + 1, step_in_epoch=0)
        if snapshot:
            self.progress.checkpoint_seconds += snapshot.seconds
            self.writer.write(snapshot, self.progress)

    def _evaluate_and_record(self) -> None:
        """Evaluate, write a line of metrics.jsonl, save a checkpoint at the end of an epoch, print. Collective."""
        engine, progress, ends_epoch = self.engine, self.progress, self._ends_epoch()
        found = self.evaluation.run(progress, is_last=engine.step == self.total_steps)
        is_last = found.ends_early or engine.step == self.total_steps
        saves = is_last or (ends_epoch and self.writer.is_due_after(progress.epoch + 1))
        line = epoch_line(engine, progress, found.results, self.tracking.take_seconds(), found.ends_early)
        if not ends_epoch:
            line["within_epoch"] = True
        if not saves:
            line["checkpoint"] = False
        files = [*(["weights.safetensors"] if saves else []), *(["best.safetensors"] if found.is_best else [])]
        snapshot = self._snapshot_of(files, state=saves) if files else None
        line["checkpoint_seconds"] = round(progress.checkpoint_seconds + (snapshot.seconds if snapshot else 0.0), 3)
        if self.record:
            self.record.append_metrics(line)
        self.progress = Progress(
            epoch=progress.epoch + int(ends_epoch),
            step_in_epoch=0 if ends_epoch else progress.step_in_epoch,
            best_accuracy=found.best_accuracy,
            best_step=found.best_step,
            finished=is_last,
        )
        self.evaluation.set_next()
        splits = [name for name in found.results if not name.endswith("_raw")]
        last_epoch = -(-self.total_steps // self.steps_per_epoch)

        def print_epoch() -> None:
            self.console.epoch(line, splits, last_epoch)
            if found.ends_early:
                self.console.say(
                    f"early stopping: no better validation accuracy than {100 * found.best_accuracy:.2f}% "
                    f"for {found.epochs_without_better} epochs (--patience {self.evaluation.patience})"
                )

        if snapshot:
            self.writer.write(snapshot, self.progress, then=print_epoch)
        else:
            print_epoch()
        if self.record:
            self.tracking.epoch(line)

    # --- files ----------------------------------------------------------------------------------------------------

    def _snapshot_of(self, files: list[str], state: bool) -> Snapshot:
        """Gather the weights for these files, with the raw weights of a run with an EMA, and the state. Collective."""
        has_raw = self.engine.ema is not None and "weights.safetensors" in files
        raw = {"raw_weights.safetensors": partial(self.engine.weights, raw=True)} if has_raw else {}
        return self.writer.take_snapshot(self.progress, {**dict.fromkeys(files, self.engine.weights), **raw}, state)

    def _save_checkpoint(self) -> None:
        """Save a checkpoint within an epoch. Collective."""
        snapshot = self.writer.take_snapshot(self.progress)
        self.progress.checkpoint_seconds += snapshot.seconds
        self.writer.write(snapshot, self.progress)
