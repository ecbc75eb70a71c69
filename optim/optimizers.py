"""Optimisers by the name that `ds_config.json` gives, and the parameter groups that every engine hands them.

To add one, write a line in OPTIMIZERS and one in `config/optimizer_defaults.py`, which holds what it may be given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import SettingsError, unknown
from config.settings import Settings
from optim.lr_schedule import Schedule
from optim.muon import Muon
from optim.param_groups import Groups, parameter_groups


def adamw(groups: Groups, **params: Any) -> torch.optim.Optimizer:
    """Adam with the weight decay beside the gradient, not inside it (arXiv 1711.05101); PyTorch's."""
    return torch.optim.AdamW(groups, **params)


def adam(groups: Groups, **params: Any) -> torch.optim.Optimizer:
    """Adam as it was published, the decay added to the gradient (arXiv 1412.6980); PyTorch's."""
    return torch.optim.Adam(groups, **params)


def sgd(groups: Groups, **params: Any) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum; PyTorch's."""
    return torch.optim.SGD(groups, **params)


def muon(groups: Groups, **params: Any) -> torch.optim.Optimizer:
    """Hidden matrices move by an orthogonalised momentum (arXiv 2502.16982), all else by AdamW; `optim/muon.py`."""
    return Muon(groups, **params)


def adamw_schedule_free(groups: Groups, **params: Any) -> torch.optim.Optimizer:
    """Averages its own steps in place of a falling rate (arXiv 2405.15682), and that is evaluated; its authors' package."""
    import schedulefree

    class AdamWScheduleFree(schedulefree.AdamWScheduleFree):
        """ZeRO's stage 3 steps one group after the other, the rest left empty; the package counts that as a step of all."""

        def step(self, closure: None = None) -> None:
            groups = self.param_groups
            self.param_groups = [group for group in groups if group["params"]]
            super().step()
            self.param_groups = groups

    optimizer = AdamWScheduleFree(groups, **params)
    optimizer.train()  # for good: see `averaged_weights`
    return optimizer


def lamb(groups: Groups, **params: Any) -> torch.optim.Optimizer:
    """Adam with the step scaled to each parameter's norm, for large batches (arXiv 1904.00962); timm's."""
    from timm.optim import Lamb

    return Lamb(groups, max_grad_norm=None, **params)  # clipping is `gradient_clipping`'s business


def lion(groups: Groups, **params: Any) -> torch.optim.Optimizer:
    """Every number moves by the rate, in the direction of its momentum's sign (arXiv 2302.06675); timm's."""
    from timm.optim import Lion

    return Lion(groups, **params)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": adamw,
    "Adam": adam,
    "SGD": sgd,
    "Muon": muon,
    "AdamWScheduleFree": adamw_schedule_free,
    "Lamb": lamb,
    "Lion": lion,
}
FUSED = ("AdamW", "Adam", "SGD", "Muon")  # have a form that updates all parameters in one kernel
NEEDS_FULL_TENSORS = ("Lamb",)  # look at the norm of whole parameters, so they must not be handed pieces
COUNTS_OWN_STEPS = (
    "Lamb",
    "AdamWScheduleFree",
)  # count steps themselves, so a step must not be left out (see `restore_counters`)
AVERAGES_WEIGHTS = ("AdamWScheduleFree",)  # keep an average of the weights, and evaluate that


def build_optimizer(config: dict[str, Any], model: nn.Module, fused: bool) -> torch.optim.Optimizer:
    """The optimiser of the `optimizer` section of `ds_config.json`, over the model's parameter groups.

    PyTorch's own optimisers, in DeepSpeed too: DeepSpeed's fused ones compile a CUDA extension at first use, which needs
    nvcc, and read "Adam" as AdamW. `fused` asks for the single-kernel form where there is one (GPU only).

    Raises:
        SettingsError: an unknown type, or parameters that it does not take.
    """
    name, params = config["type"], dict(config["params"])
    if name not in OPTIMIZERS:
        raise SettingsError(unknown("optimizer.type", name, list(OPTIMIZERS)))
    if "betas" in params:
        params["betas"] = tuple(params["betas"])
    groups = parameter_groups(model, params["lr"], params["weight_decay"], find_hidden=name == "Muon")
    try:
        return OPTIMIZERS[name](groups, **params, **({"fused": True} if fused and name in FUSED else {}))
    except (TypeError, ValueError) as error:
        raise SettingsError(f"optimizer.type={name} does not take optimizer.params as they stand: {error}") from error


