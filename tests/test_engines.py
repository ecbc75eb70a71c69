"""parallel/: every data-parallel strategy and the pipeline train as one plain PyTorch loop does, and go on from one another's states.

A process group is started once for a list of cases, in forked processes; what they measured comes back in files.
ZeRO's stages have tests of their own in test_zero.py.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import programs
import pytest
import torch
import torch.nn.functional as F
from conftest import TEST_PER_CLASS
from torch import Tensor, nn

from model import build_model
from optimizers import build_optimizer
from parallel import STRATEGIES
from run_record import RunRecord
from schedule import Schedule
from settings import Settings, SettingsError, resolve

NUM_CLASSES, SIDE, BATCH, STEPS, SEED = 10, 16, 8, 10, 3
SAVED_AT = 4
RECIPES = {  # an update of norm 0.05 is far below what these losses give: clipping is at work in every step
    "plain": ["gradient_clipping=0.0"],
    "clipped": ["gradient_clipping=0.05"],
    "accumulated, clipped": ["gradient_accumulation_steps=2", "gradient_clipping=0.05", "loss.label_smoothing=0.1"],
}
ENGINES = {  # name of a case: strategy and settings
    "ddp": ("ddp", []),
    "fsdp": ("fsdp", []),
    "zero 1": ("zero", []),
    "pipeline": ("pipeline", ["parallel.stages=2"]),
}


def settings_for(*overrides: str) -> Settings:
    return resolve("spt-lsa", [f"train_batch_size={BATCH}", "optimizer.params.lr=0.001", "model.width=24", "model.depth=2",
                               "model.heads=2", "model.head_size=8", "model.feed_forward_options.hidden=20", "model.dropout=0.0",
                               *overrides])


def network(settings: Settings) -> nn.Module:
    return build_model(settings.model, NUM_CLASSES, SIDE)


def data() -> tuple[Tensor, Tensor]:
    """One global batch a step: images (steps, B, 3, S, S), labels (steps, B)."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(STEPS, BATCH, 3, SIDE, SIDE, generator=generator)
    return images, torch.randint(0, NUM_CLASSES, (STEPS, BATCH), generator=generator)


def batches(engine) -> Iterator[tuple[Tensor, Tensor]]:
    """The micro-batches of this process, from the engine's optimiser step on."""
    (images, labels), (which, of), sizes = data(), engine.data_shard, engine.batch_sizes
    for step in range(engine.step, STEPS):
        for part in range(sizes.accumulation):
            begin = (part * of + which) * sizes.micro
            yield images[step, begin : begin + sizes.micro], labels[step, begin : begin + sizes.micro]


def plain_loop(settings: Settings) -> dict:
    """Losses and weights of a loop that knows of no engine: the whole batch at once, in one process."""
    torch.manual_seed(SEED)
    model, schedule = network(settings), Schedule(settings.schedule, 20)
    optimizer = build_optimizer(settings.engine["optimizer"], model, fused=False)
    losses = []
    for step, (images, labels) in enumerate(zip(*data(), strict=True)):
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * schedule(step)
        loss = F.cross_entropy(model(images), labels, label_smoothing=settings.loss.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        if settings.engine["gradient_clipping"]:
            nn.utils.clip_grad_norm_(model.parameters(), settings.engine["gradient_clipping"])
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "weights": model.state_dict()}


# --- what runs inside the forked processes ------------------------------------------------------------------------


def make_engine(strategy: str, settings: Settings, build=None):
    from parallel import engine_class

    torch.set_num_threads(1)
    return engine_class(strategy)(build or (lambda: network(settings)), settings, Schedule(settings.schedule, 20), SEED)


def train(engine, until: int = STEPS) -> list[float]:
    stream = batches(engine)
    return [engine.mean(engine.train_batch(stream)) for _ in range(engine.step, until)]


