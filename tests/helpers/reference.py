"""What the tests of the engines share: a tiny network, its batches, a plain training loop to compare with, and jobs of
several processes that train a list of cases one after the other.

A process group is started once for a list of cases, in forked processes; what they measured comes back in files.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import programs
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from common.errors import SettingsError
from config.settings import Settings, resolve
from model import build_model
from optim.lr_schedule import Schedule
from optim.optimizers import averaged_weights, build_optimizer

NUM_CLASSES, SIDE, BATCH, STEPS, SEED = 10, 16, 8, 10, 3
SAVED_AT = 4
COUNTED = 26  # images of an evaluation: the last batch is padded, whatever the number of processes
RECIPES = {  # an update of norm 0.05 is far below what these losses give: clipping is at work in every step
    "plain": ["gradient_clipping=0.0"],
    "clipped": ["gradient_clipping=0.05"],
    "accumulated, clipped": ["gradient_accumulation_steps=2", "gradient_clipping=0.05", "loss.label_smoothing=0.1"],
}
# A case: strategy, settings, and of the options below those that are not the default.
Case = tuple[str, list[str], dict[str, Any]]


def settings_for(*overrides: str) -> Settings:
    settings = resolve(
        "spt-lsa",
        [
            f"train_batch_size={BATCH}",
            "optimizer.params.lr=0.001",
            "model.width=24",
            "model.depth=2",
            "model.heads=2",
            "model.head_size=8",
            "model.feed_forward_options.hidden=20",
            "model.dropout=0.0",
            *overrides,
        ],
    )
    params = settings.engine["optimizer"]["params"]
    # Adam divides each gradient by its own size. One that is zero but for rounding would become a whole step in a
    # direction that
    # depends on the machine: with 1e-8 equal runs come apart by 1e-5 on some CPUs.
    if "eps" in params:
        params["eps"] = 1e-4
    return settings


def network(settings: Settings) -> nn.Module:
    return build_model(settings.model, NUM_CLASSES, SIDE)


def data(soft: bool = False) -> tuple[Tensor, Tensor]:
    """Global batches, one per step: images (steps, B, 3, S, S), labels (steps, B), or soft ones (steps, B, K)."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(STEPS, BATCH, 3, SIDE, SIDE, generator=generator)
    labels = torch.randint(0, NUM_CLASSES, (STEPS, BATCH), generator=generator)
    if not soft:
        return images, labels
    share = torch.rand(STEPS, BATCH, 1, generator=generator)
    hard = F.one_hot(labels, NUM_CLASSES).float()
    return images, share * hard + (1 - share) * hard.flip(1)


def counted() -> tuple[Tensor, Tensor]:
    """Return the images (COUNTED, 3, S, S) and labels (COUNTED,) that `counts_of` evaluates."""
    images, labels = (part.flatten(0, 1)[:COUNTED] for part in data())
    return images, labels


def batches(engine, soft: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the micro-batches of this process, from the engine's optimizer step on."""
    (images, labels), (which, of), sizes = data(soft), engine.data_shard, engine.batch_sizes
    for step in range(engine.step, STEPS):
        for part in range(sizes.accumulation):
            begin = (part * of + which) * sizes.micro
            yield images[step, begin : begin + sizes.micro], labels[step, begin : begin + sizes.micro]


def plain_loop(settings: Settings, soft: bool = False, build: Callable[[], nn.Module] | None = None) -> dict:
    """Return losses, weights and EMA of a loop without an engine: the whole batch at once, in one process."""
    smaller = round(settings.resizing.initial_scale * SIDE)
    torch.manual_seed(SEED)
    model, schedule = build() if build else network(settings), Schedule(settings.schedule, 20)
    optimizer = build_optimizer(settings.engine["optimizer"], model, fused=False)
    average, losses = {name: value.clone() for name, value in model.state_dict().items()}, []
    for step, (images, labels) in enumerate(zip(*data(soft), strict=True)):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * schedule(step)
        if step < settings.resizing.fraction * 20:
            images = F.interpolate(images, (smaller, smaller), mode="bilinear", antialias=True)
        loss = F.cross_entropy(model(images), labels, label_smoothing=settings.loss.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        if settings.engine["gradient_clipping"]:
            nn.utils.clip_grad_norm_(model.parameters(), settings.engine["gradient_clipping"])
        optimizer.step()
        losses.append(loss.item())
        decay = min(settings.ema.decay, (1 + step) / (10 + step))
        average = {name: decay * average[name] + (1 - decay) * value for name, value in model.state_dict().items()}
    own = averaged_weights(optimizer, list(model.parameters()))
    if own:
        average = {**model.state_dict(), **dict(zip(dict(model.named_parameters()), own, strict=True))}
    return {"losses": losses, "weights": model.state_dict(), "averaged": average}


class Noted(nn.Module):
    """A convolution with BatchNorm, and a table that is not trained."""

    def __init__(self):
        super().__init__()
        self.convolve, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.register_buffer("table", torch.rand(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.convolve(x)))


def with_batch_norm() -> nn.Module:
    """A network whose state has buffers."""
    return nn.Sequential(Noted(), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, NUM_CLASSES)))


def with_frozen() -> nn.Module:
    """A network whose first layer is not trained. ZeRO 3 shards only parameters of more than 100,000 values."""
    frozen, trained = nn.Linear(3 * SIDE**2, 160), nn.Linear(160, 640)
    frozen.requires_grad_(False)
    return nn.Sequential(nn.Flatten(), frozen, nn.ReLU(), trained, nn.ReLU(), nn.Linear(640, NUM_CLASSES))


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[key].double() - b[key].double()).abs().max().item() for key in a)


