"""parallel/: data-parallel strategies and the pipeline train as a plain PyTorch loop, and load one another's states.

ZeRO's stages are tested in test_zero.py, rejected settings in test_setting_checks.py, whole runs in test_strategies.py.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import reference
import torch
from reference import (
    COUNTED,
    NUM_CLASSES,
    RECIPES,
    SAVED_AT,
    SEED,
    SIDE,
    assert_counts,
    batches,
    counted,
    counts_of,
    data,
    go_on,
    largest_difference,
    make_engine,
    network,
    perform,
    plain_loop,
    pretended_gpus,
    settings_for,
    train,
    train_and_save,
    with_batch_norm,
)
from torch import nn

from parallel.dp import InPrecision

ENGINES = {  # name of a case: strategy and settings
    "ddp": ("ddp", []),
    "fsdp": ("fsdp", []),
    "zero 1": ("zero", []),
    "pipeline": ("pipeline", ["parallel.stages=2"]),
}
WORKERS = {
    "gossip": ("gossip", []),
    "local": ("local", ["parallel.local_steps=3"]),
}  # test_gossip.py has the rest of them


# --- what runs inside the forked processes ------------------------------------------------------------------------


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
        results[f"batch norm {name}"] = {
            "first": first,
            "weights": engine.weights(),
            "counts": counts_of(engine),
            "equal": equal,
        }
    return results


AUTOCAST = {"zero autocast": ("zero", ["bf16.enabled=autocast"])}
MASTERS = {"ddp masters": ("ddp", ["bf16.enabled=masters"])}


def bf16_cases() -> dict[str, dict]:
    import torch.distributed as dist

    def settings(more: list[str]) -> list[str]:
        return ["gradient_clipping=0.0", "bf16.enabled=true", *more]

    in_bf16 = {**ENGINES, **WORKERS, **AUTOCAST, **MASTERS}
    with TemporaryDirectory() as folder:
        folder = Path(processes_main(folder))
        results = {
            f"bf16 {name}": train_and_save(strategy, settings(more), folder / name)
            for name, (strategy, more) in in_bf16.items()
        }
        dist.barrier()
        results |= {
            f"bf16 {name}, resumed": go_on(strategy, settings(more), folder / name)
            for name, (strategy, more) in in_bf16.items()
        }
        dist.barrier()
    return results


def masters_cases() -> dict[str, dict]:
    """A network with BatchNorm and an EMA, with fp32 masters beside bf16 weights and in fp32 throughout."""
    results = {}
    for name, more in (("masters", ["bf16.enabled=masters"]), ("no masters", [])):
        settings = settings_for("gradient_clipping=0.0", "ema.decay=0.9", *more)
        engine = make_engine("ddp", settings, with_batch_norm)
        results[name] = {"losses": train(engine), "weights": engine.weights(), "raw": engine.weights(raw=True)}
        results[name]["computing"] = {key: value.detach() for key, value in engine.network().named_parameters()}
    return results


def processes_main(value: str) -> str:
    """Return the main process's value on all processes."""
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def dp_case() -> dict[str, dict]:
    """DataParallel without GPUs is the plain module; the test shows that the engine around it trains."""
    with pretended_gpus():
        engine = make_engine("dp", settings_for(*RECIPES["accumulated, clipped"]))
    results = {"dp": {"losses": train(engine), "weights": engine.weights(), "said": engine.describe()}}
    with pretended_gpus():
        engine = make_engine("dp", settings_for("gradient_clipping=0.0", "bf16.enabled=true"))
    return results | {"bf16 dp": {"losses": train(engine)}}


def cut_cases() -> dict[str, dict]:
    """Other divisions of the pipeline, and a network whose stages have different parameter groups."""
    results = {}
    for cut in ("uniform", "time"):
        engine = make_engine(
            "pipeline", settings_for("gradient_clipping=0.05", f"parallel.partition={cut}", f"image_side={SIDE}")
        )
        results[f"cut {cut}"] = {"losses": train(engine), "cuts": engine.cuts, "layers": len(network(settings_for()))}
    engine = make_engine("pipeline", settings_for("gradient_clipping=0.05"), uneven)
    results["uneven"] = {"losses": train(engine), "weights": engine.weights()}
    return results