def train_and_save(strategy: str, overrides: list[str], folder: Path) -> dict:
    """All steps, with the state saved on the way into `folder`."""
    engine = make_engine(strategy, settings_for(*overrides))
    losses = train(engine, SAVED_AT)
    folder.mkdir(parents=True, exist_ok=True)
    engine.save(folder)
    losses += train(engine)
    return {"losses": losses, "counts": counts_of(engine), "weights": engine.weights(), "said": engine.describe(),
            "facts": engine.epoch_facts()}


def go_on(strategy: str, overrides: list[str], folder: Path) -> dict:
    """The rest of the steps, from a saved state on."""
    engine = make_engine(strategy, settings_for(*overrides))
    engine.load(folder)
    return {"step": engine.step, "losses": train(engine), "weights": engine.weights()}


def counts_of(engine) -> tuple[int, int, int, float]:
    """Counts over all images, dealt out to the shards, with a last batch that is filled up and not of the training's size."""
    (images, labels), (which, of) = data(), engine.data_shard
    images, labels = images.flatten(0, 1), labels.flatten(0, 1)
    size = 7 if of == 1 else 3
    rounds = -(-len(images) // (size * of))
    padded = torch.full((rounds * of * size,), -1)
    padded[: len(labels)] = labels
    mine = [slice((i * of + which) * size, (i * of + which + 1) * size) for i in range(rounds)]
    # rows beyond the end repeat the first image: if they counted, the sums would show it
    source = torch.cat([images, images[:1].expand(len(padded) - len(images), -1, -1, -1)])
    counts = engine.count((source[part], padded[part]) for part in mine)
    return counts.correct, counts.correct_top5, counts.seen, counts.loss_sum


def job(out: str, trains: dict[str, list], resumes: dict[str, list], others: list[str]) -> None:
    """Every case in turn; `<out>/results` holds what they gave. `others` are functions of this module that return results."""
    import torch.distributed as dist

    results = {name: train_and_save(strategy, overrides, Path(out, name)) for name, (strategy, overrides) in trains.items()}
    if dist.is_initialized():
        dist.barrier()  # the main process has written all states
    results |= {name: go_on(strategy, overrides, Path(folder)) for name, (strategy, overrides, folder) in resumes.items()}
    for other in others:
        results |= globals()[other]()
    if os.environ["RANK"] == "0":
        torch.save(results, Path(out, "results"))
    dist.barrier()
    dist.destroy_process_group()


class Noted(nn.Module):
    """A layer with BatchNorm, and one that is not trained."""

    def __init__(self):
        super().__init__()
        self.convolve, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.register_buffer("table", torch.rand(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.convolve(x)))


def with_batch_norm() -> nn.Module:
    return nn.Sequential(Noted(), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, NUM_CLASSES)))


def batch_norm_cases() -> dict[str, dict]:
    """BatchNorm's statistics after one step and after all, and what each process evaluates with."""
    results = {}
    for name in ("ddp", "zero 1", "fsdp", "pipeline 1 x 2"):
        strategy, _, stages = name.partition(" ")
        settings = settings_for("gradient_clipping=0.0", *(["parallel.stages=1"] if strategy == "pipeline" else []))
        engine = make_engine(strategy, settings, with_batch_norm)
        stream = batches(engine)
        engine.train_batch(stream)
        first = engine.weights()
        for _ in range(SAVED_AT - 1):
            engine.train_batch(stream)
        scores = engine.forward(data()[0][0])
        equal = engine.mean(scores.double().sum()) == scores.double().sum().item()  # the mean of equal numbers
        results[f"batch norm {name}"] = {"first": first, "weights": engine.weights(), "counts": counts_of(engine), "equal": equal}
    return results


def bf16_cases() -> dict[str, dict]:
    import torch.distributed as dist

    def settings(more: list[str]) -> list[str]:
        return ["gradient_clipping=0.0", "bf16.enabled=true", *more]

    with TemporaryDirectory() as folder:
        folder = Path(processes_main(folder))
        results = {f"bf16 {name}": train_and_save(strategy, settings(more), folder / name) for name, (strategy, more) in ENGINES.items()}
        dist.barrier()
        results |= {f"bf16 {name}, resumed": go_on(strategy, settings(more), folder / name) for name, (strategy, more) in ENGINES.items()}
        dist.barrier()
    return results


