"""parallel/gossip.py and parallel/local.py: workers with models of their own.

On the complete graph with SGD they train as one plain loop does; sparser graphs keep the workers' mean and bring them
together; the mean model is what is evaluated; a stopped run goes on with the same bits.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from reference import (
    COUNTED,
    SAVED_AT,
    batches,
    counted,
    counts_of,
    largest_difference,
    make_engine,
    network,
    perform,
    plain_loop,
    save,
    settings_for,
    train,
    with_batch_norm,
)
from torch import Tensor
from torch.nn import functional as F

from common.errors import SettingsError

SGD = ["optimizer.type=SGD", "optimizer.params.lr=0.05", "gradient_clipping=0.0"]
ALONE = ["parallel.local_steps=1", "parallel.outer_lr=1.0", "parallel.outer_momentum=0.0"]
DILOCO = ["parallel.local_steps=3"]
WORKERS = {  # name of a case: strategy, settings, whether the optimizer is SGD
    "gossip SGD": ("gossip", ["parallel.topology=complete"], True),
    "gossip SGD accumulated": ("gossip", ["parallel.topology=complete", "gradient_accumulation_steps=2"], True),
    "gossip SGD, average then step": (
        "gossip",
        ["parallel.topology=complete", "parallel.gossip_order=adapt_with_combine"],
        True,
    ),
    "local SGD": ("local", ALONE, True),
    "gossip AdamW": ("gossip", ["parallel.topology=complete"], False),
    "local AdamW": ("local", ALONE, False),
    "gossip AccumAdam": ("gossip", ["parallel.moment_steps=3"], False),
    "gossip bf16": ("gossip", ["bf16.enabled=true"], False),
    "local": ("local", DILOCO, False),
    "local, one meeting after the last": ("local", ["parallel.local_steps=11"], False),
}


def settings_of(case: str):
    _, overrides, sgd = WORKERS[case]
    settings = settings_for(*(SGD if sgd else []), *overrides)
    if sgd:
        settings.engine["optimizer"]["params"] = {"lr": 0.05, "weight_decay": 0.05, "momentum": 0.9}
    return settings


# --- what runs inside the forked processes ------------------------------------------------------------------------


def job(out: str) -> None:
    import torch.distributed as dist

    results: dict = {}
    for name, (strategy, _, _) in WORKERS.items():
        engine = make_engine(strategy, settings_of(name))
        losses = train(engine, SAVED_AT)
        folder = Path(out, name)
        folder.mkdir(exist_ok=True)
        save(engine, folder)
        losses += train(engine)
        before, apart = engine.state_tensors(keep=True), engine.epoch_facts()
        results[name] = {
            "losses": losses,
            "counts": counts_of(engine),
            "weights": engine.weights(),
            "apart": apart,
            "kept": largest_difference(before, engine.state_tensors(keep=True)) == 0,
            "all": engine.gather_state(),
        }
        dist.barrier()
        engine = make_engine(strategy, settings_of(name))
        engine.load(folder)
        results[f"{name}, resumed"] = {
            "losses": train(engine),
            "all": engine.gather_state(),
            "weights": engine.weights(),
        }
    results["refused"] = [refusal("ddp", Path(out, "local")), refusal("gossip", Path(out, "local"))]
    results["batch norm"] = batch_norm_case()
    if os.environ["RANK"] == "0":
        torch.save(results, Path(out, "results"))
    dist.barrier()
    dist.destroy_process_group()


def job_alone(out: str) -> None:
    """One process: loading a state of two processes, and gossip without neighbors."""
    import torch.distributed as dist

    results: dict = {
        "refused": [
            refusal(strategy, Path(out).parent / "two" / strategy_case)
            for strategy, strategy_case in (("gossip", "gossip AdamW"), ("local", "local"))
        ]
    }
    engine = make_engine("gossip", settings_of("gossip SGD"))
    results["alone"] = {
        "losses": train(engine),
        "weights": engine.weights(),
        "apart": engine.epoch_facts(),
        "said": engine.describe(),
    }
    torch.save(results, Path(out, "results"))
    dist.destroy_process_group()


def refusal(strategy: str, folder: Path) -> str:
    try:
        make_engine(strategy, settings_for()).load(folder)
    except SettingsError as error:
        return str(error)
    return "accepted"


def batch_norm_case() -> dict:
    """Each worker's own statistics stay its own; the mean model has their mean."""
    engine = make_engine("local", settings_for(*DILOCO), with_batch_norm)
    stream = batches(engine)
    engine.train_batch(stream)
    return {"all": engine.gather_state(), "weights": engine.weights()}


# --- the jobs, each once ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("gossip")


@pytest.fixture(scope="module")
def on_two(folder) -> dict:
    return perform(folder / "two", 2, job)


@pytest.fixture(scope="module")
def on_one(folder, on_two) -> dict:
    return perform(folder / "one", 1, job_alone)


def plain_sgd() -> dict:
    return plain_loop(settings_of("gossip SGD"))