def uneven() -> nn.Module:
    """A first stage of matrices alone, a second of matrices and vectors: one parameter group and two."""
    return nn.Sequential(
        nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 32, bias=False), nn.Linear(32, 16, bias=False)),
        nn.Sequential(nn.ReLU(), nn.Linear(16, NUM_CLASSES)),
    )


# --- the jobs, each once ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def on_one(folder) -> dict:
    """One process: a pipeline of one stage is still a pipeline."""
    cases = {
        f"{engine} {recipe}": [
            strategy,
            RECIPES[recipe] + (["parallel.stages=1"] if strategy == "pipeline" else []),
            {},
        ]
        for engine, (strategy, _) in ENGINES.items()
        for recipe in ("clipped", "accumulated, clipped")
    }
    return perform(folder / "on-1", 1, reference.job, cases, {}, ["tests.parallel.test_engines:dp_case"])


# From (processes, engine) to (processes, engine)
MOVES = [
    (2, "ddp", 2, "ddp"),
    (2, "fsdp", 2, "fsdp"),
    (2, "pipeline", 2, "pipeline"),
    (2, "zero 1", 2, "ddp"),
    (2, "ddp", 2, "fsdp"),
    (2, "fsdp", 2, "zero 1"),
    (2, "pipeline", 2, "fsdp"),
    (2, "zero 1", 2, "pipeline"),
    (1, "ddp", 2, "fsdp"),
    (1, "fsdp", 2, "pipeline"),
    (1, "pipeline", 2, "ddp"),
    (2, "fsdp", 1, "ddp"),
    (2, "ddp", 1, "zero 1"),
    (2, "zero 1", 1, "fsdp"),
    (2, "pipeline", 1, "ddp"),
    (2, "ddp", 1, "pipeline"),
]


def moves_to(processes: int, folder: Path) -> dict[str, list]:
    def overrides(engine: str) -> list[str]:
        stages = ["parallel.stages=1"] if processes == 1 and engine == "pipeline" else ENGINES[engine][1]
        return RECIPES["clipped"] + stages

    return {
        f"{move}": [ENGINES[move[3]][0], overrides(move[3]), str(folder / f"on-{move[0]}" / f"{move[1]} clipped"), {}]
        for move in MOVES
        if move[2] == processes
    }


@pytest.fixture(scope="module")
def on_two(folder, on_one) -> dict:
    cases = {
        f"{engine} {recipe}": [strategy, overrides + more, {}]
        for engine, (strategy, more) in ENGINES.items()
        for recipe, overrides in RECIPES.items()
    }
    cases |= {
        f"{engine} soft": [strategy, RECIPES["accumulated, clipped"] + more, {"soft": True}]
        for engine, (strategy, more) in ENGINES.items()
    }
    cases["pipeline stage 0 plain"] = ["pipeline", [*RECIPES["plain"], "zero_optimization.stage=0"], {}]
    cases["pipeline 1 x 2 accumulated, clipped"] = [
        "pipeline",
        [*RECIPES["accumulated, clipped"], "parallel.stages=1"],
        {},
    ]
    return perform(
        folder / "on-2",
        2,
        reference.job,
        cases,
        moves_to(2, folder),
        [
            f"tests.parallel.test_engines:{cases}"
            for cases in ("batch_norm_cases", "bf16_cases", "masters_cases", "cut_cases")
        ],
    )


@pytest.fixture(scope="module")
def back_on_one(folder, on_two) -> dict:
    return perform(folder / "back-on-1", 1, reference.job, {}, moves_to(1, folder), [])


@pytest.fixture(scope="module")
def plain() -> dict[str, dict]:
    return {recipe: plain_loop(settings_for(*overrides)) for recipe, overrides in RECIPES.items()}


# --- the properties -----------------------------------------------------------------------------------------------

