"""EMA of the weights: equal to that of one plain process under every strategy, evaluated and saved, exact when resumed.

test_optimizers_by_strategy.py tests optimizers that average by themselves (schedule-free).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import reference
import torch
from reference import (
    RECIPES,
    SAVED_AT,
    assert_counts,
    batches,
    largest_difference,
    make_engine,
    perform,
    plain_loop,
    save,
    settings_for,
    with_batch_norm,
)
from safetensors.torch import load_file

from config.settings import EmaSettings
from parallel.ema import WeightAverage

EMA = ["ema.decay=0.3"]  # the warmup reaches it within the steps
ENGINES = {
    **{f"zero {stage}": ("zero", [f"zero_optimization.stage={stage}"]) for stage in (0, 1, 2)},
    "offloaded 2": ("zero", ["zero_optimization.stage=2", "zero_optimization.offload_optimizer.device=cpu"]),
    "ddp": ("ddp", []),
    "fsdp": ("fsdp", []),
    "pipeline": ("pipeline", ["parallel.stages=2"]),
    "zero 3": ("zero", ["zero_optimization.stage=3"]),  # last: it replaces F.linear for the rest of the process
}
# From an engine on two processes to an engine on one or two
MOVES = [
    ("zero 2", 2, "pipeline"),
    ("pipeline", 2, "fsdp"),
    ("fsdp", 2, "zero 2"),
    ("ddp", 2, "zero 3"),
    ("zero 3", 1, "ddp"),
    ("zero 1", 1, "fsdp"),
    ("ddp", 1, "zero 2"),
    ("offloaded 2", 1, "zero 3"),
]


def moving() -> dict[str, dict]:
    """Engines whose EMA is compared with their own past weights: workers, and a network with buffers."""
    cases = {"ddp": [], "gossip": [], "local": ["parallel.local_steps=3"], "zero": [], "fsdp": []}
    results = {}
    for strategy, overrides in cases.items():
        engine = make_engine(strategy, settings_for(*EMA, *overrides), with_batch_norm)
        stream, seen = batches(engine), [engine.weights(raw=True)]
        for _ in range(SAVED_AT):
            engine.train_batch(stream)
            seen.append(engine.weights(raw=True))
        results[f"moving {strategy}"] = {"seen": seen, "average": engine.weights()}
    return results


def restored() -> dict[str, dict]:
    """The EMA of a network with buffers, before it was saved and after another engine has loaded it."""
    results = {}
    for strategy in ("ddp", "zero", "fsdp"):
        with tempfile.TemporaryDirectory() as place:
            engine = make_engine(strategy, settings_for(*EMA), with_batch_norm)
            place = engine.broadcast_object(place)
            stream = batches(engine)
            for _ in range(SAVED_AT):
                engine.train_batch(stream)
            save(engine, Path(place))
            saved = engine.gather_state()
            engine.any(False)  # wait until the main process has written
            other = make_engine(strategy, settings_for(*EMA), with_batch_norm)
            other.load(Path(place))
            results[f"restored {strategy}"] = {"saved": saved, "loaded": other.gather_state()}
            engine.any(False)
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("averages")


@pytest.fixture(scope="module")
def on_two(folder) -> dict:
    cases = {
        engine: [strategy, [*RECIPES["clipped"], *EMA, *overrides], {"look": True}]
        for engine, (strategy, overrides) in ENGINES.items()
    }
    cases |= {"bf16": ["zero", ["bf16.enabled=true", "zero_optimization.stage=2", *EMA], {}]}
    cases = dict(sorted(cases.items(), key=lambda case: "zero_optimization.stage=3" in case[1][1]))
    return perform(
        folder / "on-2",
        2,
        reference.job,
        cases,
        {},
        ["tests.parallel.test_ema:moving", "tests.parallel.test_ema:restored"],
    )


@pytest.fixture(scope="module")
def moved(folder, on_two) -> dict[int, dict]:
    def cases(processes: int) -> dict[str, list]:
        moves = [*MOVES, *((engine, 2, engine) for engine in ENGINES)]
        found = {
            f"{move}": [
                ENGINES[move[2]][0],
                [*RECIPES["clipped"], *EMA, *ENGINES[move[2]][1]],
                str(folder / "on-2" / move[0]),
                {},
            ]
            for move in moves
            if move[1] == processes
        }
        return dict(sorted(found.items(), key=lambda case: "zero_optimization.stage=3" in case[1][1]))

    return {
        processes: perform(folder / f"moved-to-{processes}", processes, reference.job, {}, cases(processes), [])
        for processes in (1, 2)
    }


@pytest.fixture(scope="module")
def plain() -> dict:
    return plain_loop(settings_for(*RECIPES["clipped"], *EMA))


@pytest.mark.parametrize("engine", ENGINES)
def test_the_ema_equals_that_of_a_plain_loop_and_does_not_change_training(on_two, plain, engine):
    result = on_two[engine]
    assert largest_difference(result["weights"], plain["averaged"]) < 1e-6
    assert largest_difference(result["raw"], plain["weights"]) < 1e-6
    assert result["losses"] == pytest.approx(plain["losses"], abs=1e-6)
    assert largest_difference(plain["averaged"], plain["weights"]) > 1e-4


@pytest.mark.parametrize("engine", ENGINES)
def test_evaluation_uses_the_ema_and_on_request_the_trained_weights(on_two, engine):
    result = on_two[engine]
    assert_counts(result["counts"], result["weights"])
    assert_counts(result["raw counts"], result["raw"])
    assert result["counts"][3] != result["raw counts"][3]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_resumed_run_has_the_same_bits_and_evaluation_does_not_change_training(on_two, moved, engine):
    """The uninterrupted run was evaluated during training; the resumed one was not."""
    resumed, unbroken = moved[2][f"{(engine, 2, engine)}"], on_two[engine]
    assert resumed["losses"] == unbroken["losses"][SAVED_AT:]
    for kind in ("weights", "raw"):
        assert largest_difference(resumed[kind], unbroken[kind]) == 0


@pytest.mark.parametrize("move", MOVES, ids=lambda move: f"{move[0]} on 2 to {move[2]} on {move[1]}")
def test_the_ema_moves_unchanged_to_another_strategy_and_number_of_processes(folder, moved, plain, move):
    result, saved = moved[move[1]][f"{move}"], load_file(folder / "on-2" / move[0] / "state.safetensors")
    assert largest_difference(result["state"], saved) == 0
    assert {f"ema/{name}" for name in plain["weights"]} <= set(saved)
    assert largest_difference(result["weights"], plain["averaged"]) < 1e-6


def test_bf16_training_is_averaged_in_fp32(on_two):
    """In bf16 the EMA would not change: an update is smaller than its last digit."""
    average = on_two["bf16"]["weights"]["3.classify.weight"]
    assert average.dtype == torch.float32 and not torch.equal(average, average.bfloat16().float())
    assert largest_difference(on_two["bf16"]["weights"], on_two["bf16"]["raw"]) > 1e-4


@pytest.mark.parametrize("strategy", ["ddp", "gossip", "local", "zero", "fsdp"])
def test_buffers_are_averaged_too_and_the_mean_of_workers_averages_is_that_of_their_mean(on_two, strategy):
    seen, average = on_two[f"moving {strategy}"]["seen"], on_two[f"moving {strategy}"]["average"]
    expected = seen[0]
    for step, weights in enumerate(seen[1:]):
        decay = min(0.3, (1 + step) / (10 + step))
        expected = {name: decay * expected[name] + (1 - decay) * weights[name] for name in weights}
    whole = "0.norm.num_batches_tracked"
    assert average.pop(whole) == seen[-1][whole] == SAVED_AT and expected.pop(whole) is not None
    assert largest_difference(average, expected) < 1e-6
    assert not torch.equal(average["0.norm.running_mean"], seen[-1]["0.norm.running_mean"])


@pytest.mark.parametrize("strategy", ["ddp", "zero", "fsdp"])
def test_the_ema_of_buffers_is_restored(on_two, strategy):
    saved, loaded = on_two[f"restored {strategy}"]["saved"], on_two[f"restored {strategy}"]["loaded"]
    buffers = [key for key in saved if key.startswith("ema/") and "running_" in key]
    assert buffers and saved.keys() == loaded.keys()
    for key in saved:
        assert torch.equal(saved[key], loaded[key]), key
    assert any(not torch.equal(saved[key], saved[key.replace("ema/", "weights/", 1)]) for key in buffers)


def test_the_decay_warms_up_or_does_not():
    average = WeightAverage(EmaSettings(decay=0.99), [torch.zeros(2)])
    assert [average.decay(step) for step in (0, 10, 90, 10_000)] == [1 / 10, 11 / 20, 91 / 100, 0.99]
    weights = torch.zeros(2)
    cold = WeightAverage(EmaSettings(decay=0.75, warmup=False), [weights])
    weights += 1
    for step in range(3):
        cold.update(step)
    assert cold.values[0].tolist() == [1 - 0.75**3] * 2
