"""parallel/zero.py: every ZeRO stage on one process and on two trains as a plain PyTorch loop does, and a state moves between them.

A process group is started once for a list of cases, in forked processes; what they measured comes back in files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import programs
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from model import build_model
from optimizers import build_optimizer
from schedule import Schedule
from settings import Settings, SettingsError, resolve

NUM_CLASSES, SIDE, BATCH, STEPS, SEED = 10, 16, 8, 5, 3
SAVED_AT = 2
STAGES = (0, 1, 2, 3)
RECIPES = {  # an update of norm 0.05 is far below what these losses give: clipping is at work in every step
    "plain": ["gradient_clipping=0.0"],
    "clipped": ["gradient_clipping=0.05"],
    "accumulated": ["gradient_accumulation_steps=2", "gradient_clipping=0.0"],
    "accumulated, clipped": ["gradient_accumulation_steps=2", "gradient_clipping=0.05", "loss.label_smoothing=0.1"],
}


def settings_for(stage: int, *overrides: str) -> Settings:
    return resolve("spt-lsa", [f"train_batch_size={BATCH}", f"zero_optimization.stage={stage}", "optimizer.params.lr=0.003",
                               "model.width=24", "model.depth=2", "model.heads=2", "model.head_size=8",
                               "model.feed_forward_options.hidden=20", "model.dropout=0.0", *overrides])


def schedule_for(settings: Settings) -> Schedule:
    return Schedule(settings.schedule, 20)


def network(settings: Settings) -> nn.Module:
    return build_model(settings.model, NUM_CLASSES, SIDE)


def data() -> tuple[Tensor, Tensor]:
    """One global batch a step: images (steps, B, 3, S, S), labels (steps, B)."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(STEPS, BATCH, 3, SIDE, SIDE, generator=generator)
    return images, torch.randint(0, NUM_CLASSES, (STEPS, BATCH), generator=generator)