def processes_main(value: str) -> str:
    """The main process's value in all of them."""
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@contextmanager
def pretended_gpus() -> Iterator[None]:
    with mock.patch("torch.cuda.device_count", return_value=2), mock.patch("torch.cuda.is_available", return_value=False), \
         mock.patch.dict(os.environ):
        del os.environ["DS_ACCELERATOR"]
        yield


def dp_case() -> dict[str, dict]:
    """DataParallel without GPUs is the plain module: what is left to see is that the engine around it trains."""
    with pretended_gpus():
        engine = make_engine("dp", settings_for(*RECIPES["accumulated, clipped"]))
    return {"dp": {"losses": train(engine), "weights": engine.weights(), "said": engine.describe()}}


def cut_cases() -> dict[str, dict]:
    """Other ways to cut the pipeline, and a network whose stages differ in their parameter groups."""
    results = {}
    for cut in ("uniform", "time"):
        engine = make_engine("pipeline", settings_for("gradient_clipping=0.05", f"parallel.partition={cut}", f"image_side={SIDE}"))
        results[f"cut {cut}"] = {"losses": train(engine), "cuts": engine.cuts, "layers": len(network(settings_for()))}
    engine = make_engine("pipeline", settings_for("gradient_clipping=0.05"), uneven)
    results["uneven"] = {"losses": train(engine), "weights": engine.weights()}
    return results


def uneven() -> nn.Module:
    """A first stage of matrices alone, a second of matrices and vectors: one parameter group and two."""
    return nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 32, bias=False), nn.Linear(32, 16, bias=False)),
                         nn.Sequential(nn.ReLU(), nn.Linear(16, NUM_CLASSES)))


def refusals() -> dict[str, str]:
    """The sentences with which engines refuse what would not train as asked."""
    def sentence(strategy: str, *overrides: str, build=None) -> str:
        try:
            make_engine(strategy, settings_for(*overrides), build)
        except SettingsError as error:
            return str(error)
        return "accepted"

    scalar = nn.Linear(2, 2)
    scalar.temperature = nn.Parameter(torch.tensor(1.0))
    cases = {f"{strategy}: {' '.join(overrides)}": sentence(strategy, *overrides) for strategy, overrides in REFUSED}
    with pretended_gpus():
        cases["dp: by a launcher"] = sentence("dp")
    return cases | {"fsdp: a scalar": sentence("fsdp", build=lambda: nn.Sequential(scalar))}


REFUSED = {  # strategy and settings: what the sentence says
    ("ddp", ("zero_optimization.stage=2",)): "strategy ddp would not use zero_optimization.stage=2",
    ("fsdp", ("zero_optimization.stage=0",)): "strategy fsdp would not use zero_optimization.stage=0",
    ("gossip", ("zero_optimization.offload_optimizer.device=cpu",)): "strategy gossip would not use zero_optimization.offload_optimizer.device=cpu",
    ("ddp", ("parallel.topology=complete",)): "strategy ddp would not use parallel.topology=complete",
    ("zero", ("parallel.stages=4",)): "strategy zero would not use parallel.stages=4",
    ("gossip", ("parallel.local_steps=4",)): "strategy gossip would not use parallel.local_steps=4",
    ("local", ("parallel.moment_steps=4",)): "strategy local would not use parallel.moment_steps=4",
    ("gossip", ("parallel.topology=rings",)): "unknown parallel.topology 'rings'; did you mean 'ring'",
    ("gossip", ("parallel.topology=alternating_exponential_ring",)): "needs 2, 4, 8, ... machines .* not 2 processes with 2 on this machine",
    ("gossip", ("parallel.moment_steps=2", "optimizer.type=SGD")): "parallel.moment_steps=2 is about Adam's moments",
    ("gossip", ("parallel.moment_steps=0",)): "parallel.moment_steps=0 does not go .* a window of 0 steps",
    ("local", ("parallel.local_steps=0",)): "parallel.local_steps must be at least 1, not 0",
    ("local", ("parallel.outer_momentum=1.0",)): "parallel.outer_momentum in 0..1, not 0.7 and 1.0",
    ("pipeline", ("zero_optimization.stage=2",)): "pipeline works with zero_optimization.stage 0 or 1, not 2",
    ("pipeline", ("zero_optimization.stage=0",)): "clips wrongly at zero_optimization.stage=0; take stage 1, or gradient_clipping=0.0",
    ("pipeline", ("zero_optimization.offload_optimizer.device=cpu",)): "pipeline would not use zero_optimization.offload_optimizer",
    ("pipeline", ("parallel.stages=3",)): "parallel.stages=3 does not divide the number of processes, 2",
    ("pipeline", ("parallel.partition=size",)): "unknown parallel.partition 'size'",
    ("pipeline", ("parallel.partition=time",)): "give the image side with --set image_side=32",
    ("dp", ()): "strategy dp shares a batch among the GPUs of one machine, and there are 0 here",
    ("ddp", ("train_batch_size=7",)): "train_batch_size=7 cannot be cut into 2 data-parallel processes",
    ("ddp", ("optimizer.type=AdamWW",)): "unknown optimizer.type 'AdamWW'",
}


