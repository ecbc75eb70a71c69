"""model.checkpoint_blocks: training has the same bits with and without it under every strategy."""

from __future__ import annotations

import pytest
import reference
import torch
from reference import batches, make_engine, perform, settings_for

COMMON = ["model.dropout=0.1", "model.drop_path=0.3", "gradient_accumulation_steps=2"]
CASES = {  # gossip and local have the step of ddp
    "ddp, autocast": ["bf16.enabled=true"],
    "fsdp": [],
    "pipeline": ["parallel.stages=2"],
    "zero, stage 2, bf16": ["zero_optimization.stage=2", "bf16.enabled=true"],
    "zero, stage 3": ["zero_optimization.stage=3"],
}


def both_ways() -> dict[str, dict]:
    """The weights after two steps, without and with checkpointing."""
    results = {}
    for name, more in CASES.items():
        weights = []
        for is_on in ("false", "true"):
            settings = settings_for(*COMMON, *more, f"model.checkpoint_blocks={is_on}")
            engine = make_engine(name.split(",")[0], settings)
            stream = batches(engine)
            for _ in range(2):
                engine.train_batch(stream)
            weights.append(engine.weights())
        results[name] = {"weights": weights}
    return results


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("checkpointed") / "on-2"
    return perform(out, 2, reference.job, {}, {}, ["tests.parallel.test_activation_checkpointing:both_ways"])


@pytest.mark.parametrize("name", CASES)
def test_the_weights_have_the_same_bits(trained, name):
    plain, checkpointed = trained[name]["weights"]
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[key], checkpointed[key]) for key in plain)