# --- the properties -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["gossip SGD", "gossip SGD accumulated", "local SGD"])
def test_sgd_on_the_complete_graph_is_sgd_on_the_global_batch(on_two, case):
    """Also with momentum and weight decay, since both are linear in the gradient."""
    plain, result = plain_sgd(), on_two[case]
    assert result["losses"] == pytest.approx(plain["losses"], abs=1e-6)
    assert largest_difference(result["weights"], plain["weights"]) < 1e-6
    assert result["apart"]["worker_distance"] < 1e-6


def test_gossip_order_adapt_with_combine_applies_each_gradient_to_the_averaged_weights(on_two):
    """D-PSGD's order: workers differ by their last step; weights and losses are not those of the other order."""
    result, other = on_two["gossip SGD, average then step"], on_two["gossip SGD"]
    assert result["apart"]["worker_distance"] > 1e-4 > other["apart"]["worker_distance"]
    assert largest_difference(result["weights"], other["weights"]) > 1e-6
    assert result["losses"][0] == pytest.approx(other["losses"][0], abs=1e-6)


def test_a_local_run_that_averages_in_every_step_is_gossip_on_the_complete_graph(on_two):
    assert on_two["local AdamW"]["losses"] == pytest.approx(on_two["gossip AdamW"]["losses"], abs=1e-6)
    assert largest_difference(on_two["local AdamW"]["weights"], on_two["gossip AdamW"]["weights"]) < 1e-6
    assert max(abs(a - b) for a, b in zip(on_two["local AdamW"]["losses"], plain_sgd()["losses"], strict=True)) > 1e-3


def test_one_process_is_a_plain_loop(on_one):
    plain, result = plain_sgd(), on_one["alone"]
    assert largest_difference(result["weights"], plain["weights"]) < 1e-6
    assert result["apart"] == {"worker_distance": 0.0} and result["said"].startswith("1 worker on the graph complete")


@pytest.mark.parametrize("case", WORKERS)
def test_the_mean_model_is_evaluated_and_saved_and_every_worker_keeps_its_own(on_two, case):
    result = on_two[case]
    mean = {
        name: (result["all"][f"0/weights/{name}"] + result["all"][f"1/weights/{name}"]) / 2
        for name in result["weights"]
    }
    assert largest_difference(result["weights"], mean) < 1e-6 and result["kept"]
    apart = (
        sum((value.double() - mean[name].double()).square().sum() for name, value in own(result["all"], 0).items())
        .sqrt()
        .item()
    )
    assert result["apart"]["worker_distance"] == pytest.approx(
        apart, rel=1e-4, abs=1e-6
    )  # two workers are equally far from their mean
    model = network(settings_for())
    model.load_state_dict(result["weights"])
    images, labels = counted()
    with torch.no_grad():
        scores = model.eval()(images)
    correct, _, seen, loss_sum = result["counts"]
    assert seen == COUNTED
    if "bf16" not in case:
        assert correct == int((scores.argmax(1) == labels).sum())
        assert loss_sum == pytest.approx(F.cross_entropy(scores, labels, reduction="sum").item(), rel=1e-5)


def own(state: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    prefix = f"{rank}/weights/"
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def test_workers_without_exchange_differ(on_two):
    assert on_two["local, one meeting after the last"]["apart"]["worker_distance"] > 0.01
    assert (
        1e-4
        < on_two["local"]["apart"]["worker_distance"]
        < on_two["local, one meeting after the last"]["apart"]["worker_distance"]
    )


@pytest.mark.parametrize("case", WORKERS)
def test_a_stopped_run_resumes_with_the_same_bits(on_two, case):
    """The fourth of ten steps lies between two outer steps of `local`, and inside a window of AccumAdam."""
    resumed, unbroken = on_two[f"{case}, resumed"], on_two[case]
    assert resumed["losses"] == unbroken["losses"][SAVED_AT:]
    assert largest_difference(resumed["all"], unbroken["all"]) == 0
    assert largest_difference(resumed["weights"], unbroken["weights"]) == 0


def test_a_state_of_other_workers_is_rejected_by_name(on_two, on_one):
    for strategy, said in zip(("gossip", "local"), on_one["refused"], strict=True):
        assert (
            f"strategy {strategy} keeps one state per process: this one was saved by 2 processes and cannot "
            "resume with 1" in said
        )
    ddp, gossip = on_two["refused"]
    assert "holds the state of one worker a process, for local, but strategy ddp needs that of one model" in ddp
    assert "holds the state of one worker a process, for local, but strategy gossip needs" in gossip


def test_every_worker_keeps_its_own_batch_norm_statistics(on_two):
    state, weights = on_two["batch norm"]["all"], on_two["batch norm"]["weights"]
    a, b = (state[f"{rank}/weights/0.norm.running_mean"] for rank in (0, 1))
    assert not torch.equal(a, b) and torch.allclose(weights["0.norm.running_mean"], (a + b) / 2, atol=1e-7)