# --- the jobs, each once ------------------------------------------------------------------------------------------


def perform(out: Path, processes: int, function, *arguments) -> dict:
    out.mkdir()
    programs.run_ranks(processes, function, str(out), *arguments)
    return torch.load(out / "results", weights_only=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def on_one(folder) -> dict:
    """One process: a pipeline of one stage is still a pipeline."""
    cases = {f"{engine} {recipe}": [strategy, RECIPES[recipe] + (["parallel.stages=1"] if strategy == "pipeline" else [])]
             for engine, (strategy, _) in ENGINES.items() for recipe in ("clipped", "accumulated, clipped")}
    return perform(folder / "on-1", 1, job, cases, {}, ["dp_case"])


# From (processes, engine) to (processes, engine)
MOVES = [(2, "ddp", 2, "ddp"), (2, "fsdp", 2, "fsdp"), (2, "pipeline", 2, "pipeline"),
         (2, "zero 1", 2, "ddp"), (2, "ddp", 2, "fsdp"), (2, "fsdp", 2, "zero 1"), (2, "pipeline", 2, "fsdp"), (2, "zero 1", 2, "pipeline"),
         (1, "ddp", 2, "fsdp"), (1, "fsdp", 2, "pipeline"), (1, "pipeline", 2, "ddp"),
         (2, "fsdp", 1, "ddp"), (2, "ddp", 1, "zero 1"), (2, "zero 1", 1, "fsdp"), (2, "pipeline", 1, "ddp"), (2, "ddp", 1, "pipeline")]


def moves_to(processes: int, folder: Path) -> dict[str, list]:
    def overrides(engine: str) -> list[str]:
        stages = ["parallel.stages=1"] if processes == 1 and engine == "pipeline" else ENGINES[engine][1]
        return RECIPES["clipped"] + stages

    return {f"{move}": [ENGINES[move[3]][0], overrides(move[3]), str(folder / f"on-{move[0]}" / f"{move[1]} clipped")]
            for move in MOVES if move[2] == processes}


@pytest.fixture(scope="module")
def on_two(folder, on_one) -> dict:
    cases = {f"{engine} {recipe}": [strategy, overrides + more]
             for engine, (strategy, more) in ENGINES.items() for recipe, overrides in RECIPES.items()}
    cases["pipeline stage 0 plain"] = ["pipeline", [*RECIPES["plain"], "zero_optimization.stage=0"]]
    cases["pipeline 1 x 2 accumulated, clipped"] = ["pipeline", [*RECIPES["accumulated, clipped"], "parallel.stages=1"]]
    return perform(folder / "on-2", 2, job, cases, moves_to(2, folder), ["batch_norm_cases", "bf16_cases", "cut_cases", "refusals"])


@pytest.fixture(scope="module")
def back_on_one(folder, on_two) -> dict:
    return perform(folder / "back-on-1", 1, job, {}, moves_to(1, folder), [])


@pytest.fixture(scope="module")
def reference() -> dict[str, dict]:
    return {recipe: plain_loop(settings_for(*overrides)) for recipe, overrides in RECIPES.items()}


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[key].double() - b[key].double()).abs().max().item() for key in a)


