"""parallel/gossip.py and parallel/local.py: workers with models of their own.

On the complete graph with SGD they train as one plain loop does; sparser graphs keep the workers' mean and bring them
together; the mean model is what is evaluated; a stopped run goes on with the same bits.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from programs import Program, _check, free_port
from reference import (
    BATCH,
    SAVED_AT,
    STEPS,
    batches,
    counts_of,
    data,
    largest_difference,
    make_engine,
    network,
    perform,
    plain_loop,
    settings_for,
    train,
    with_batch_norm,
)
from torch import Tensor, nn
from torch.nn import functional as F

from parallel.accum_adam import AccumAdam
from parallel.outer import OuterStep
from parallel.topologies import TOPOLOGIES, mixing_matrix, rounds_of
from settings import SettingsError

SGD = ["optimizer.type=SGD", "optimizer.params.lr=0.05", "gradient_clipping=0.0"]
ALONE = ["parallel.local_steps=1", "parallel.outer_lr=1.0", "parallel.outer_momentum=0.0"]
DILOCO = ["parallel.local_steps=3"]
WORKERS = {  # name of a case: strategy, settings, whether the optimiser is SGD
    "gossip SGD": ("gossip", ["parallel.topology=complete"], True),
    "gossip SGD accumulated": ("gossip", ["parallel.topology=complete", "gradient_accumulation_steps=2"], True),
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
        engine.save(folder)
        losses += train(engine)
        before, apart = engine.state_tensors(keep=True), engine.epoch_facts()
        results[name] = {"losses": losses, "counts": counts_of(engine), "weights": engine.weights(), "apart": apart,
                         "kept": largest_difference(before, engine.state_tensors(keep=True)) == 0, "all": engine.gather_state()}
        dist.barrier()
        engine = make_engine(strategy, settings_of(name))
        engine.load(folder)
        results[f"{name}, resumed"] = {"losses": train(engine), "all": engine.gather_state(), "weights": engine.weights()}
    results["refused"] = [refusal("ddp", Path(out, "local")), refusal("gossip", Path(out, "local"))]
    results["batch norm"] = batch_norm_case()
    if os.environ["RANK"] == "0":
        torch.save(results, Path(out, "results"))
    dist.barrier()
    dist.destroy_process_group()


def job_alone(out: str) -> None:
    """One process: what it makes of a state of two, and a gossip with nobody."""
    import torch.distributed as dist

    results: dict = {"refused": [refusal(strategy, Path(out).parent / "two" / strategy_case)
                                 for strategy, strategy_case in (("gossip", "gossip AdamW"), ("local", "local"))]}
    engine = make_engine("gossip", settings_of("gossip SGD"))
    results["alone"] = {"losses": train(engine), "weights": engine.weights(), "apart": engine.epoch_facts(), "said": engine.describe()}
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


def job_mixing(out: str) -> None:
    """A number a worker, through one period of rounds of every topology, over the groups that an engine makes."""
    import torch.distributed as dist

    from parallel import processes
    from parallel.buffers import mean_over
    from parallel.gossip import join_groups

    processes.join()
    results = {}
    for name in TOPOLOGIES:
        value = torch.tensor([float(dist.get_rank() ** 2)])
        for group in join_groups(rounds_of(name, dist.get_world_size(), 2)):
            (value,) = mean_over([value], group)
        results[name] = processes.collect({"value": value})
    if dist.get_rank() == 0:
        torch.save(results, Path(out, "results"))
    dist.barrier()
    dist.destroy_process_group()


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
def test_sgd_with_everybody_in_every_step_is_sgd_on_the_global_batch(on_two, case):
    """With momentum and weight decay too: all of it is linear in the gradient."""
    plain, result = plain_sgd(), on_two[case]
    assert result["losses"] == pytest.approx(plain["losses"], abs=1e-6)
    assert largest_difference(result["weights"], plain["weights"]) < 1e-6
    assert result["apart"]["worker_distance"] < 1e-6


def test_a_local_run_that_averages_in_every_step_is_gossip_on_the_complete_graph(on_two):
    assert on_two["local AdamW"]["losses"] == pytest.approx(on_two["gossip AdamW"]["losses"], abs=1e-6)
    assert largest_difference(on_two["local AdamW"]["weights"], on_two["gossip AdamW"]["weights"]) < 1e-6
    assert max(abs(a - b) for a, b in zip(on_two["local AdamW"]["losses"], plain_sgd()["losses"], strict=True)) > 1e-3


def test_one_process_is_a_plain_loop(on_one):
    plain, result = plain_sgd(), on_one["alone"]
    assert largest_difference(result["weights"], plain["weights"]) < 1e-6
    assert result["apart"] == {"worker_distance": 0.0} and result["said"].startswith("1 worker on the graph complete")


@pytest.mark.parametrize("case", WORKERS)
def test_the_mean_model_is_counted_and_handed_over_and_every_worker_keeps_its_own(on_two, case):
    result = on_two[case]
    mean = {name: (result["all"][f"0/weights/{name}"] + result["all"][f"1/weights/{name}"]) / 2 for name in result["weights"]}
    assert largest_difference(result["weights"], mean) < 1e-6 and result["kept"]
    apart = sum((value.double() - mean[name].double()).square().sum() for name, value in own(result["all"], 0).items()).sqrt().item()
    assert result["apart"]["worker_distance"] == pytest.approx(apart, rel=1e-4, abs=1e-6)  # two workers are equally far from their mean
    model = network(settings_for())
    model.load_state_dict(result["weights"])
    images, labels = (part.flatten(0, 1) for part in data())
    with torch.no_grad():
        scores = model.eval()(images)
    correct, _, seen, loss_sum = result["counts"]
    assert seen == STEPS * BATCH
    if "bf16" not in case:
        assert correct == int((scores.argmax(1) == labels).sum())
        assert loss_sum == pytest.approx(F.cross_entropy(scores, labels, reduction="sum").item(), rel=1e-5)


def own(state: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    prefix = f"{rank}/weights/"
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def test_workers_that_do_not_meet_are_apart(on_two):
    assert on_two["local, one meeting after the last"]["apart"]["worker_distance"] > 0.01
    assert 1e-4 < on_two["local"]["apart"]["worker_distance"] < on_two["local, one meeting after the last"]["apart"]["worker_distance"]


@pytest.mark.parametrize("case", WORKERS)
def test_a_run_that_was_stopped_goes_on_with_the_same_bits(on_two, case):
    """The fourth of ten steps lies between two meetings of `local`, and inside a window of AccumAdam."""
    resumed, unbroken = on_two[f"{case}, resumed"], on_two[case]
    assert resumed["losses"] == unbroken["losses"][SAVED_AT:]
    assert largest_difference(resumed["all"], unbroken["all"]) == 0
    assert largest_difference(resumed["weights"], unbroken["weights"]) == 0


def test_a_state_of_other_workers_is_refused_by_name(on_two, on_one):
    for strategy, said in zip(("gossip", "local"), on_one["refused"], strict=True):
        assert f"strategy {strategy} keeps a state for each process: this one was saved by 2 processes and cannot go on with 1" in said
    ddp, gossip = on_two["refused"]
    assert "holds the state of one worker a process, for local, strategy ddp has that of one model" in ddp
    assert "holds the state of one worker a process, for local, strategy gossip has" in gossip


def test_every_worker_keeps_its_own_batch_norm_statistics(on_two):
    state, weights = on_two["batch norm"]["all"], on_two["batch norm"]["weights"]
    a, b = (state[f"{rank}/weights/0.norm.running_mean"] for rank in (0, 1))
    assert not torch.equal(a, b) and torch.allclose(weights["0.norm.running_mean"], (a + b) / 2, atol=1e-7)


# --- who averages with whom ---------------------------------------------------------------------------------------


def machines(name: str, workers: int) -> list[int]:
    """Workers a machine that a topology can be tried with."""
    if name != "alternating_exponential_ring":
        return [workers]
    return [size for size in (1, 2, 3) if workers % size == 0 and workers // size in (2, 4, 8)]


@pytest.mark.parametrize("name", TOPOLOGIES)
@pytest.mark.parametrize("workers", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16])
def test_every_round_keeps_the_mean_and_many_rounds_bring_all_together(name, workers):
    for per_machine in machines(name, workers):
        product = torch.eye(workers, dtype=torch.float64)
        rounds = rounds_of(name, workers, per_machine)
        for groups in rounds:
            assert sorted(worker for group in groups for worker in group) == list(range(workers))
            matrix = mixing_matrix(groups)
            ones = torch.ones(workers, dtype=torch.float64)
            assert torch.allclose(matrix.sum(0), ones) and torch.allclose(matrix.sum(1), ones) and (matrix >= 0).all()
            product = matrix @ product
        mean = torch.full_like(product, 1 / workers)
        assert torch.allclose(torch.linalg.matrix_power(product, 200), mean, atol=1e-6)
        if name in ("complete", "one_peer_exponential", "alternating_exponential_ring") and workers in (1, 2, 4, 8, 16):
            assert torch.allclose(product, mean)  # after one period already


def test_the_known_graphs():
    assert rounds_of("ring", 4, 4) == [[[0, 1], [2, 3]], [[1, 2], [0, 3]]]
    assert rounds_of("ring", 3, 3) == [[[0, 1], [2]], [[1, 2], [0]], [[0, 2], [1]]]
    assert rounds_of("one_peer_exponential", 4, 4) == [[[0, 1], [2, 3]], [[0, 2], [1, 3]]]
    # of two pairs of machines, one averages at home while the other sends
    assert rounds_of("alternating_exponential_ring", 8, 2)[:2] == [
        [[0, 1], [2, 3], [4, 5, 6, 7]], [[0, 1, 2, 3], [4, 5], [6, 7]]]


@pytest.mark.parametrize(("workers", "per_machine"), [(4, 4), (6, 2), (5, 2)])
def test_alternating_rings_need_a_power_of_two_of_machines(workers, per_machine):
    with pytest.raises(SettingsError, match="needs 2, 4, 8, ... machines"):
        rounds_of("alternating_exponential_ring", workers, per_machine)


def test_four_processes_mix_as_the_matrices_say(folder):
    out = folder / "four"
    out.mkdir()
    meeting = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [Program(job_mixing, (str(out),), {**meeting, "RANK": str(i), "LOCAL_RANK": str(i % 2)}) for i in range(4)]
    for done in [rank.end() for rank in ranks]:
        _check(done, 0)
    results = torch.load(out / "results", weights_only=False)
    for name in TOPOLOGIES:
        values = torch.arange(4, dtype=torch.float64) ** 2
        for groups in rounds_of(name, 4, 2):
            values = mixing_matrix(groups) @ values
        assert torch.tensor([part["value"] for part in results[name]]).double() == pytest.approx(values), name


# --- the optimisers -----------------------------------------------------------------------------------------------


def steps_of(make, gradients: Tensor) -> Tensor:
    x = nn.Parameter(torch.linspace(-1, 1, 5))
    optimizer = make([x])
    for gradient in gradients:
        x.grad = gradient.clone()
        optimizer.step()
    return x.detach()


@pytest.mark.parametrize("decoupled", [True, False])
def test_accumadam_with_a_window_of_one_is_adam(decoupled):
    gradients = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    settings = dict(lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    plain = steps_of(lambda p: (torch.optim.AdamW if decoupled else torch.optim.Adam)(p, **settings), gradients)
    ours = steps_of(lambda p: AccumAdam(p, **settings, window=1, decoupled=decoupled), gradients)
    assert torch.allclose(plain, ours, atol=1e-6)


def test_accumadam_follows_its_algorithm():
    """Algorithm 4 of arXiv 2410.11998, appendix C, written out with numbers: a window of 3, 8 steps."""
    gradients = torch.randn(8, 5, generator=torch.Generator().manual_seed(1)).double()
    lr, b1, b2, eps, window = 0.01, 0.9, 0.99, 1e-8, 3
    x, m, v, g_sum = torch.linspace(-1, 1, 5).double(), 0.0, 0.0, 0.0
    for t, g in enumerate(gradients, start=1):
        g_sum = g_sum + g
        m_hat, v_hat = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        s = (t + window - 1) // window
        x = x - lr * (m_hat / (1 - b1**s)) / ((v_hat / (1 - b2**s)).sqrt() + eps)
        if t % window == 0:
            m, v, g_sum = b1 * m + (1 - b1) * g_sum / window, b2 * v + (1 - b2) * (g_sum / window) ** 2, 0.0
    ours = steps_of(lambda p: AccumAdam(p, lr=lr, betas=(b1, b2), eps=eps, weight_decay=0.0, window=window, decoupled=True), gradients.float())
    assert torch.allclose(ours.double(), x, atol=1e-6)


def test_the_outer_step_is_nesterovs():
    """DiLoCo's default: v <- 0.9 v + d, theta <- theta - 0.7 (d + 0.9 v), d the way the workers have come, backwards."""
    start, means = torch.tensor([1.0, 2.0]), [torch.tensor([0.5, 2.5]), torch.tensor([0.2, 2.0])]
    outer = OuterStep({"w": start}, learning_rate=0.7, momentum=0.9)
    theta, v = start, torch.zeros(2)
    for i, mean in enumerate(means):
        d = theta - mean
        v = d if i == 0 else 0.9 * v + d
        theta = theta - 0.7 * (d + 0.9 * v)
        (now,) = outer.step([mean])
        assert torch.allclose(now, theta)
    again = OuterStep({"w": start}, learning_rate=0.7, momentum=0.9)
    again.set_state(outer.state())
    assert torch.equal(again.step([start])[0], outer.step([start])[0])
