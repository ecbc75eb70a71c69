"""Every optimizer trains under every strategy as in one process, or is rejected; a resumed run has the same bits.

test_engines.py and test_zero.py test AdamW, the default; tests/optim/test_optimizers.py tests the steps themselves.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import reference
from reference import SAVED_AT, assert_counts, largest_difference, perform, plain_loop, settings_for
from safetensors.torch import load_file

OPTIMIZERS = {
    "Adam": ["optimizer.params.lr=0.001", "optimizer.params.weight_decay=0.01"],
    "SGD": ["optimizer.params.lr=0.05"],
    "Muon": ["optimizer.params.lr=0.003"],
    "AdamWScheduleFree": ["schedule.shape=constant", "schedule.warmup_fraction=0.3"],
    "Lamb": ["optimizer.params.lr=0.01"],
    "Lion": ["optimizer.params.lr=0.0003"],
}
ENGINES = {
    **{f"zero {stage}": ("zero", [f"zero_optimization.stage={stage}"]) for stage in (0, 1, 2)},
    "ddp": ("ddp", []),
    "fsdp": ("fsdp", []),
    "pipeline": ("pipeline", ["parallel.stages=2"]),
    "zero 3": ("zero", ["zero_optimization.stage=3"]),  # last: it replaces F.linear for the rest of the process
}
PIECES = ("zero 1", "zero 2", "zero 3", "pipeline")  # hand the optimizer pieces of parameters, which Lamb cannot take
ELEMENTWISE = ("Adam", "SGD", "Lion")  # do not care how parameters are cut: AdamW has all stages, in test_zero.py
OTHER_STAGES = ("zero 0", "zero 2", "zero 3")
PAIRS = [
    (engine, name)
    for engine in ENGINES
    for name in OPTIMIZERS
    if not (name == "Lamb" and engine in PIECES) and not (name in ELEMENTWISE and engine in OTHER_STAGES)
]
# From an engine on two processes to an engine on one
MOVES = [("zero 2", "fsdp"), ("pipeline", "zero 3"), ("zero 3", "ddp"), ("fsdp", "zero 1")]


def overrides(engine: str, name: str) -> list[str]:
    return [
        f"optimizer.type={name}",
        "gradient_clipping=0.05" if name != "Lion" else "gradient_clipping=0.0",
        *OPTIMIZERS[name],
        *ENGINES[engine][1],
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("parallel-optimizers")


@pytest.fixture(scope="module")
def on_two(folder) -> dict:
    cases = {
        f"{engine} {name}": [ENGINES[engine][0], overrides(engine, name), {"look": True}] for engine, name in PAIRS
    }
    return perform(folder / "on-2", 2, reference.job, cases, {}, [])


@pytest.fixture(scope="module")
def resumed(folder, on_two) -> dict:
    cases = {
        f"{engine} {name}": [ENGINES[engine][0], overrides(engine, name), str(folder / "on-2" / f"{engine} {name}"), {}]
        for engine, name in PAIRS
    }
    return perform(folder / "resumed", 2, reference.job, {}, cases, [])


@pytest.fixture(scope="module")
def moved(folder, on_two) -> dict:
    cases = {
        f"{move} {name}": [
            ENGINES[move[1]][0],
            overrides(move[1], name) + (["parallel.stages=1"] if move[1] == "pipeline" else []),
            str(folder / "on-2" / f"{move[0]} {name}"),
            {},
        ]
        for move in MOVES
        for name in ("Muon", "AdamWScheduleFree")
    }
    return perform(
        folder / "moved",
        1,
        reference.job,
        {},
        dict(sorted(cases.items(), key=lambda case: "zero 3" in case[0].split(",")[1])),
        [],
    )


@pytest.fixture(scope="module")
def plain() -> dict[str, dict]:
    return {name: plain_loop(settings_for(*overrides("ddp", name))) for name in OPTIMIZERS}


@pytest.mark.parametrize(("engine", "name"), PAIRS)
def test_it_trains_as_in_a_plain_loop(on_two, plain, engine, name):
    result = on_two[f"{engine} {name}"]
    assert result["losses"] == pytest.approx(plain[name]["losses"], abs=2e-6)
    assert largest_difference(result["raw"], plain[name]["weights"]) < 2e-6
    assert largest_difference(result["weights"], plain[name]["averaged"]) < 2e-6
    assert plain[name]["losses"][0] - plain[name]["losses"][-1] > 1e-2
    assert_counts(result["counts"], result["weights"])


@pytest.mark.parametrize(("engine", "name"), PAIRS)
def test_a_resumed_run_has_the_same_bits(on_two, resumed, engine, name):
    result, unbroken = resumed[f"{engine} {name}"], on_two[f"{engine} {name}"]
    assert result["losses"] == unbroken["losses"][SAVED_AT:]
    assert (
        largest_difference(result["raw"], unbroken["raw"]) == 0
        and largest_difference(result["weights"], unbroken["weights"]) == 0
    )


@pytest.mark.parametrize("name", ["Muon", "AdamWScheduleFree"])
@pytest.mark.parametrize("move", MOVES, ids=lambda move: f"{move[0]} on 2 to {move[1]} on 1")
def test_a_state_moves_unchanged_to_another_engine(folder, moved, plain, move, name):
    result, saved = moved[f"{move} {name}"], load_file(folder / "on-2" / f"{move[0]} {name}" / "state.safetensors")
    assert largest_difference(result["state"], saved) == 0
    assert largest_difference(result["weights"], plain[name]["averaged"]) < 2e-6


def test_schedule_free_training_is_evaluated_at_its_average(on_two):
    result = on_two["ddp AdamWScheduleFree"]
    assert largest_difference(result["weights"], result["raw"]) > 1e-4
