"""parallel/zero.py: every ZeRO stage trains as a plain PyTorch loop, and states move between stages."""

from __future__ import annotations

import logging
import os
import re
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import reference
import torch
from reference import (
    RECIPES,
    SAVED_AT,
    STEPS,
    assert_counts,
    largest_difference,
    perform,
    plain_loop,
    refusal,
    settings_for,
    with_batch_norm,
    with_frozen,
)
from safetensors.torch import load_file
from torch import nn

STAGES = (0, 1, 2, 3)
OFFLOADED = ["zero_optimization.offload_optimizer.device=cpu"]


def stage(number: int, *overrides: str) -> list[str]:
    return [f"zero_optimization.stage={number}", *overrides]


def job_refusals(out: str) -> None:
    """The messages with which an engine rejects settings."""
    scalar = nn.Linear(2, 2)
    scalar.temperature = nn.Parameter(torch.tensor(1.0))
    results = {f"{overrides}": refusal("zero", *overrides) for overrides in REFUSED}
    results["a scalar"] = refusal("zero", build=lambda: nn.Sequential(nn.Linear(2, 2), scalar))
    if os.environ["RANK"] == "0":
        torch.save(results, Path(out, "results"))


def computed_types(compile: str) -> set[torch.dtype]:
    """The dtypes of the linear layers' outputs in training and evaluation by autocast, as on a GPU.

    DeepSpeed disables an autocast that is entered around its engine where the flag of CUDA is set.
    """
    found: set[torch.dtype] = set()
    with mock.patch("torch.compile", partial(torch.compile, backend="aot_eager")):
        engine = reference.make_engine("zero", settings_for("bf16.enabled=autocast", f"compile={compile}"))
    for layer in engine.network().modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda layer, inputs, output: found.add(output.dtype))
    torch.set_autocast_enabled("cuda", True)
    engine.train_batch(reference.batches(engine))
    engine.compiled.use(training=False)
    engine.forward(reference.data()[0][0])
    torch.set_autocast_enabled("cuda", False)
    return found


def autocast_cases() -> dict[str, set[torch.dtype]]:
    return {compile: computed_types(compile) for compile in ("off", "on")}


# --- the jobs, each once ------------------------------------------------------------------------------------------


def training_cases() -> dict[str, list]:
    exact = {
        f"{recipe} {number}": ["zero", stage(number, *overrides), {}]
        for number in STAGES
        for recipe, overrides in RECIPES.items()
    }
    bf16 = {f"bf16 {number}": ["zero", stage(number, "bf16.enabled=true"), {}] for number in (1, 2, 3)}
    offloaded = {
        f"offloaded {number}": ["zero", stage(number, *RECIPES["clipped"], *OFFLOADED), {}] for number in (1, 2, 3)
    }
    with_norm = {
        f"batch norm, bf16 {number}": ["zero", stage(number, "bf16.enabled=true"), {"build": with_batch_norm}]
        for number in (1, 3)
    }
    frozen = {
        f"frozen {number}": ["zero", stage(number, *RECIPES["plain"]), {"build": with_frozen}] for number in STAGES
    }
    return dict(
        sorted((exact | bf16 | offloaded | with_norm | frozen).items(), key=lambda case: case[1][1][0])
    )  # stage 3 last, see `moved`


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def trained(folder) -> dict[int, dict]:
    """Results of every case, by number of processes."""
    return {
        processes: perform(folder / f"on-{processes}", processes, reference.job, training_cases(), {}, [])
        for processes in (1, 2)
    }


@pytest.fixture(scope="module")
def plain() -> dict[str, dict]:
    return {recipe: plain_loop(settings_for(*overrides)) for recipe, overrides in RECIPES.items()}


# From (processes, stage) to (processes, stage)
MOVES = [
    (2, 0, 1, 3),
    (2, 3, 1, 0),
    (2, 1, 1, 2),
    (2, 2, 1, 1),
    (1, 0, 2, 1),
    (1, 3, 2, 2),
    (1, 2, 2, 3),
    (1, 1, 2, 0),
    (2, 3, 2, 3),
    (2, 1, 2, 1),
]
BF16_MOVES = [(2, 1, 1, 3), (1, 3, 2, 2), (2, 2, 2, 2)]


@pytest.fixture(scope="module")
def moved(folder, trained) -> dict[int, dict]:
    """What went on elsewhere, by the number of processes it went on with."""

    def cases(processes: int) -> dict[str, list]:
        fp32 = {
            f"{move}": [
                "zero",
                stage(move[3], *RECIPES["clipped"]),
                str(folder / f"on-{move[0]}" / f"clipped {move[1]}"),
                {},
            ]
            for move in MOVES
            if move[2] == processes
        }
        bf16 = {
            f"bf16 {move}": [
                "zero",
                stage(move[3], "bf16.enabled=true"),
                str(folder / f"on-{move[0]}" / f"bf16 {move[1]}"),
                {},
            ]
            for move in BF16_MOVES
            if move[2] == processes
        }
        offloaded = {
            f"offloaded {number}": [
                "zero",
                stage(number, *RECIPES["clipped"], *OFFLOADED),
                str(folder / "on-2" / f"offloaded {number}"),
                {},
            ]
            for number in (1, 2, 3)
        }
        # Stage 3 last: it replaces F.linear for the rest of the process by one that rounds differently.
        return dict(sorted((fp32 | bf16 | offloaded).items(), key=lambda case: case[1][1][0]))

    return {
        processes: perform(folder / f"moved-to-{processes}", processes, reference.job, {}, cases(processes), [])
        for processes in (1, 2)
    }