# --- the properties -----------------------------------------------------------------------------------------------

TWO = [*(f"{engine} {recipe}" for engine in ENGINES for recipe in RECIPES),
       "pipeline stage 0 plain", "pipeline 1 x 2 accumulated, clipped"]
ONE = [f"{engine} {recipe}" for engine in ENGINES for recipe in ("clipped", "accumulated, clipped")]


def assert_trains_as(result: dict, plain: dict) -> None:
    assert result["losses"] == pytest.approx(plain["losses"], abs=1e-6)
    assert largest_difference(result["weights"], plain["weights"]) < 1e-6
    assert all(value.dtype == torch.float32 and value.device.type == "cpu" for value in result["weights"].values())


def recipe_of(case: str) -> str:
    return next(recipe for recipe in sorted(RECIPES, key=len, reverse=True) if case.endswith(recipe))


@pytest.mark.parametrize("case", TWO)
def test_two_processes_train_as_a_plain_loop_does(on_two, reference, case):
    assert_trains_as(on_two[case], reference[recipe_of(case)])


@pytest.mark.parametrize("case", ONE)
def test_one_process_trains_as_a_plain_loop_does(on_one, reference, case):
    assert_trains_as(on_one[case], reference[recipe_of(case)])


def test_the_recipes_differ_by_more_than_what_is_tolerated(reference):
    """Otherwise an engine that ignores clipping or smoothing would pass."""
    plain, clipped, accumulated = reference.values()
    assert largest_difference(plain["weights"], clipped["weights"]) > 1e-3
    assert largest_difference(clipped["weights"], accumulated["weights"]) > 1e-3


@pytest.mark.parametrize("case", [case for case in TWO if recipe_of(case) == "clipped"] + ["pipeline 1 x 2 accumulated, clipped"])
def test_counts_are_exact_sums_that_leave_padding_out(on_two, case):
    result, model = on_two[case], network(settings_for())
    model.load_state_dict(result["weights"])
    images, labels = (part.flatten(0, 1) for part in data())
    with torch.no_grad():
        scores = model.eval()(images)
    best = scores.topk(5).indices == labels[:, None]
    correct, correct_top5, seen, loss_sum = result["counts"]
    assert (correct, correct_top5, seen) == (int(best[:, 0].sum()), int(best.any(dim=1).sum()), STEPS * BATCH)
    assert loss_sum == pytest.approx(F.cross_entropy(scores, labels, reduction="sum").item(), rel=1e-5)


@pytest.mark.parametrize("move", MOVES, ids=lambda m: f"{m[1]} on {m[0]} to {m[3]} on {m[2]}")
def test_a_state_goes_on_under_another_strategy_with_another_number_of_processes(on_two, back_on_one, reference, move):
    result, plain = (on_two if move[2] == 2 else back_on_one)[f"{move}"], reference["clipped"]
    assert result["step"] == SAVED_AT
    assert result["losses"] == pytest.approx(plain["losses"][SAVED_AT:], abs=1e-6)
    assert largest_difference(result["weights"], plain["weights"]) < 1e-6
    if move[:2] == move[2:]:
        unbroken = on_two[f"{move[1]} clipped"]
        assert result["losses"] == unbroken["losses"][SAVED_AT:]
        assert largest_difference(result["weights"], unbroken["weights"]) == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_bf16_is_close_to_fp32_and_keeps_fp32_weights(on_two, reference, engine):
    result = on_two[f"bf16 {engine}"]
    assert result["losses"] == pytest.approx(reference["plain"]["losses"], abs=0.05)
    assert result["losses"] != pytest.approx(reference["plain"]["losses"], abs=1e-6) and "bf16" in result["said"]
    assert on_two[f"bf16 {engine}, resumed"]["losses"] == result["losses"][SAVED_AT:]
    classify = result["weights"]["3.classify.weight"]
    assert classify.dtype == torch.float32 and not torch.equal(classify, classify.bfloat16().float())


