"""The training loop: steps, epochs, evaluation, checkpoints and console output.

It knows neither the number of processes (the engine does) nor how images are read (the batches do).
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from common.errors import RunError
from common.paths import near_path
from common.stop_signal import StopSignal
from config.settings import Settings
from dali_pipeline import Batches, Synthetic
from inference.model_card import write_card
from optim.lr_schedule import Plan
from parallel.batch_sizes import EvalCounts
from parallel.compile import FIRST_STEPS_SECONDS
from parallel.engine import Engine
from parallel.process_group import limit_waits
from records.checkpoint_store import Interval
from records.run_folder import Progress
from training.checkpoint_writer import Snapshot
from training.console import QUIET, Console
from training.epoch_metrics import epoch_line
from training.non_finite import HINT, MAX_CONSECUTIVE_SKIPS, LossMonitor, NonFiniteLoss, check_finite, describe
from training.resume import raise_on_all_ranks
from training.run_start import StartedRun
from training.time_plan import SECONDS_PER_MINUTE, TimePlan, seconds_left
from training.time_plan import describe as describe_plan
from training.trackers import gradient_interval

EVERY_EPOCH = Interval()
FLUSH_SECONDS = 0.5  # interval of reading the losses, which stay on the device until then


class Loop:
    """One run, from its first or next step to its end."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        training: Batches | Synthetic,
        evaluation: dict[str, Batches],
        steps_per_epoch: int,
        started: StartedRun,
        patience: int | None,
        max_minutes: float | None,
        only_shortens: bool,
        stop: StopSignal,
        console: Console,
        evaluate_every: Interval = EVERY_EPOCH,
        evaluate_raw: bool = True,
    ):
        """Prepare the loop.

        Args:
            max_minutes: training time that the number of steps is planned for; None: the schedule has their number.
            only_shortens: `max_minutes` may make the run shorter than the schedule, but not longer.
            patience: early stopping: epochs without better validation accuracy; None: no early stopping.
            evaluate_every: interval of evaluations, in steps or in epochs; the last step is always evaluated.
            evaluate_raw: where there is an EMA, evaluate the trained weights too.

        Raises:
            RunError: nothing is left to train.
        """
        self.engine, self.settings = engine, settings
        self.training, self.evaluation = training, evaluation
        self.steps_per_epoch, self.total_steps = steps_per_epoch, engine.schedule.total
        self.progress, self.writer, self.tracking, self.record, self.profile = (
            started.progress,
            started.writer,
            started.tracking,
            started.record,
            started.profile,
        )
        self.patience, self.stop, self.console = patience, stop, console
        self.evaluate_every, self.evaluate_raw = evaluate_every, evaluate_raw
        self.monitor = LossMonitor()
        self._norms: list[tuple[int, dict[str, Tensor]]] = []  # measured gradients that are still on the device
        self.time_plan = None
        if max_minutes and not engine.schedule.plan:
            self.time_plan = TimePlan(engine.schedule, SECONDS_PER_MINUTE * max_minutes, engine.resizing, only_shortens)
        self._first_steps_left = engine.first_steps
        self._sync_progress_with_engine()
        if engine.step == self.total_steps and not self.progress.num_losses:
            raise RunError(
                "nothing is left to train: the other peers have just made the last step; their runs have the weights"
            )
        self._set_next_evaluation()

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
        """Train to the end. Returns False when asked to stop earlier; everything is saved then. Collective."""
        if self.engine.any(self.stop.requested):  # while the run started
            return False
        self.console.clock.start(self.engine.step, self.total_steps)
        with self.tracking:
            finished = self._run(stop_at)
        self.profile.close()
        if finished and self.record and self.record.metrics():
            page = "/report.html" if self.tracking.reports else ""
            self.console.result(self.record.metrics()[-1], self.steps_per_epoch, self._where() + page)
            write_card(self.record)
        return finished

    def _run(self, stop_at: int | None) -> bool:
        while not (self.engine.step == self.total_steps or self.progress.finished):
            stopping = self._train(stop_at)
            self._sync_progress_with_engine()
            at_boundary = self._ends_epoch() or self._is_evaluation_due()
            if self._is_evaluation_due():
                self._evaluate_and_record()
            elif self._ends_epoch():
                self._finish_epoch()
            if not self.writer.has_saved_now() and (not at_boundary or self.engine.any(self.writer.is_due())):
                self._save_checkpoint()
            # Checked again: the signal may have come during the evaluation.
            if (stopping or self.engine.any(self.stop.requested)) and not (
                self.engine.step == self.total_steps or self.progress.finished
            ):
                if not self.writer.has_saved_now():
                    self._save_checkpoint()
                self.writer.wait()
                self.console.say(
                    f"stopped after step {self.engine.step:,} and saved; the same command resumes the run", QUIET
                )
                return False
        self.writer.wait()
        return True

    def _ends_epoch(self) -> bool:
        return self.progress.step_in_epoch == self.steps_per_epoch or self.engine.step == self.total_steps

    def _is_evaluation_due(self) -> bool:
        """Whether the present step is evaluated: by the interval, or because it is the last one."""
        if self.engine.step >= min(self._next_evaluation, self.total_steps):
            return True
        return (
            math.isinf(self.evaluate_every.steps)
            and self._ends_epoch()
            and (self.progress.epoch + 1) % self.evaluate_every.epochs == 0
        )

    def _set_next_evaluation(self) -> None:
        """Set the step of the next evaluation of an interval in steps, a multiple of it also in a resumed run."""
        steps = self.evaluate_every.steps
        self._next_evaluation = math.inf if math.isinf(steps) else steps * (self.engine.step // steps + 1)

    def _steps_until_pause(self) -> int:
        """Return the steps until the next evaluation, or until the images grow.

        Where they have just grown, the next steps compile and warm up as the first ones did, and are not timed either.
        """
        step, grows_at = self.engine.step, self.engine.resizing.num_steps(self.total_steps)
        if step == grows_at > 0:
            self._first_steps_left = self.engine.first_steps
            limit_waits(FIRST_STEPS_SECONDS if self._first_steps_left else 0.0)
        return int(min(self._next_evaluation, grows_at if step < grows_at else self.total_steps)) - step

    def _train(self, stop_at: int | None) -> bool:
        """Train until the epoch ends or a stop, a checkpoint or an evaluation is due. Returns whether to stop."""
        engine, progress, stopping, pause = self.engine, self.progress, False, False
        accumulation = engine.batch_sizes.accumulation
        epoch_end = min(self.steps_per_epoch, progress.step_in_epoch + self.total_steps - engine.step)
        last = min(epoch_end, progress.step_in_epoch + self._steps_until_pause())
        batches = self.training.epoch(progress.epoch, progress.step_in_epoch * accumulation, last * accumulation)
        with self.console.bar(progress.epoch + 1, progress.step_in_epoch, epoch_end, engine.batch_sizes.total) as bar:
            began = flushed = time.perf_counter()
            self.training.wait_seconds = 0.0
            if self.time_plan:
                self.time_plan.start()
            # At least one step is timed.
            self._first_steps_left = min(self._first_steps_left, last - progress.step_in_epoch - 1)
            while progress.step_in_epoch < last and not pause:
                before = engine.step
                interval = gradient_interval(self.total_steps)
                engine.is_measured_step = (before + 1) % interval == 0 or before + 1 == self.total_steps
                with self.profile.step(before + 1):
                    loss = engine.train_batch(batches)
                self._record_step(loss, before + 1)
                progress.step_in_epoch += 1
                progress.timed_images += engine.batch_sizes.total
                if self._first_steps_left > 0:  # a step that compiles or warms up is not timed
                    loss.item()  # waits for the device
                    progress.warmup_seconds += time.perf_counter() - began
                    progress.timed_images -= engine.batch_sizes.total
                    self._first_steps_left -= 1
                    if not self._first_steps_left:
                        limit_waits()
                    began, self.training.wait_seconds = time.perf_counter(), 0.0
                    if self.time_plan:
                        self.time_plan.restart()
                plan_due = self.time_plan is not None and self.time_plan.is_due(engine.step)
                if time.perf_counter() - flushed > FLUSH_SECONDS:
                    self._collect_losses()
                    flushed = time.perf_counter()
                    bar.loss(progress.loss_sum / max(1, progress.num_losses))
                bar.advance()
                stop_here = self.stop.requested or (stop_at is not None and before < stop_at <= engine.step)
                stopping, plan_due, *others = engine.any_flags(
                    stop_here, plan_due, self.writer.is_due(), self.writer.has_failed() or self.monitor.bad is not None
                )
                if plan_due:
                    loss.item()  # waits for the device
                    self._plan_steps(progress.training_seconds + time.perf_counter() - began)
                    pause = True
                pause = pause or stopping or any(others) or engine.step != before + 1  # advanced by other peers
            if not self._first_steps_left:
                limit_waits()  # also where the only step of an epoch compiled, and was timed
            self.profile.finish()
            began += self.profile.take_seconds()
            self._collect_losses()
            if self.time_plan:
                self.time_plan.stop()
            progress.training_seconds += time.perf_counter() - began
            progress.data_wait_seconds += self.training.wait_seconds
        if engine.any(self.monitor.bad is not None):
            self._stop_on_non_finite()
        return stopping

    def _plan_steps(self, seconds: float) -> None:
        """Plan the number of steps; `seconds` is the training time of this epoch so far. Collective."""
        assert self.time_plan is not None
        spent = seconds + sum(line["training_seconds"] for line in (self.record.metrics() if self.record else []))
        per_step = self.time_plan.seconds_per_step()
        plan = Plan(**self.engine.broadcast_object(asdict(self.time_plan.make(self.engine.step, spent, per_step))))
        seconds = spent + seconds_left(plan.total_steps, plan.after_step, per_step, self.engine.resizing)
        text = describe_plan(plan, per_step, seconds, self.steps_per_epoch)
        self.engine.schedule.set_plan(plan)
        self.total_steps, self.time_plan = plan.total_steps, None
        self.writer.update_facts({"total_steps": plan.total_steps, "plan": asdict(plan)})
        self.tracking.set_total(plan.total_steps)
        self.console.clock.total = plan.total_steps
        self.console.print_field("plan", text)

    def _record_step(self, loss: Tensor, step: int) -> None:
        """Record the step that the engine has just made or skipped."""
        engine, monitor, index = self.engine, self.monitor, self.progress.step_in_epoch
        if engine.norms and engine.is_main:
            self._norms.append((step, engine.norms))
        if not engine.skipped:
            monitor.in_a_row = 0
            monitor.add(step, index, loss, engine.grad_norm)
            return
        self.progress.skipped_steps += 1
        monitor.in_a_row += 1
        assert engine.grad_norm is not None  # by it, the engine decides what it skips
        bad, images = describe(
            engine,
            check_finite(step, index, loss.item(), float(engine.grad_norm)),
            self.training,
            self.progress,
            self._folder(),
        )
        self.console.print_field("skipped", f"step {bad.step:,}: {bad.what}; {images}")
        if monitor.in_a_row == MAX_CONSECUTIVE_SKIPS:
            raise_on_all_ranks(
                engine,
                f"{MAX_CONSECUTIVE_SKIPS} steps in a row had a loss or a gradient that is not finite; "
                f"the last checkpoint is unchanged. {HINT}",
            )

    def _collect_losses(self) -> None:
        """Wait for the device, and add the recorded losses to the sum of the epoch."""
        losses = self.monitor.collect()
        for step, norms in self._norms:
            self.tracking.gradients(step, dict(zip(norms, torch.stack([*norms.values()]).tolist(), strict=True)))
        self._norms.clear()
        for _, loss in losses:  # one by one, so that the sum does not depend on how many are read at once
            self.progress.loss_sum += loss
        self.progress.num_losses += len(losses)
        self.tracking.losses(losses)

    def _stop_on_non_finite(self) -> None:
        """Raise NonFiniteLoss. Collective."""
        bad, images = describe(self.engine, self.monitor.bad, self.training, self.progress, self._folder())
        self.writer.wait()
        if not self.engine.is_main:
            raise SystemExit(1)
        raise NonFiniteLoss(
            f"{bad.what} at optimizer step {bad.step}; the last checkpoint is unchanged. {HINT}; "
            "--skip-bad-steps skips "
            f"such steps. Of that step, {images}"
        )

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
        split = "validation" if "validation" in self.evaluation else "test"
        results = self._evaluate(split)
        best, waited, ends_early = progress.best_accuracy, 0, False
        if split == "validation":  # the test split never selects a model
            best = max(best, results[split][0].accuracy)
            waited = 0 if best > progress.best_accuracy else (engine.step - progress.best_step) // self.steps_per_epoch
            ends_early = self.patience is not None and waited >= self.patience and engine.step < self.total_steps
            if ends_early or engine.step == self.total_steps:
                results |= self._evaluate("test")
        is_best = split == "validation" and best > progress.best_accuracy
        if is_best:
            progress.best_accuracy, progress.best_step = best, engine.step
        is_last = ends_early or engine.step == self.total_steps
        saves = is_last or (ends_epoch and self.writer.is_due_after(progress.epoch + 1))
        line = epoch_line(engine, progress, results, self.tracking.take_seconds(), ends_early)
        if not ends_epoch:
            line["within_epoch"] = True
        if not saves:
            line["checkpoint"] = False
        files = [*(["weights.safetensors"] if saves else []), *(["best.safetensors"] if is_best else [])]
        snapshot = self._snapshot_of(files, state=saves) if files else None
        line["checkpoint_seconds"] = round(progress.checkpoint_seconds + (snapshot.seconds if snapshot else 0.0), 3)
        if self.record:
            self.record.append_metrics(line)
        self.progress = Progress(
            epoch=progress.epoch + int(ends_epoch),
            step_in_epoch=0 if ends_epoch else progress.step_in_epoch,
            best_accuracy=progress.best_accuracy,
            best_step=progress.best_step,
            epochs_without_better=waited,
            finished=is_last,
        )
        self._set_next_evaluation()
        splits = [name for name in results if not name.endswith("_raw")]
        last_epoch = -(-self.total_steps // self.steps_per_epoch)

        def print_epoch() -> None:
            self.console.epoch(line, splits, last_epoch)
            if ends_early:
                self.console.say(
                    f"early stopping: no better validation accuracy than {100 * best:.2f}% for {waited} epochs "
                    f"(--patience {self.patience})"
                )

        if snapshot:
            self.writer.write(snapshot, self.progress, then=print_epoch)
        else:
            print_epoch()
        if self.record:
            self.tracking.epoch(line)

    def _evaluate(self, split: str) -> dict[str, tuple[EvalCounts, float]]:
        """Evaluate a split with the EMA where there is one, and then also with the trained weights as `<split>_raw`."""
        results, also_raw = {}, self.engine.ema is not None and self.evaluate_raw
        for name, raw in [(split, False), *([(f"{split}_raw", True)] if also_raw else [])]:
            began = time.perf_counter()
            results[name] = self.engine.evaluate(self.evaluation[split].epoch(), raw=raw), time.perf_counter() - began
        return results

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

    def _folder(self) -> Path | None:
        return self.record.folder if self.record else None