@pytest.fixture(scope="module")
def autocast(folder) -> dict[str, set[torch.dtype]]:
    return perform(folder / "autocast", 1, reference.job, {}, {}, ["tests.parallel.test_zero:autocast_cases"])


# --- the properties -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("number", STAGES)
@pytest.mark.parametrize("processes", [1, 2])
def test_it_trains_as_a_plain_loop_does(trained, plain, processes, number, recipe):
    result, expected = trained[processes][f"{recipe} {number}"], plain[recipe]
    assert result["losses"] == pytest.approx(expected["losses"], abs=1e-6)
    assert largest_difference(result["weights"], expected["weights"]) < 1e-6
    assert all(value.dtype == torch.float32 and value.device.type == "cpu" for value in result["weights"].values())


def test_of_deepspeeds_warnings_only_the_one_about_our_optimizers_is_silent():
    pytest.importorskip("parallel.zero")
    logger = logging.getLogger("DeepSpeed")
    shown = {
        text: bool(logger.filter(logging.LogRecord("DeepSpeed", logging.WARNING, __file__, 1, text, None, None)))
        for text in ("you are using an untested optimizer", "the loss scale is low")
    }
    assert list(shown.values()) == [False, True]


def test_deepspeed_0_16_of_cuda_11_which_has_no_muon_and_no_norm_check_is_left_as_it_is(monkeypatch):
    zero = pytest.importorskip("parallel.zero")
    monkeypatch.setattr(zero, "is_installed", lambda package: False)
    monkeypatch.delattr(zero.compiler, "compile", raising=False)
    monkeypatch.delattr(zero.stage_1_and_2, "is_invalid_grad_norm", raising=False)
    zero.import_muon_uncompiled()
    with zero.skip_norm_check():
        assert not hasattr(zero.stage_1_and_2, "is_invalid_grad_norm")


@pytest.mark.parametrize("number", STAGES)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_frozen_layer_keeps_its_weights_and_they_are_saved(trained, processes, number):
    result = trained[processes][f"frozen {number}"]
    expected = plain_loop(settings_for(*RECIPES["plain"]), build=with_frozen)
    assert result["losses"] == pytest.approx(expected["losses"], abs=1e-6)
    assert largest_difference(result["weights"], expected["weights"]) < 1e-6
    assert {value.numel() for value in result["weights"].values()} > {122_880, 102_400}


@pytest.mark.parametrize("processes", [1, 2])
def test_counts_are_exact_sums_without_padding(trained, processes):
    result = trained[processes]["plain 1"]
    assert_counts(result["counts"], result["weights"])


@pytest.mark.parametrize("move", MOVES, ids=lambda m: f"{m[0]} processes stage {m[1]} to {m[2]} stage {m[3]}")
def test_a_state_goes_on_at_another_stage_with_another_number_of_processes(folder, moved, plain, move):
    result = moved[move[2]][f"{move}"]
    saved = load_file(folder / f"on-{move[0]}" / f"clipped {move[1]}" / "state.safetensors")
    assert result["step"] == SAVED_AT
    assert largest_difference(result["state"], saved) == 0  # weights, Adam's moments and its step
    assert {key.split("/")[0] for key in saved} == {"weights", "optimizer", "scalars"}
    assert result["losses"] == pytest.approx(plain["clipped"]["losses"][SAVED_AT:], abs=1e-6)
    assert largest_difference(result["weights"], plain["clipped"]["weights"]) < 1e-6


@pytest.mark.parametrize("move", [move for move in MOVES if move[:2] == move[2:]], ids=str)
def test_a_state_goes_on_bit_for_bit_where_nothing_changed(trained, moved, move):
    result, unbroken = moved[move[2]][f"{move}"], trained[move[0]][f"clipped {move[1]}"]
    assert result["losses"] == unbroken["losses"][SAVED_AT:]
    assert largest_difference(result["weights"], unbroken["weights"]) == 0


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("processes", [1, 2])
def test_bf16_is_close_to_fp32_and_keeps_fp32_weights(trained, processes, number):
    result, expected = trained[processes][f"bf16 {number}"], plain_loop(settings_for())
    assert result["losses"] == pytest.approx(expected["losses"], abs=0.05)
    assert result["losses"] != expected["losses"]
    assert all(value.dtype == torch.float32 for value in result["weights"].values())
    classify = result["weights"]["3.classify.weight"]
    assert not torch.equal(classify, classify.bfloat16().float())  # the master copy, not the rounded one