@pytest.mark.parametrize("engine", ["ddp", "zero 1", "fsdp", "pipeline 1 x 2"])
def test_batch_norm_has_one_running_mean_and_variance_for_all_processes(on_two, engine):
    result = on_two[f"batch norm {engine}"]
    torch.manual_seed(SEED)
    model = with_batch_norm()
    halves = []
    for images in data()[0][0].chunk(2):
        x = model[0].convolve(images).transpose(0, 1).flatten(1)
        halves.append((0.1 * x.mean(1), 0.9 + 0.1 * x.var(1)))
    mean, variance = (torch.stack(parts).mean(0) for parts in zip(*halves, strict=True))
    assert torch.allclose(result["first"]["0.norm.running_mean"], mean, atol=1e-6)
    assert torch.allclose(result["first"]["0.norm.running_var"], variance, atol=1e-6)
    assert result["equal"] and torch.equal(result["weights"]["0.table"], model[0].table)
    assert result["weights"]["0.norm.num_batches_tracked"] == SAVED_AT
    model.load_state_dict(result["weights"])
    images, labels = (part.flatten(0, 1) for part in data())
    with torch.no_grad():
        assert result["counts"][0] == int((model.eval()(images).argmax(1) == labels).sum())
    assert largest_difference(result["weights"], on_two["batch norm ddp"]["weights"]) < 1e-6


@pytest.mark.parametrize("cut", ["uniform", "time"])
def test_a_pipeline_trains_the_same_however_it_is_cut(on_two, reference, cut):
    result = on_two[f"cut {cut}"]
    assert result["losses"] == pytest.approx(reference["clipped"]["losses"], abs=1e-6)
    first, middle, last = result["cuts"]
    assert (first, last) == (0, result["layers"]) and 0 < middle < last and (cut == "time" or middle == last // 2)


@pytest.mark.slow
def test_four_processes_are_two_stages_times_two_replicas_or_four_workers(folder, reference):
    cases = {f"pipeline {recipe}": ["pipeline", overrides] for recipe, overrides in RECIPES.items()}
    cases |= {"gossip": ["gossip", []], "local": ["local", ["parallel.local_steps=3"]]}
    again = {f"{name}, resumed": [*case, str(folder / "on-4" / name)] for name, case in cases.items()}
    results = perform(folder / "on-4", 4, job, cases, again, [])
    for recipe in RECIPES:
        assert_trains_as(results[f"pipeline {recipe}"], reference[recipe])
    for name in cases:
        assert results[f"{name}, resumed"]["losses"] == results[name]["losses"][SAVED_AT:]
        assert results[name]["counts"][2] == STEPS * BATCH
    assert "x 2 replicas" in results["pipeline plain"]["said"] and results["gossip"]["facts"]["worker_distance"] > 1e-4


def test_stages_may_differ_in_their_parameter_groups(on_two):
    """DeepSpeed adds the norms up group by group over the stages; an unequal number would clip wrongly, or wait for ever."""
    torch.manual_seed(SEED)
    model, settings = uneven(), settings_for("gradient_clipping=0.05")
    optimizer, schedule = build_optimizer(settings.engine["optimizer"], model, fused=False), Schedule(settings.schedule, 20)
    for step, (images, labels) in enumerate(zip(*data(), strict=True)):
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * schedule(step)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
    assert largest_difference(on_two["uneven"]["weights"], model.state_dict()) < 1e-6


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: f"{case[0]}: {' '.join(case[1])}")
def test_what_would_not_train_as_asked_is_refused(on_two, case):
    said = on_two[f"{case[0]}: {' '.join(case[1])}"]
    assert re.search(REFUSED[case], said), said


