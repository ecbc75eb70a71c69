"""The training loop: steps, epochs, evaluation, checkpoints, and what the person sees meanwhile.

It knows neither how many processes there are (the engine does) nor how images are read (the batches do).
"""

from __future__ import annotations

import os
import resource
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import RunError
from config.differences import changed_settings
from config.settings import Settings
from dali_pipeline import Batches
from image_data.dataset import Dataset
from inference.model_card import write_card
from parallel.batch_sizes import Counts
from parallel.engine import Engine
from parallel.process_group import limit_waits
from records.checkpoint_store import Checkpoints
from records.run_folder import Progress, RunRecord
from training.checkpoint_writer import Saver
from training.console import QUIET, VERBOSE, Screen
from training.non_finite import CURE, MOST_IN_A_ROW, NonFiniteLoss, StepWatch, describe, judge
from training.resume import begin, keep_validation_list
from training.resume_conditions import conditions
from training.run_facts import facts_of
from training.trackers import Tracking, first_images, start_tracking

FLUSH_SECONDS = 0.5  # between looks at the losses, which wait on the device until then


class StopRequest:
    """Remembers that SIGTERM or SIGINT (Ctrl-C) asked the run to save and leave at the next step."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C: the person does not want to wait
        self.requested = True


class Loop:
    """One run from its first or next step to its end."""

    def __init__(self, engine: Engine, settings: Settings, training: Batches, evaluation: dict[str, Batches],
                 steps_per_epoch: int, total_steps: int, stop: StopRequest, screen: Screen):
        self.engine, self.settings = engine, settings
        self.training, self.evaluation = training, evaluation
        self.steps_per_epoch, self.total_steps = steps_per_epoch, total_steps
        self.stop, self.screen = stop, screen
        engine.stopping = lambda: stop.requested
        self.watch = StepWatch()
        self.record: RunRecord | None = None  # on the main process
        self.saver: Saver
        self.tracking = Tracking([])
        self.progress = Progress()
        self.patience: int | None = None  # epochs without a better validation accuracy after which the run ends
        self._first_steps_left = engine.first_steps

    # --- the run folder -------------------------------------------------------------------------------------------

    def open_run(self, args: Any, preset: str, dataset: Dataset) -> None:
        """Find or make the run folder, and go on from its newest checkpoint if it has one. Collective."""
        engine = self.engine
        facts = facts_of(args, preset, dataset, engine, self.training.source, self.steps_per_epoch, self.total_steps)
        now = conditions(engine, self.training.source, facts["commit"])
        start = problem = checkpoints = None
        if engine.is_main:
            try:
                start = begin(args, facts, now, engine.state_values())
                keep_validation_list(start.record.folder, dataset)
            except (RunError, OSError) as error:
                problem = str(error)
        self._end_together(problem)
        if engine.from_main(start is not None and start.checkpoint is not None):
            engine.load(start.checkpoint if start else Path())
        if start:
            start.keep_changes()
            self.record, checkpoints = start.record, Checkpoints(start.record.folder / "state", args.keep_checkpoints)
        self.progress = engine.from_main(start and start.progress)
        self.progress.loss_sum = engine.own_share(self.progress.loss_sums)
        self.patience = args.patience
        self.saver = Saver(engine, args.checkpoint_every, now, self.record, checkpoints)
        self._say_hello(facts, dataset)
        for text in start.said if start else ():
            self.screen.fact("note", text)
        self._start_tracking(facts, dataset, args)
        engine.begin(facts)
        self._follow()
        if engine.step == self.total_steps and not self.progress.num_losses:
            raise RunError("the others have just made their last step, and nothing is left to train; their runs have the weights")

    def _follow(self) -> None:
        """Go on from where others have carried the engine: `local` with peers."""
        step, progress = self.engine.step, self.progress
        if step != progress.epoch * self.steps_per_epoch + progress.step_in_epoch:
            progress.epoch = min(step, self.total_steps - 1) // self.steps_per_epoch  # the last step belongs to the last epoch
            progress.step_in_epoch = step - progress.epoch * self.steps_per_epoch

    def _end_together(self, problem: str | None) -> None:
        """Where the main process has a problem, end all of them; it says what the problem is. Collective."""
        if problem := self.engine.from_main(problem):
            raise RunError(problem) if self.engine.is_main else SystemExit(1)

    def _start_tracking(self, facts: dict[str, Any], dataset: Dataset, args: Any) -> None:
        """Collective, because what cannot be started ends all processes."""
        problem = None
        if self.record:
            try:
                self.tracking = start_tracking(self.record.folder, facts, self.engine.step, args.tensorboard, args.wandb, self.screen)
            except (RunError, OSError) as error:
                problem = str(error)
        self._end_together(problem)
        if not self.engine.step:
            self.tracking.first_batch(lambda: first_images(next(self.training.epoch(0, 0, 1))[0], dataset.mean, dataset.std))

    def _say_hello(self, facts: dict[str, Any], dataset: Dataset) -> None:
        sizes, model, fact = self.engine.batch_sizes, self.settings.model, self.screen.fact
        what = model.architecture if model.architecture != "vit" else f"vit, {model.attention} attention, {model.feed_forward} feed-forward"
        fact("run", self._where())
        fact("data", f"{facts['dataset']['folder']}: {len(dataset.classes)} classes, {self.training.side} x {self.training.side} pixels, "
             + ", ".join(f"{count:,} {name}" for name, count in facts["dataset"]["num_images"].items()) + f"; {self.training.source} source")
        fact("model", f"{what}: {self.engine.num_parameters:,} parameters")
        fact("batch", f"{sizes.total} = {sizes.micro} x {sizes.accumulation} accumulated x {sizes.shards} processes; "
             f"{self.steps_per_epoch} steps an epoch, {self.total_steps:,} in all")
        fact("engine", f"{self.settings.strategy} on {facts['device']}, {self.engine.describe()}")
        for path, value, default in changed_settings(facts["settings"]):
            fact("setting", f"{path} = {value} (default: {default})", VERBOSE)
        if self.engine.step:
            fact("resuming", f"after step {self.engine.step:,} of {self.total_steps:,}")

    def _where(self) -> str:
        """The run folder as a person would type it."""
        return os.path.relpath(self.record.folder) if self.engine.is_main else ""

    # --- the epochs -----------------------------------------------------------------------------------------------

    def run(self, stop_at: int | None = None) -> bool:
        """Train to the end. Returns False when told to stop before it; everything is saved then. Collective."""
        if self.engine.any(self.stop.requested):  # while it waited to begin
            return False
        self.screen.clock.start(self.engine.step, self.total_steps)
        with self.tracking:
            finished = self._run(stop_at)
        if finished and self.record and self.record.metrics():
            self.screen.result(self.record.metrics()[-1], self._where())
            write_card(self.record)
        return finished

    def _run(self, stop_at: int | None) -> bool:
        while not (self.engine.step == self.total_steps or self.progress.finished):
            stopping = self._train(stop_at)
            self._follow()
            if self.progress.step_in_epoch == self.steps_per_epoch or self.engine.step == self.total_steps:
                self._finish_epoch()
            else:
                self._save_checkpoint()
            # Asked again: the wish may have come during the evaluation.
            if (stopping or self.engine.any(self.stop.requested)) and not (self.engine.step == self.total_steps or self.progress.finished):
                self.saver.settle()
                self.screen.say(f"stopped after step {self.engine.step:,} and saved; start the same run again to go on", QUIET)
                return False
        self.saver.settle()
        return True

    def _train(self, stop_at: int | None) -> bool:
        """Steps until the epoch ends, the run is to stop or a checkpoint is due. Returns whether it is to stop."""
        engine, progress, stopping, pause = self.engine, self.progress, False, False
        accumulation = engine.batch_sizes.accumulation
        last = min(self.steps_per_epoch, progress.step_in_epoch + self.total_steps - engine.step)
        batches = self.training.epoch(progress.epoch, progress.step_in_epoch * accumulation, last * accumulation)
        with self.screen.bar(progress.epoch + 1, progress.step_in_epoch, last, engine.batch_sizes.total) as bar:
            began = flushed = time.perf_counter()
            self.training.wait_seconds = 0.0
            self._first_steps_left = min(self._first_steps_left, last - progress.step_in_epoch - 1)  # one step at least is timed
            while progress.step_in_epoch < last and not pause:
                before = engine.step
                loss = engine.train_batch(batches)
                self._note(loss, before + 1)
                progress.step_in_epoch += 1
                progress.timed_images += engine.batch_sizes.total
                if self._first_steps_left > 0:  # it compiled or warmed up: nothing to time the training by
                    loss.item()  # waits for the device
                    progress.warmup_seconds += time.perf_counter() - began
                    progress.timed_images -= engine.batch_sizes.total
                    self._first_steps_left -= 1
                    if not self._first_steps_left:
                        limit_waits()
                    began, self.training.wait_seconds = time.perf_counter(), 0.0
                if time.perf_counter() - flushed > FLUSH_SECONDS:
                    self._look_at_losses()
                    flushed = time.perf_counter()
                    bar.loss(progress.loss_sum / max(1, progress.num_losses))
                bar.advance()
                stop_here = self.stop.requested or (stop_at is not None and before < stop_at <= engine.step)
                stopping, *others = engine.any_of(stop_here, self.saver.due(), self.saver.failed() or self.watch.bad is not None)
                pause = stopping or any(others) or engine.step != before + 1  # carried on by others
            self._look_at_losses()
            progress.training_seconds += time.perf_counter() - began
            progress.data_wait_seconds += self.training.wait_seconds
        if engine.any(self.watch.bad is not None):
            self._refuse_bad_step()
        return stopping

    def _note(self, loss: Tensor, step: int) -> None:
        """Take note of the step that the engine has just made, or skipped."""
        engine, watch, index = self.engine, self.watch, self.progress.step_in_epoch
        if not engine.skipped:
            watch.in_a_row = 0
            watch.add(step, index, loss, engine.grad_norm)
            return
        self.progress.skipped_steps += 1
        watch.in_a_row += 1
        bad, images = describe(engine, judge(step, index, loss.item(), float(engine.grad_norm)), self.training, self.progress, self._folder())
        self.screen.fact("skipped", f"step {bad.step:,}: {bad.what}; {images}")
        if watch.in_a_row == MOST_IN_A_ROW:
            self._end_together(f"{MOST_IN_A_ROW} steps in a row had a loss or a gradient that is not finite; the last checkpoint is untouched. "
                               f"{CURE}")

    def _look_at_losses(self) -> None:
        """Wait for the device, and add the losses that were noted to the epoch's."""
        losses = self.watch.look()
        for _, loss in losses:  # one by one: the sum does not depend on how many come at once
            self.progress.loss_sum += loss
        self.progress.num_losses += len(losses)
        self.tracking.losses(losses)

    def _refuse_bad_step(self) -> None:
        """Raises NonFiniteLoss. Collective."""
        bad, images = describe(self.engine, self.watch.bad, self.training, self.progress, self._folder())
        self.saver.settle()
        if not self.engine.is_main:
            raise SystemExit(1)
        raise NonFiniteLoss(f"{bad.what} at optimiser step {bad.step}; the last checkpoint is untouched. {CURE}; --skip-bad-steps goes on "
                            f"without such steps. Of that step, {images}")

    def _finish_epoch(self) -> None:
        """Evaluate, write the epoch's line, save."""
        engine, progress = self.engine, self.progress
        split = "validation" if "validation" in self.evaluation else "test"
        results = self._evaluate(split)
        best, waited, ends_early = progress.best_accuracy, 0, False
        if split == "validation":  # the test split chooses nothing
            best = max(best, results[split][0].accuracy)
            waited = 0 if best > progress.best_accuracy else progress.epochs_without_better + 1
            ends_early = self.patience is not None and waited >= self.patience and engine.step < self.total_steps
            if ends_early or engine.step == self.total_steps:
                results |= self._evaluate("test")
        is_best = split == "validation" and waited == 0
        if is_best:
            progress.best_accuracy, progress.best_step = best, engine.step
        line: dict[str, Any] = {
            "epoch": progress.epoch + 1,
            "step": engine.step,
            "learning_rate": self.settings.engine["optimizer"]["params"]["lr"] * engine.schedule(engine.step - 1),
            "train_loss": engine.mean(torch.tensor(progress.loss_sum / max(1, progress.num_losses), dtype=torch.float64)),
            "skipped_steps": progress.skipped_steps,
            "images_per_second": round(progress.timed_images / progress.training_seconds, 1),
            "training_seconds": round(progress.training_seconds, 3),
            "warmup_seconds": round(progress.warmup_seconds, 3),
            "data_wait_seconds": round(progress.data_wait_seconds, 3),
            "memory_gib": round(self._memory_gib(), 3),
            "tracking_seconds": round(self.tracking.take_seconds(), 3),
        }
        for name, (counts, seconds) in results.items():
            line |= {f"{name}_{key}": value for key, value in counts.facts().items()} | {f"{name}_seconds": round(seconds, 3)}
        line |= engine.epoch_facts() | ({"ended_early": True} if ends_early else {})
        names = ["weights.safetensors", *(["best.safetensors"] if is_best else [])]
        raw = {"raw_weights.safetensors": partial(engine.weights, raw=True)} if engine.average is not None else {}
        snapshot = self.saver.snapshot(progress, {**dict.fromkeys(names, engine.weights), **raw})
        line["checkpoint_seconds"] = round(progress.checkpoint_seconds + snapshot.seconds, 3)
        self.screen.epoch(line, [name for name in results if not name.endswith("_raw")], -(-self.total_steps // self.steps_per_epoch))
        if self.record:
            self.record.append_metrics(line)
            self.tracking.epoch(line)
        self.progress = Progress(epoch=progress.epoch + 1, best_accuracy=progress.best_accuracy, best_step=progress.best_step,
                                 epochs_without_better=waited, finished=ends_early or engine.step == self.total_steps)
        self.saver.write(snapshot, self.progress)
        if ends_early:
            self.screen.say(f"ended early: no better validation accuracy than {100 * best:.2f}% for {waited} epochs (--patience {self.patience})")

    def _evaluate(self, split: str) -> dict[str, tuple[Counts, float]]:
        """What counts, by the name of the split: the averaged weights where there is an average, and then the trained ones as `<split>_raw`."""
        results = {}
        for name, raw in [(split, False), *([(f"{split}_raw", True)] if self.engine.average is not None else [])]:
            began = time.perf_counter()
            results[name] = self.engine.count(self.evaluation[split].epoch(), raw=raw), time.perf_counter() - began
        return results

    # --- files ----------------------------------------------------------------------------------------------------

    def _save_checkpoint(self) -> None:
        """In the middle of an epoch. Collective."""
        snapshot = self.saver.snapshot(self.progress)
        self.progress.checkpoint_seconds += snapshot.seconds
        self.saver.write(snapshot, self.progress)

    def _folder(self) -> Path | None:
        return self.record.folder if self.record else None

    def _memory_gib(self) -> float:
        """The most memory this process has held: on the GPU where it has one, else in RAM."""
        if self.engine.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.engine.device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