TWO = [
    *(f"{engine} {recipe}" for engine in ENGINES for recipe in RECIPES),
    "pipeline stage 0 plain",
    "pipeline 1 x 2 accumulated, clipped",
]
ONE = [f"{engine} {recipe}" for engine in ENGINES for recipe in ("clipped", "accumulated, clipped")]


def assert_trains_as(result: dict, expected: dict) -> None:
    assert result["losses"] == pytest.approx(expected["losses"], abs=1e-6)
    assert largest_difference(result["weights"], expected["weights"]) < 1e-6
    assert all(value.dtype == torch.float32 and value.device.type == "cpu" for value in result["weights"].values())


def recipe_of(case: str) -> str:
    return next(recipe for recipe in sorted(RECIPES, key=len, reverse=True) if case.endswith(recipe))


@pytest.mark.parametrize("case", TWO)
def test_two_processes_train_as_a_plain_loop_does(on_two, plain, case):
    assert_trains_as(on_two[case], plain[recipe_of(case)])


@pytest.mark.parametrize("case", ONE)
def test_one_process_trains_as_a_plain_loop_does(on_one, plain, case):
    assert_trains_as(on_one[case], plain[recipe_of(case)])


@pytest.mark.parametrize("engine", ENGINES)
def test_soft_labels_with_smoothing_and_accumulation_train_as_in_a_plain_loop(on_two, plain, engine):
    """MixUp and CutMix give each image two labels with shares."""
    expected = plain_loop(settings_for(*RECIPES["accumulated, clipped"]), soft=True)
    assert_trains_as(on_two[f"{engine} soft"], expected)
    assert largest_difference(expected["weights"], plain["accumulated, clipped"]["weights"]) > 1e-3


def test_the_recipes_differ_by_more_than_the_tolerance(plain):
    """Otherwise an engine that ignores clipping or smoothing would pass."""
    first, clipped, accumulated = (plain[name] for name in RECIPES)
    assert largest_difference(first["weights"], clipped["weights"]) > 1e-3
    assert largest_difference(clipped["weights"], accumulated["weights"]) > 5e-4


@pytest.mark.parametrize(
    "case", [case for case in TWO if recipe_of(case) == "clipped"] + ["pipeline 1 x 2 accumulated, clipped"]
)
def test_counts_are_exact_sums_without_padding(on_two, case):
    assert_counts(on_two[case]["counts"], on_two[case]["weights"])


@pytest.mark.parametrize("move", MOVES, ids=lambda m: f"{m[1]} on {m[0]} to {m[3]} on {m[2]}")
def test_a_state_resumes_under_another_strategy_and_number_of_processes(on_two, back_on_one, plain, move):
    result, expected = (on_two if move[2] == 2 else back_on_one)[f"{move}"], plain["clipped"]
    assert result["step"] == SAVED_AT
    assert result["losses"] == pytest.approx(expected["losses"][SAVED_AT:], abs=1e-6)
    assert largest_difference(result["weights"], expected["weights"]) < 1e-6
    if move[:2] == move[2:]:
        unbroken = on_two[f"{move[1]} clipped"]
        assert result["losses"] == unbroken["losses"][SAVED_AT:]
        assert largest_difference(result["weights"], unbroken["weights"]) == 0


def test_zero_by_autocast_trains_as_ddp_does(on_two):
    """fp32 weights in both, so they differ by the rounding of single products alone."""
    assert on_two["bf16 zero autocast"]["losses"] == pytest.approx(on_two["bf16 ddp"]["losses"], abs=2e-3)


def test_bf16_weights_with_masters_train_as_those_of_deepspeed_do(on_two):
    """Both compute with bf16 weights and update fp32 ones, so they differ by the rounding of gradients alone."""
    ours, deepspeeds = on_two["bf16 ddp masters"], on_two["bf16 zero 1"]
    assert ours["losses"] == pytest.approx(deepspeeds["losses"], abs=5e-3) and "bf16 incl. weights" in ours["said"]
    assert ours["counts"] == pytest.approx(deepspeeds["counts"], abs=2)