# --- what runs inside the forked processes ------------------------------------------------------------------------


def make_engine(strategy: str, settings: Settings, build=None):
    from parallel.strategies import engine_class

    torch.set_num_threads(1)
    return engine_class(strategy)(build or (lambda: network(settings)), settings, Schedule(settings.schedule, 20), SEED)


def train(engine, until: int = STEPS, soft: bool = False) -> list[float]:
    stream = batches(engine, soft)
    return [engine.mean(engine.train_batch(stream)) for _ in range(engine.step, until)]


def save(engine, folder: Path) -> None:
    """Write what `Engine.load` reads into an existing folder, as checkpoints hold it. Collective."""
    state = engine.gather_state()
    if state is not None:
        save_file(state, folder / "state.safetensors")
        (folder / "engine.json").write_text(json.dumps(engine.state_facts()))


def train_and_save(
    strategy: str,
    overrides: list[str],
    folder: Path,
    soft: bool = False,
    look: bool = False,
    build: Callable[[], nn.Module] | None = None,
) -> dict:
    """Make all steps and save the state midway; `look`: also evaluate midway, which must not change training."""
    engine = make_engine(strategy, settings_for(*overrides), build)
    losses = train(engine, SAVED_AT, soft)
    folder.mkdir(parents=True, exist_ok=True)
    save(engine, folder)
    if look:
        counts_of(engine)
    losses += train(engine, soft=soft)
    return {
        "losses": losses,
        "counts": counts_of(engine),
        "weights": engine.weights(),
        "raw": engine.weights(raw=True),
        "raw counts": counts_of(engine, raw=True),
        "said": engine.describe(),
        "facts": engine.epoch_facts(),
    }


def go_on(strategy: str, overrides: list[str], folder: Path, soft: bool = False) -> dict:
    """Make the remaining steps, from a saved state on."""
    engine = make_engine(strategy, settings_for(*overrides))
    engine.load(Path(folder))
    state, step = engine.gather_state(), engine.step
    return {
        "step": step,
        "state": state,
        "losses": train(engine, soft=soft),
        "weights": engine.weights(),
        "raw": engine.weights(raw=True),
    }


def counts_of(engine, raw: bool = False) -> tuple[int, int, int, float]:
    """Return EvalCounts over COUNTED images, divided over the shards, with a padded last batch of another size."""
    (images, labels), (which, of) = counted(), engine.data_shard
    size = 7 if of == 1 else 3
    rounds = -(-len(images) // (size * of))
    padded = torch.full((rounds * of * size,), -1)
    padded[: len(labels)] = labels
    mine = [slice((i * of + which) * size, (i * of + which + 1) * size) for i in range(rounds)]
    # rows beyond the end repeat the first image: if they counted, the sums would show it
    source = torch.cat([images, images[:1].expand(len(padded) - len(images), -1, -1, -1)])
    counts = engine.evaluate(((source[part], padded[part]) for part in mine), raw=raw)
    return counts.correct, counts.correct_top5, counts.seen, counts.loss_sum


@contextmanager
def pretended_gpus() -> Iterator[None]:
    """Replace the GPU count for strategy dp, which rejects fewer than two GPUs."""
    with (
        mock.patch("torch.cuda.device_count", return_value=2),
        mock.patch("torch.cuda.is_available", return_value=False),
        mock.patch.dict(os.environ),
    ):
        os.environ.pop("DS_ACCELERATOR", None)
        yield


def refusal(strategy: str, *overrides: str, build=None) -> str:
    """Return the message with which a strategy rejects settings."""
    try:
        make_engine(strategy, settings_for(*overrides), build)
    except SettingsError as error:
        return str(error)
    return "accepted"


def job(out: str, trains: dict[str, list], resumes: dict[str, list], others: list[str]) -> None:
    """Every case in turn; `<out>/results` holds what they gave.

    Args:
        trains: by name: strategy, settings, keywords of train_and_save.
        resumes: by name: strategy, settings, folder of the state, keywords of go_on.
        others: `module:function`, functions of test modules that return results.
    """
    import torch.distributed as dist

    results = {
        name: train_and_save(strategy, overrides, Path(out, name), **more)
        for name, (strategy, overrides, more) in trains.items()
    }
    if dist.is_initialized():
        dist.barrier()  # the main process has written all states
    results |= {
        name: go_on(strategy, overrides, Path(folder), **more)
        for name, (strategy, overrides, folder, more) in resumes.items()
    }
    for other in others:
        module, _, function = other.partition(":")
        results |= getattr(importlib.import_module(module), function)()
    if os.environ["RANK"] == "0":
        torch.save(results, Path(out, "results"))
    dist.barrier()
    dist.destroy_process_group()


# --- and outside ------------------------------------------------------------------------------------------------------


def perform(out: Path, processes: int, function, *arguments) -> dict:
    out.mkdir()
    programs.run_ranks(processes, function, str(out), *arguments)
    return torch.load(out / "results", weights_only=False)


def assert_counts(
    counts: tuple[int, int, int, float], weights: dict[str, Tensor], model: nn.Module | None = None
) -> None:
    """`counts_of` is what a network with these weights gets right, in one process without padding."""
    model = model or network(settings_for())
    model.load_state_dict(weights)
    images, labels = counted()
    with torch.no_grad():
        scores = model.eval()(images)
    best = scores.topk(5).indices == labels[:, None]
    assert counts[:3] == (int(best[:, 0].sum()), int(best.any(dim=1).sum()), COUNTED)
    loss_sum = F.cross_entropy(scores, labels, reduction="sum").item()
    assert abs(counts[3] - loss_sum) < 1e-5 * loss_sum