def test_dp_is_one_process(on_one, on_two, reference):
    assert_trains_as(on_one["dp"], reference["accumulated, clipped"])
    assert on_one["dp"]["said"] == "2 GPUs in one process, fp32"
    assert "start it without a launcher: python train.py --strategy dp" in on_two["dp: by a launcher"]


def test_a_parameter_that_cannot_be_sharded_is_refused(on_two):
    assert "parameter 0.temperature has no dimension, which fully_shard cannot" in on_two["fsdp: a scalar"]


def test_a_key_of_ds_config_that_only_deepspeed_knows_is_refused_by_name():
    settings = settings_for()
    settings.engine["fp16"] = {"enabled": True}
    from parallel.checks import refuse_unused

    with pytest.raises(SettingsError, match="strategy ddp would not use fp16.enabled=True of ds_config.json"):
        refuse_unused("ddp", settings, frozenset(), honours_deepspeed=False)
    refuse_unused("zero", settings, frozenset(), honours_deepspeed=True)
    del settings.engine["gradient_clipping"]
    with pytest.raises(SettingsError, match="lacks gradient_clipping"):
        refuse_unused("zero", settings, frozenset(), honours_deepspeed=True)


# --- from end to end ----------------------------------------------------------------------------------------------


def train_on_two(training: list, name: str, strategy: str, *arguments: str, code: int = 0) -> None:
    words = ["train.py", *map(str, training), "--name", name, "--strategy", strategy, "--max-steps", "6", *arguments]
    if strategy == "local":
        words += ["--set", "parallel.local_steps=3"]
    meeting = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(programs.free_port())}
    ranks = [programs.start(*words, **meeting, RANK=str(i), LOCAL_RANK=str(i)) for i in range(2)]
    for done in [rank.end() for rank in ranks]:
        assert done.code == code, done.text


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name not in ("zero", "dp")])  # zero: test_train.py
def test_two_processes_train_and_evaluate_agrees(training, runs, strategy):
    train_on_two(training, strategy, strategy)
    record = RunRecord(runs / strategy)
    lines = record.metrics()
    assert [line["step"] for line in lines] == [4, 6] and lines[-1]["test_seen"] == 10 * TEST_PER_CLASS
    done = programs.run("evaluate.py", record.folder, "--json", record.folder / "report.json")
    assert f"({lines[-1]['test_correct']}/{lines[-1]['test_seen']})" in done.out
    assert json.loads((record.folder / "report.json").read_text())["loss"] == pytest.approx(lines[-1]["test_loss"], abs=1e-5)
    apart = [line.get("worker_distance") for line in lines]
    if strategy in ("gossip", "local"):
        # two workers make one pair, equal after every step; the others are apart until the sixth step ends with an outer one
        assert (apart[0] > 0) == (strategy == "local") and apart[1] == 0
    else:
        assert apart == [None, None]


@pytest.mark.parametrize("strategy", ["local", "pipeline"])
def test_two_processes_that_are_stopped_go_on_with_the_same_bits(training, runs, strategy):
    """With dropout, within an epoch and between two outer steps; after the test above, whose run was not stopped."""
    unbroken = RunRecord(runs / strategy)
    if not unbroken.exists:
        train_on_two(training, strategy, strategy)
    train_on_two(training, f"{strategy}-stopped", strategy, "--stop-at", "2", code=75)
    train_on_two(training, f"{strategy}-stopped", strategy)
    stopped = RunRecord(runs / f"{strategy}-stopped")
    assert (stopped.folder / "weights.safetensors").read_bytes() == (unbroken.folder / "weights.safetensors").read_bytes()
    assert [line["test_loss"] for line in stopped.metrics()] == [line["test_loss"] for line in unbroken.metrics()]


def test_dp_on_a_machine_without_gpus_says_so_in_one_sentence(training):
    done = programs.run("train.py", *training, "--strategy", "dp", code=1)
    assert done.err.count("\n") == 1 and "there are 0 here" in done.err