def batches(engine, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """The micro-batches of this process, from optimiser step `start` on."""
    (images, labels), (which, of), sizes = data(), engine.data_shard, engine.batch_sizes
    for step in range(start, STEPS):
        for part in range(sizes.accumulation):
            begin = (part * of + which) * sizes.micro
            yield images[step, begin : begin + sizes.micro], labels[step, begin : begin + sizes.micro]


def plain_loop(settings: Settings) -> dict:
    """Losses and weights of a loop that knows nothing of DeepSpeed: the whole batch at once, in one process."""
    torch.manual_seed(SEED)
    model, schedule = network(settings), schedule_for(settings)
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


def make_engine(settings: Settings):
    from parallel import engine_class

    torch.set_num_threads(1)
    return engine_class("zero")(lambda: network(settings), settings, schedule_for(settings), SEED)


def train(engine, until: int = STEPS) -> list[float]:
    stream = batches(engine, engine.step)
    return [engine.mean(engine.train_batch(stream)) for _ in range(engine.step, until)]


def job_train(out: str, cases: dict[str, list]) -> None:
    """Train every case (stage and overrides), saving its state on the way; `<out>/<case>` holds the state, `<out>/results` the rest."""
    results = {}
    for name, (stage, overrides) in cases.items():
        engine = make_engine(settings_for(stage, *overrides))
        losses = train(engine, SAVED_AT)
        folder = Path(out, name)
        folder.mkdir(parents=True, exist_ok=True)
        engine.save(folder)
        losses += train(engine)
        results[name] = {"losses": losses, "weights": engine.weights(), "counts": counts_of(engine)}
    finish(engine, out, results)


def job_resume(out: str, cases: dict[str, list]) -> None:
    """Load every case's state at a stage, look at it, and go on to the end."""
    results = {}
    for name, (stage, overrides, folder) in cases.items():
        engine = make_engine(settings_for(stage, *overrides))
        engine.load(Path(folder))
        loaded, step = engine.gather_state(), engine.step
        results[name] = {"state": loaded, "step": step, "losses": train(engine), "weights": engine.weights()}
    finish(engine, out, results)


def job_refusals(out: str) -> None:
    """The sentences with which an engine refuses what would not train as asked."""
    class Scalar(nn.Module):
        def __init__(self):
            super().__init__()
            self.temperature = nn.Parameter(torch.tensor(1.0))

    def sentence(settings: Settings, build=None) -> str:
        from parallel import engine_class

        try:
            engine_class("zero")(build or (lambda: network(settings)), settings, schedule_for(settings), SEED)
        except SettingsError as error:
            return str(error)
        return "accepted"

    results = {
        "bf16 without a stage": sentence(settings_for(0, "bf16.enabled=true")),
        "an unknown stage": sentence(settings_for(4)),
        "a scalar": sentence(settings_for(1), lambda: nn.Sequential(nn.Linear(2, 2), Scalar())),
        "an odd batch": sentence(settings_for(1, "train_batch_size=7")),
        "too much accumulation": sentence(settings_for(1, "gradient_accumulation_steps=8")),
        "an optimiser": sentence(settings_for(1, "optimizer.type=AdamWW")),
    }
    if os.environ["RANK"] == "0":
        torch.save(results, Path(out, "results"))


def counts_of(engine) -> tuple[int, int, int, float]:
    """Counts over all images, dealt out to the processes, with a last batch that is filled up."""
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


def finish(engine, out: str, results: dict) -> None:
    if engine.is_main:
        torch.save(results, Path(out, "results"))
    else:
        assert all(case["weights"] is None for case in results.values())
    engine.close()


# --- the jobs, each once ------------------------------------------------------------------------------------------


def perform(out: Path, processes: int, job, *arguments) -> dict:
    out.mkdir()
    programs.run_ranks(processes, job, str(out), *arguments)
    return torch.load(out / "results", weights_only=False)


def training_cases() -> dict[str, list]:
    exact = {f"{recipe} {stage}": [stage, overrides] for stage in STAGES for recipe, overrides in RECIPES.items()}
    bf16 = {f"bf16 {stage}": [stage, ["bf16.enabled=true"]] for stage in (1, 2, 3)}
    return dict(sorted((exact | bf16).items(), key=lambda case: case[1][0]))  # stage 3 last, see `moved`


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def trained(folder) -> dict[int, dict]:
    """Results of every case, by number of processes."""
    return {processes: perform(folder / f"on-{processes}", processes, job_train, training_cases()) for processes in (1, 2)}


@pytest.fixture(scope="module")
def reference() -> dict[str, dict]:
    return {recipe: plain_loop(settings_for(0, *overrides)) for recipe, overrides in RECIPES.items()}


# From (processes, stage) to (processes, stage)
MOVES = [(2, 0, 1, 3), (2, 3, 1, 0), (2, 1, 1, 2), (2, 2, 1, 1), (1, 0, 2, 1), (1, 3, 2, 2), (1, 2, 2, 3), (1, 1, 2, 0),
         (2, 3, 2, 3), (2, 1, 2, 1)]
BF16_MOVES = [(2, 1, 1, 3), (1, 3, 2, 2), (2, 2, 2, 2)]


@pytest.fixture(scope="module")
def moved(folder, trained) -> dict[int, dict]:
    """What went on elsewhere, by the number of processes it went on with."""
    def cases(processes: int) -> dict[str, list]:
        fp32 = {f"{move}": [move[3], RECIPES["clipped"], str(folder / f"on-{move[0]}" / f"clipped {move[1]}")]
                for move in MOVES if move[2] == processes}
        bf16 = {f"bf16 {move}": [move[3], ["bf16.enabled=true"], str(folder / f"on-{move[0]}" / f"bf16 {move[1]}")]
                for move in BF16_MOVES if move[2] == processes}
        # Stage 3 last: it replaces F.linear for the rest of the process by one that rounds differently.
        return dict(sorted((fp32 | bf16).items(), key=lambda case: case[1][0]))

    return {processes: perform(folder / f"moved-to-{processes}", processes, job_resume, cases(processes)) for processes in (1, 2)}


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[key].double() - b[key].double()).abs().max().item() for key in a)


# --- the properties -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("processes", [1, 2])
def test_it_trains_as_a_plain_loop_does(trained, reference, processes, stage, recipe):
    result, plain = trained[processes][f"{recipe} {stage}"], reference[recipe]
    assert result["losses"] == pytest.approx(plain["losses"], abs=1e-6)
    assert largest_difference(result["weights"], plain["weights"]) < 1e-6
    assert all(value.dtype == torch.float32 and value.device.type == "cpu" for value in result["weights"].values())


def test_the_recipes_differ_by_more_than_what_is_tolerated(reference):
    """Otherwise an engine that ignores clipping would pass."""
    recipes = list(reference.values())
    assert largest_difference(recipes[0]["weights"], recipes[1]["weights"]) > 1e-3
    assert largest_difference(recipes[2]["weights"], recipes[3]["weights"]) > 1e-3
    assert abs(recipes[0]["losses"][0] - recipes[0]["losses"][-1]) > 1e-2


