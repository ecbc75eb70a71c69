"""The training loop: steps, epochs, evaluation, checkpoints, and what the person sees meanwhile.

It knows neither how many processes there are (the engine does) nor how images are read (the batches do).
"""

from __future__ import annotations

import math
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from dali_pipeline import Batches
from dataset import Dataset
from parallel import Counts, Engine
from parallel.environment import limit_waits
from report import draw_curves
from run_record import Progress, RunError, RunRecord, choose_folder, provenance, write_atomically
from settings import Settings, SettingsError

FLUSH_SECONDS = 0.5  # between looks at the losses, which wait on the device until then
SAVE_SECONDS = 1800.0  # that a checkpoint may take before the processes that wait for it give up
CURVES_SECONDS = 30.0  # between redrawings of curves.png


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


class NonFiniteLoss(RunError):
    """The loss became infinite or not a number; the message names the step."""


class Loop:
    """One run from its first or next step to its end."""

    def __init__(self, engine: Engine, settings: Settings, training: Batches, evaluation: dict[str, Batches],
                 steps_per_epoch: int, total_steps: int, stop: StopRequest):
        self.engine, self.settings = engine, settings
        self.training, self.evaluation = training, evaluation
        self.steps_per_epoch, self.total_steps = steps_per_epoch, total_steps
        self.stop = stop
        self.record: RunRecord
        self.progress = Progress()
        self._curves_drawn = 0.0

    # --- the run folder -------------------------------------------------------------------------------------------

    def open_run(self, args: Any, preset: str, dataset: Dataset) -> None:
        """Find or make the run folder, and go on from its newest checkpoint if it has one. Collective."""
        engine = self.engine
        facts = {
            **provenance(),
            "settings": self.settings.as_dict(),
            "preset": preset,
            "seed": args.seed,
            "max_steps": args.max_steps,
            "hold_out": args.hold_out,
            "init_weights": args.init_weights.name if args.init_weights else None,
            "synthetic": args.synthetic,
            "dataset": {
                "name": args.dataset if args.data_dir is None else Path(args.data_dir).name,
                "folder": os.path.relpath(dataset.folder.resolve(), Path(__file__).resolve().parent),
                "fingerprint": dataset.fingerprint, "classes": dataset.classes, "image_side": dataset.image_side,
                "mean": dataset.mean, "std": dataset.std, "num_images": {name: len(split) for name, split in dataset.splits.items()},
            },
            "device": torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "CPU",
            "precision": engine.precision,
            "num_processes": engine.data_shard[1],
            "source": self.training.source,
            "batch": vars(engine.batch_sizes),
            "steps_per_epoch": self.steps_per_epoch,
            "total_steps": self.total_steps,
        }
        problem = checkpoint = None
        if engine.is_main:
            try:
                self.record = choose_folder(args, facts)
                checkpoint = self.record.newest_checkpoint()
            except (RunError, OSError) as error:
                problem = str(error)
        if problem := engine.from_main(problem):
            raise RunError(problem) if engine.is_main else SystemExit(1)
        if engine.from_main(checkpoint is not None):
            try:
                engine.load(checkpoint)
            except SettingsError:  # the state is whole, but of a kind that this engine cannot go on from
                raise
            except (SafetensorError, OSError, KeyError, ValueError) as error:
                raise RunError(f"{checkpoint} is damaged ({error}); delete it to go on from the checkpoint before it, "
                               "or give --fresh to start over") from error
            if engine.is_main:
                self.progress = RunRecord.read_progress(checkpoint)
                self.record.keep_metrics(self.progress.num_metrics)
            self.progress = engine.from_main(self.progress)
        elif engine.is_main:
            self.record.create(facts)
            self.record.keep_metrics(0)  # of a run that was killed before its first checkpoint
            if "validation" in dataset.splits:
                write_atomically(self.record.folder / "validation_file_list.txt",
                                 "".join(f"{path}\t{label}\n" for path, label in
                                         zip(dataset.splits["validation"].paths, dataset.splits["validation"].labels, strict=True)))
        self._say_hello(facts, dataset)

    def _say_hello(self, facts: dict[str, Any], dataset: Dataset) -> None:
        sizes, model = self.engine.batch_sizes, self.settings.model
        what = model.architecture if model.architecture != "vit" else f"vit, {model.attention} attention, {model.feed_forward} feed-forward"
        self.say(f"run       {os.path.relpath(self.record.folder) if self.engine.is_main else ''}")
        self.say(f"data      {facts['dataset']['folder']}: {len(dataset.classes)} classes, {self.training.side} x {self.training.side} pixels, "
                 + ", ".join(f"{count:,} {name}" for name, count in facts["dataset"]["num_images"].items())
                 + f"; {self.training.source} source")
        self.say(f"model     {what}: {self.engine.num_parameters:,} parameters")
        self.say(f"batch     {sizes.total} = {sizes.micro} x {sizes.accumulation} accumulated x {sizes.shards} processes; "
                 f"{self.steps_per_epoch} steps an epoch, {self.total_steps:,} in all")
        self.say(f"engine    {self.settings.strategy} on {facts['device']}, {self.engine.describe()}")
        if self.engine.step:
            self.say(f"resuming  after step {self.engine.step:,} of {self.total_steps:,}")

    # --- the epochs -----------------------------------------------------------------------------------------------

    def run(self, stop_at: int | None = None) -> bool:
        """Train to the end. Returns False when told to stop before it; everything is saved then. Collective."""
        while self.engine.step < self.total_steps:
            stopping = self._train_epoch(stop_at)
            if self.progress.step_in_epoch == self.steps_per_epoch or self.engine.step == self.total_steps:
                self._finish_epoch()
            else:
                self._save_checkpoint()
            # Asked again: the wish may have come during the evaluation.
            if (stopping or self.engine.any(self.stop.requested)) and self.engine.step < self.total_steps:
                self.say(f"stopped after step {self.engine.step:,} and saved; start the same run again to go on")
                return False
        if self.engine.is_main and self.record.metrics():
            draw_curves(self.record.metrics(), self.record.folder / "curves.png", self.record.folder.name)
        return True

    def _train_epoch(self, stop_at: int | None) -> bool:
        """The rest of this epoch, or the part of it until the run is to stop. Returns whether it is to stop."""
        engine, progress, stopping = self.engine, self.progress, False
        accumulation = engine.batch_sizes.accumulation
        last = min(self.steps_per_epoch, progress.step_in_epoch + self.total_steps - engine.step)
        batches = self.training.epoch(progress.epoch, progress.step_in_epoch * accumulation, last * accumulation)
        losses: list[Tensor] = []  # on the device, not yet looked at
        with self._progress_bar(progress, last) as bar:
            began = flushed = time.perf_counter()
            self.training.wait_seconds = 0.0
            while progress.step_in_epoch < last and not stopping:
                losses.append(engine.train_batch(batches))
                progress.step_in_epoch += 1
                progress.timed_images += engine.batch_sizes.total
                now = time.perf_counter()
                stopping = engine.any(self.stop.requested) or engine.step == stop_at
                if now - flushed > FLUSH_SECONDS or stopping or progress.step_in_epoch == last:
                    self._look_at(losses)
                    flushed = time.perf_counter()
                    bar.set_postfix_str(f"loss {progress.loss_sum / progress.step_in_epoch:.3f}", refresh=False)
                bar.update(engine.batch_sizes.total)
            progress.training_seconds += time.perf_counter() - began
            progress.data_wait_seconds += self.training.wait_seconds
        return stopping

    def _look_at(self, losses: list[Tensor]) -> None:
        """Add the losses that wait on the device to the epoch's sum, and refuse one that is not finite."""
        first = self.engine.step - len(losses) + 1
        for i, loss in enumerate(torch.stack(losses).tolist()):
            if not math.isfinite(loss):
                raise NonFiniteLoss(f"the loss is {loss} at optimiser step {first + i}; the last checkpoint is untouched. "
                                    "A lower optimizer.params.lr or a longer schedule.warmup_fraction usually cures it")
            self.progress.loss_sum += loss
        losses.clear()

    def _finish_epoch(self) -> None:
        """Evaluate, write the epoch's line, save."""
        engine, progress = self.engine, self.progress
        done = engine.step == self.total_steps
        split = "validation" if "validation" in self.evaluation else "test"
        results = {split: self._evaluate(split)}
        if done and split != "test":
            results["test"] = self._evaluate("test")
        line: dict[str, Any] = {
            "epoch": progress.epoch + 1,
            "step": engine.step,
            "learning_rate": self.settings.engine["optimizer"]["params"]["lr"] * engine.schedule(engine.step - 1),
            "train_loss": engine.mean(torch.tensor(progress.loss_sum / progress.step_in_epoch, dtype=torch.float64)),
            "images_per_second": round(progress.timed_images / progress.training_seconds, 1),
            "training_seconds": round(progress.training_seconds, 3),
            "data_wait_seconds": round(progress.data_wait_seconds, 3),
            "memory_gib": round(self._memory_gib(), 3),
        }
        for name, (counts, seconds) in results.items():
            line |= {f"{name}_loss": counts.loss, f"{name}_accuracy": counts.accuracy, f"{name}_top5_accuracy": counts.top5_accuracy,
                     f"{name}_correct": counts.correct, f"{name}_seen": counts.seen, f"{name}_seconds": round(seconds, 3)}
        line |= engine.epoch_facts()
        self._say_epoch(line, results)
        is_best = "validation" in results and results["validation"][0].accuracy > progress.best_accuracy
        if is_best:
            progress.best_accuracy = results["validation"][0].accuracy
        self._save_weights("weights.safetensors", *(["best.safetensors"] if is_best else []))
        if engine.is_main:
            self.record.append_metrics(line)
            if time.perf_counter() - self._curves_drawn > CURVES_SECONDS:
                draw_curves(self.record.metrics(), self.record.folder / "curves.png", self.record.folder.name)
                self._curves_drawn = time.perf_counter()
        self.progress = Progress(epoch=progress.epoch + 1, num_metrics=progress.num_metrics + 1, best_accuracy=progress.best_accuracy)
        self._save_checkpoint()

    def _evaluate(self, split: str) -> tuple[Counts, float]:
        began = time.perf_counter()
        return self.engine.count(self.evaluation[split].epoch()), time.perf_counter() - began

    # --- files ----------------------------------------------------------------------------------------------------

    def _save_checkpoint(self) -> None:
        """Collective; the main process writes, the others wait for its disk longer than they wait for one another's steps."""
        limit_waits(SAVE_SECONDS)
        loss_sum = self.engine.mean(torch.tensor(self.progress.loss_sum, dtype=torch.float64))
        if self.engine.is_main:
            self.progress.loss_sum = loss_sum
            with self.record.new_checkpoint(self.engine.step) as folder:
                self.engine.save(folder)
                RunRecord.write_progress(folder, self.progress)
        else:
            self.engine.save(Path())
        self.engine.any(False)  # nobody goes on, to shorter limits, before the checkpoint is whole
        limit_waits()

    def _save_weights(self, *names: str) -> None:
        """Write the plain weights under each of the names. Collective."""
        from safetensors.torch import save

        weights = self.engine.weights()
        if weights is not None:
            for name in names:
                write_atomically(self.record.folder / name, save(weights))

    # --- the screen -----------------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """A line on the screen, from the main process only."""
        if self.engine.is_main:
            print(text, flush=True)

    def _progress_bar(self, progress: Progress, last: int) -> tqdm:
        quiet = not (self.engine.is_main and sys.stderr.isatty())
        total = self.engine.batch_sizes.total
        return tqdm(total=last * total, initial=progress.step_in_epoch * total, desc=f"epoch {progress.epoch + 1}", unit=" images",
                    unit_scale=True, leave=False, disable=quiet, dynamic_ncols=True)

    def _say_epoch(self, line: dict[str, Any], results: dict[str, tuple[Counts, float]]) -> None:
        accuracy = "  ".join(f"{name} accuracy {100 * counts.accuracy:.2f}% ({counts.correct}/{counts.seen})"
                             for name, (counts, _) in results.items())
        epochs = -(-self.total_steps // self.steps_per_epoch)
        self.say(f"epoch {line['epoch']:>{len(str(epochs))}}/{epochs}  train loss {line['train_loss']:.3f}  {accuracy}  "
                 f"{line['images_per_second']:,.0f} images/s  {line['training_seconds']:.1f} s  "
                 f"data wait {100 * line['data_wait_seconds'] / line['training_seconds']:.1f}%")

    def _memory_gib(self) -> float:
        """The most memory this process has held: on the GPU where it has one, else in RAM."""
        if self.engine.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.engine.device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