def test_masters_keep_batch_norms_statistics_and_the_ema_in_fp32(on_two):
    found, expected = on_two["masters"], on_two["no masters"]
    assert found["losses"] == pytest.approx(expected["losses"], abs=0.05)
    for kind in ("weights", "raw"):
        for name, tensor in expected[kind].items():
            assert found[kind][name].dtype == tensor.dtype
            assert torch.allclose(found[kind][name].float(), tensor.float(), atol=0.02), name
    for name, weight in found["computing"].items():  # after evaluating the EMA, the trained weights are back
        assert torch.equal(weight, found["raw"][name].bfloat16())


@pytest.mark.parametrize("engine", [*ENGINES, *WORKERS, *AUTOCAST, *MASTERS])
def test_bf16_is_close_to_fp32_and_keeps_fp32_weights(on_two, plain, engine):
    result, expected = on_two[f"bf16 {engine}"], plain["plain"]["losses"]
    close = 0.2 if engine in WORKERS else 0.05  # workers step on their own gradients, in fp32 too
    assert result["losses"] == pytest.approx(expected, abs=close)
    assert result["losses"] != pytest.approx(expected, abs=1e-6) and "bf16" in result["said"]
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
    images, labels = counted()
    with torch.no_grad():
        assert result["counts"][0] == int((model.eval()(images).argmax(1) == labels).sum())
    assert largest_difference(result["weights"], on_two["batch norm ddp"]["weights"]) < 1e-6


@pytest.mark.parametrize("cut", ["uniform", "time"])
def test_a_pipeline_trains_the_same_with_any_stages(on_two, plain, cut):
    result = on_two[f"cut {cut}"]
    assert result["losses"] == pytest.approx(plain["clipped"]["losses"], abs=1e-6)
    first, middle, last = result["cuts"]
    assert (first, last) == (0, result["layers"]) and 0 < middle < last and (cut == "time" or middle == last // 2)


@pytest.mark.slow
def test_four_processes_are_two_stages_times_two_replicas_or_four_workers(folder, plain):
    cases = {f"pipeline {recipe}": ["pipeline", overrides, {}] for recipe, overrides in RECIPES.items()}
    cases |= {"gossip": ["gossip", [], {}], "local": ["local", ["parallel.local_steps=3"], {}]}
    again = {
        f"{name}, resumed": [strategy, overrides, str(folder / "on-4" / name), {}]
        for name, (strategy, overrides, _) in cases.items()
    }
    results = perform(folder / "on-4", 4, reference.job, cases, again, [])
    for recipe in RECIPES:
        assert_trains_as(results[f"pipeline {recipe}"], plain[recipe])
    for name in cases:
        assert results[f"{name}, resumed"]["losses"] == results[name]["losses"][SAVED_AT:]
        assert results[name]["counts"][2] == COUNTED
    assert "x 2 replicas" in results["pipeline plain"]["said"] and results["gossip"]["facts"]["worker_distance"] > 1e-4


def test_stages_may_differ_in_their_parameter_groups(on_two):
    """DeepSpeed sums norms group by group over the stages; unequal numbers would clip wrongly, or hang."""
    expected = plain_loop(settings_for("gradient_clipping=0.05"), build=uneven)
    assert largest_difference(on_two["uneven"]["weights"], expected["weights"]) < 1e-6


def test_dp_is_one_process(on_one, plain):
    assert_trains_as(on_one["dp"], plain["accumulated, clipped"])
    assert on_one["dp"]["said"] == "2 GPUs in one process, fp32"
    assert on_one["bf16 dp"]["losses"] == pytest.approx(plain["plain"]["losses"], abs=0.05)


def test_dps_threads_compute_in_bf16():
    """Autocast is entered in the thread with bf16; DataParallel itself would enter it with fp16."""
    network = InPrecision(nn.Linear(4, 4), lambda: torch.autocast("cpu", torch.bfloat16))
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(network, torch.ones(2, 4)).result().dtype == torch.bfloat16