@pytest.mark.parametrize("processes", [1, 2])
def test_counts_are_exact_sums_that_leave_padding_out(trained, processes):
    result = trained[processes]["plain 1"]
    model = network(settings_for(1))
    model.load_state_dict(result["weights"])
    images, labels = (part.flatten(0, 1) for part in data())
    with torch.no_grad():
        scores = model.eval()(images)
    best = scores.topk(5).indices == labels[:, None]
    correct, correct_top5, seen, loss_sum = result["counts"]
    assert (correct, correct_top5, seen) == (int(best[:, 0].sum()), int(best.any(dim=1).sum()), STEPS * BATCH)
    assert loss_sum == pytest.approx(F.cross_entropy(scores, labels, reduction="sum").item(), rel=1e-5)


@pytest.mark.parametrize("move", MOVES, ids=lambda m: f"{m[0]} processes stage {m[1]} to {m[2]} stage {m[3]}")
def test_a_state_goes_on_at_another_stage_with_another_number_of_processes(folder, moved, reference, move):
    result = moved[move[2]][f"{move}"]
    saved = load_file(folder / f"on-{move[0]}" / f"clipped {move[1]}" / "state.safetensors")
    assert result["step"] == SAVED_AT
    assert largest_difference(result["state"], saved) == 0  # weights, Adam's moments and its step
    assert {key.split("/")[0] for key in saved} == {"weights", "optimizer", "scalars"}
    assert result["losses"] == pytest.approx(reference["clipped"]["losses"][SAVED_AT:], abs=1e-6)
    assert largest_difference(result["weights"], reference["clipped"]["weights"]) < 1e-6


@pytest.mark.parametrize("move", [move for move in MOVES if move[:2] == move[2:]], ids=str)
def test_a_state_goes_on_bit_for_bit_where_nothing_changed(trained, moved, move):
    result, unbroken = moved[move[2]][f"{move}"], trained[move[0]][f"clipped {move[1]}"]
    assert result["losses"] == unbroken["losses"][SAVED_AT:]
    assert largest_difference(result["weights"], unbroken["weights"]) == 0


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("processes", [1, 2])
def test_bf16_is_close_to_fp32_and_keeps_fp32_weights(trained, reference, processes, stage):
    result, plain = trained[processes][f"bf16 {stage}"], plain_loop(settings_for(stage))
    assert result["losses"] == pytest.approx(plain["losses"], abs=0.05)
    assert result["losses"] != plain["losses"]
    assert all(value.dtype == torch.float32 for value in result["weights"].values())
    classify = result["weights"]["3.classify.weight"]
    assert not torch.equal(classify, classify.bfloat16().float())  # the master copy, not the rounded one


@pytest.mark.parametrize("move", BF16_MOVES, ids=str)
def test_a_bf16_state_moves_without_being_rounded(folder, moved, trained, move):
    result = moved[move[2]][f"bf16 {move}"]
    saved = load_file(folder / f"on-{move[0]}" / f"bf16 {move[1]}" / "state.safetensors")
    assert largest_difference(result["state"], saved) == 0
    unbroken = trained[move[0]][f"bf16 {move[1]}"]["losses"][SAVED_AT:]
    assert result["losses"] == unbroken if move[:2] == move[2:] else result["losses"] == pytest.approx(unbroken, abs=0.05)


@pytest.mark.parametrize(("case", "message"), [
    ("bf16 without a stage", "bf16 needs zero_optimization.stage 1, 2 or 3"),
    ("an unknown stage", "zero_optimization.stage is 0, 1, 2 or 3, not 4"),
    ("a scalar", "parameter 1.temperature has no dimension"),
    ("an odd batch", "train_batch_size=7 cannot be cut into 2 data-parallel processes .* choose a multiple of 2"),
    ("too much accumulation", "train_batch_size=8 .* gradient_accumulation_steps=8; choose a multiple of 16"),
    ("an optimiser", "unknown optimizer.type 'AdamWW'; did you mean 'AdamW'"),
])
def test_what_would_not_train_as_asked_is_refused(refusals, case, message):
    assert re.search(message, refusals[case]), refusals[case]


@pytest.fixture(scope="module")
def refusals(folder) -> dict[str, str]:
    return perform(folder / "refusals", 2, job_refusals)