@pytest.mark.parametrize("compile", ["off", "on"])
def test_autocast_computes_in_bf16_inside_deepspeeds_engine(autocast, compile):
    assert autocast[compile] == {torch.bfloat16}


@pytest.mark.parametrize("number", [1, 3])
def test_batch_norm_in_bf16_notes_the_statistics_in_fp32(trained, number):
    result, expected = trained[1][f"batch norm, bf16 {number}"], plain_loop(settings_for(), build=with_batch_norm)
    assert result["losses"] == pytest.approx(expected["losses"], abs=0.02)
    for name in ("0.norm.running_mean", "0.norm.running_var"):
        found, due = result["weights"][name], expected["weights"][name]
        assert found.dtype == torch.float32 and not torch.equal(found, found.bfloat16().float())
        assert torch.allclose(found, due, atol=5e-3)
    assert result["weights"]["0.norm.num_batches_tracked"] == STEPS


@pytest.mark.parametrize("move", BF16_MOVES, ids=str)
def test_a_bf16_state_moves_without_being_rounded(folder, moved, trained, move):
    result = moved[move[2]][f"bf16 {move}"]
    saved = load_file(folder / f"on-{move[0]}" / f"bf16 {move[1]}" / "state.safetensors")
    assert largest_difference(result["state"], saved) == 0
    unbroken = trained[move[0]][f"bf16 {move[1]}"]["losses"][SAVED_AT:]
    assert (
        result["losses"] == unbroken if move[:2] == move[2:] else result["losses"] == pytest.approx(unbroken, abs=0.05)
    )


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("processes", [1, 2])
def test_an_optimizer_that_is_kept_on_the_cpu_trains_and_resumes_alike(
    folder, trained, moved, plain, processes, number
):
    """Without a GPU both are in the same memory: this tests DeepSpeed's other code path, not the place."""
    result, resumed = trained[processes][f"offloaded {number}"], moved[processes][f"offloaded {number}"]
    assert result["losses"] == pytest.approx(plain["clipped"]["losses"], abs=1e-6)
    assert largest_difference(result["weights"], plain["clipped"]["weights"]) < 1e-6
    assert (
        largest_difference(resumed["state"], load_file(folder / "on-2" / f"offloaded {number}" / "state.safetensors"))
        == 0
    )
    assert largest_difference(resumed["weights"], plain["clipped"]["weights"]) < 1e-6


REFUSED = {
    ("bf16.enabled=true", "zero_optimization.stage=0"): "bf16 needs zero_optimization.stage 1, 2 or 3",
    ("zero_optimization.stage=4",): r"zero_optimization.stage must be in \[0, 3\], got 4",
    (
        "train_batch_size=7",
    ): "train_batch_size=7 is not divisible by 2 data-parallel processes .* choose a multiple of 2",
    ("gradient_accumulation_steps=8",): "train_batch_size=8 .* gradient_accumulation_steps=8; choose a multiple of 16",
    ("optimizer.type=AdamWW",): "unknown optimizer.type 'AdamWW'; did you mean 'AdamW'",
    (
        "optimizer.type=Lamb",
    ): "Lamb needs the norm of each full parameter, but zero_optimization.stage=1 shards them; choose stage 0",
    (
        "zero_optimization.stage=0",
        *OFFLOADED,
    ): "zero_optimization.offload_optimizer needs zero_optimization.stage 1, 2 or 3",
    ("zero_optimization.offload_optimizer.device=nvme",): "unknown zero_optimization.offload_optimizer.device 'nvme'",
    (
        "optimizer.type=Muon",
        *OFFLOADED,
    ): "optimizer.type=Muon gathers its matrices on the GPUs, so zero_optimization.offload_optimizer cannot",
    (
        "zero_optimization.stage=3",
        "compile=on",
    ): "compile=on: zero_optimization.stage=3 loses the gradients of compiled layers",
    ("compile=reduce-overhead",): "compile=reduce-overhead: this strategy cannot record CUDA graphs; ddp can",
    ("compile=fast",): "unknown compile 'fast'",
    ("channels_last=true",): "this network has none; add --set channels_last=false",
    ("ema.decay=1.0",): r"ema.decay must be in \[0, 1\), got 1.0",
    (
        "ema.decay=0.9",
        "optimizer.type=AdamWScheduleFree",
    ): "AdamWScheduleFree averages the weights itself. Set ema.decay=0",
}


@pytest.mark.parametrize("case", [*REFUSED, "a scalar"], ids=str)
def test_an_unusable_setting_is_rejected(refusals, case):
    assert re.search(REFUSED.get(case, "parameter 1.temperature has no dimension"), refusals[f"{case}"]), refusals[
        f"{case}"
    ]


@pytest.fixture(scope="module")
def refusals(folder) -> dict[str, str]:
    return perform(folder / "refusals", 2, job_refusals)