def describe_groups(config: dict[str, Any], model: nn.Module) -> str:
    """The groups as a table for the screen: who trains them, rate, decay, tensors, numbers, and the first names of each."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rows = [("trained by", "rate", "decay", "tensors", "parameters", "such as")]
    for group in build_optimizer(config, model, fused=False).param_groups:
        by = "AdamW" if config["type"] == "Muon" and not group["hidden"] else config["type"]
        rate = group["initial_lr"] * (config["params"]["matrix_lr_factor"] if group.get("hidden") else 1)
        members = group["params"]
        shown = ", ".join(names[id(parameter)] for parameter in members[:3]) + (", ..." if len(members) > 3 else "")
        rows.append(
            (
                by,
                f"{rate:g}",
                f"{group['weight_decay']:g}",
                str(len(members)),
                f"{sum(p.numel() for p in members):,}",
                shown,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


# --- optimisers that average ----------------------------------------------------------------------------------------


def averaged_weights(optimizer: torch.optim.Optimizer, tensors: list[Tensor]) -> list[Tensor] | None:
    """What an optimiser that averages wants evaluated in the place of `tensors`, which it updates; None for one that does not.

    Schedule-free training moves y = (1 - beta) z + beta x and evaluates x. The package's own `eval()` turns y into x in
    place and `train()` back, which rounds; here the caller keeps y, so that an evaluation leaves no trace in the training.
    """
    if type(optimizer).__name__ not in AVERAGES_WEIGHTS:
        return None
    beta = optimizer.defaults["betas"][0]
    with torch.no_grad():
        return [
            y.lerp(optimizer.state[y]["z"], 1 - 1 / beta) if "z" in optimizer.state.get(y, {}) else y.clone()
            for y in tensors
        ]


def scalars_of(states: Iterable[dict[str, Any]]) -> dict[str, Tensor]:
    """States that are one number for a whole tensor, such as Adam's `step`: the same for all tensors that are counted for.

    The largest is theirs: a tensor that nothing counts for, such as one of Muon's, keeps the number that it was restored with.
    """
    found: dict[str, Tensor] = {}
    for key, value in (item for state in states for item in state.items()):
        if not torch.is_tensor(value) or not value.ndim:
            number = torch.as_tensor(value).detach().cpu()
            found[key] = torch.maximum(found.get(key, number), number)
    return found


def restore_counters(optimizer: torch.optim.Optimizer, step: int, schedule: Schedule) -> None:
    """What an optimiser counts for each group rather than each parameter, as it stands after `step` steps.

    It follows from the step and the learning rates, so it is no part of a checkpoint.
    """
    for group in optimizer.param_groups if step and type(optimizer).__name__ in COUNTS_OWN_STEPS else ():
        if type(optimizer).__name__ == "Lamb":
            group["step"] = torch.tensor(float(step))
        else:
            group["k"], group["lr_max"], group["weight_sum"] = step, -1.0, 0.0
            for done in range(step):  # the same sums in the same order, hence the same bits
                group["lr_max"] = max(group["initial_lr"] * schedule(done), group["lr_max"])
                group["weight_sum"] += group["lr_max"] ** group["weight_lr_power"]


def check_optimizer(settings: Settings, strategy: str, own_average_refusal: str | None = None) -> None:
    """Raises SettingsError where the optimiser does not go with the other settings; `own_average_refusal`: why not with this strategy."""
    name = settings.engine["optimizer"]["type"]
    if name not in AVERAGES_WEIGHTS:
        return
    if own_average_refusal:
        raise SettingsError(f"strategy {strategy} does not go with optimizer.type={name}: {own_average_refusal}")
    if settings.ema.decay:
        raise SettingsError(f"optimizer.type={name} keeps an average of the weights itself; leave ema.decay at 0")
    if settings.schedule.shape != "constant":
        raise SettingsError(
            f"optimizer.type={name} averages in place of a falling learning rate; give it --set schedule.shape=constant "
            f"(now {settings.schedule.shape}), with a warm-up"
        )
