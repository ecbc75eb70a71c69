"""Optimizer registry, by the names in `ds_config.json`, and building an optimizer over the parameter groups.

To add one, write a line in OPTIMIZERS and one in `config/optimizer_defaults.py`, which lists its parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import SettingsError
from config.own_parts import find_entry
from config.settings import Settings
from optim.late_dynamo import postpone_dynamo
from optim.lr_schedule import Schedule
from optim.muon import Muon
from optim.param_groups import Groups, parameter_groups

for owner in (torch.optim.Optimizer, torch.optim.Adam, torch.optim.SGD):  # AdamW has Adam's step
    postpone_dynamo(owner)


def adamw(groups: Groups, **params: Any) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay (arXiv 1711.05101); implementation: PyTorch."""
    return torch.optim.AdamW(groups, **params)


def adam(groups: Groups, **params: Any) -> torch.optim.Optimizer:
    """Adam as published, with L2 weight decay added to the gradient (arXiv 1412.6980); implementation: PyTorch."""
    return torch.optim.Adam(groups, **params)


def sgd(groups: Groups, **params: Any) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum; implementation: PyTorch."""
    return torch.optim.SGD(groups, **params)


def muon(groups: Groups, **params: Any) -> torch.optim.Optimizer:
    """Orthogonalized momentum for hidden matrices (arXiv 2502.16982), AdamW for all other parameters."""
    return Muon(groups, **params)


def adamw_schedule_free(groups: Groups, **params: Any) -> torch.optim.Optimizer:
    """Schedule-free AdamW: averages iterates instead of LR decay (arXiv 2405.15682); implementation: schedulefree."""
    import schedulefree

    class AdamWScheduleFree(schedulefree.AdamWScheduleFree):
        """Skips empty groups: ZeRO stage 3 steps one group at a time, which the package counts as a step of all."""

        param_groups: list[dict[str, Any]]

        def step(self, closure: None = None) -> None:
            groups = self.param_groups
            self.param_groups = [group for group in groups if group["params"]]
            super().step()
            self.param_groups = groups

    optimizer = AdamWScheduleFree(groups, **params)
    optimizer.train()  # permanently: see `averaged_weights`
    return optimizer


def lamb(groups: Groups, **params: Any) -> torch.optim.Optimizer:
    """LAMB: Adam with layer-wise trust ratio, for large batches (arXiv 1904.00962); implementation: timm."""
    from timm.optim import Lamb

    return Lamb(groups, max_grad_norm=None, **params)  # the setting gradient_clipping clips


def lion(groups: Groups, **params: Any) -> torch.optim.Optimizer:
    """Lion: the sign of the momentum times the learning rate (arXiv 2302.06675); implementation: timm."""
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
FUSED = ("AdamW", "Adam", "SGD", "Muon")  # have a fused implementation, which updates all parameters in one kernel
NEEDS_FULL_TENSORS = ("Lamb",)  # use norms of whole parameters, so they cannot run on flat shards
# Count steps per group, so no step may be skipped (see `restore_counters`).
COUNTS_OWN_STEPS = ("Lamb", "AdamWScheduleFree")
AVERAGES_WEIGHTS = ("AdamWScheduleFree",)  # keep an average of the weights, which is evaluated


def build_optimizer(config: dict[str, Any], model: nn.Module, fused: bool) -> torch.optim.Optimizer:
    """Return the optimizer of the section `optimizer` of `ds_config.json` over the parameter groups of `model`.

    DeepSpeed gets PyTorch's optimizers too: its own fused ones compile a CUDA extension at first use, which needs nvcc,
    and it treats "Adam" as AdamW. `fused` selects the single-kernel implementation where there is one (GPU only).

    Raises:
        SettingsError: an unknown type, or parameters that the optimizer rejects.
    """
    name, params = config["type"], dict(config["params"])
    make = find_entry(OPTIMIZERS, "optimizer.type", name)
    for key, value in (("lr", params.get("lr")), ("weight_decay", params.get("weight_decay", 0.0))):
        if not isinstance(value, (int, float)):  # of a user-defined optimizer
            raise SettingsError(
                f"optimizer.type={name} needs an argument {key} with a number as default, such as {key}: float = 1e-3"
            )
    if "betas" in params:
        params["betas"] = tuple(params["betas"])
        if name in AVERAGES_WEIGHTS and params["betas"][0] == 0:  # see `averaged_weights`
            raise SettingsError(
                f"optimizer.type={name} needs a first number above 0 in optimizer.params.betas, got "
                f"{list(params['betas'])}: with 0 the trained weights do not contain their average. Set it to 0.9"
            )
    split_qkv = params.pop("split_qkv", False)  # only Muon has it
    groups = parameter_groups(model, params["lr"], params.get("weight_decay", 0.0), name == "Muon", split_qkv)
    try:
        return make(groups, **params, **({"fused": True} if fused and name in FUSED else {}))
    except (TypeError, ValueError) as error:
        raise SettingsError(f"optimizer.type={name} rejects optimizer.params: {error}. Correct them") from error


def describe_groups(config: dict[str, Any], model: nn.Module) -> str:
    """Return the parameter groups as a text table: optimizer, learning rate, weight decay, sizes, first names."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rows = [("optimizer", "lr", "weight decay", "tensors", "parameters", "for example")]
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


# --- optimizers that average the weights ------------------------------------------------------------------------------


def averaged_weights(optimizer: torch.optim.Optimizer, tensors: list[Tensor]) -> list[Tensor] | None:
    """Return the averages to evaluate instead of `tensors`; None for an optimizer that keeps no average.

    Schedule-free training updates y = (1 - beta) z + beta x and evaluates x. The package's `eval()` turns y into x in
    place and `train()` back, which rounds. Here y is left unchanged, so that evaluation does not affect training.
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
    """Return the scalar optimizer states, such as Adam's `step`, as the maximum over all tensors.

    The counted tensors all have the same value, the maximum. A tensor without a counter, such as one trained by Muon,
    keeps the value that it was restored with.
    """
    found: dict[str, Tensor] = {}
    for key, value in (item for state in states for item in state.items()):
        if not torch.is_tensor(value) or not value.ndim:
            number = torch.as_tensor(value).detach().cpu()
            found[key] = torch.maximum(found.get(key, number), number)
    return found


def restore_counters(optimizer: torch.optim.Optimizer, step: int, schedule: Schedule) -> None:
    """Set the counters that an optimizer keeps per group, not per parameter, to their values after `step` steps.

    They follow from the step and the learning rates, so they are not part of a checkpoint.
    """
    for group in optimizer.param_groups if step and type(optimizer).__name__ in COUNTS_OWN_STEPS else ():
        if type(optimizer).__name__ == "Lamb":
            group["step"] = torch.tensor(float(step))
        else:
            group["k"], group["lr_max"], group["weight_sum"] = step, -1.0, 0.0
            for done in range(step):  # same sums in the same order, so bitwise equal
                group["lr_max"] = max(group["initial_lr"] * schedule(done), group["lr_max"])
                group["weight_sum"] += group["lr_max"] ** group["weight_lr_power"]


def check_optimizer(settings: Settings, strategy: str, own_average_refusal: str | None = None) -> None:
    """Raise SettingsError if the optimizer conflicts with other settings.

    `own_average_refusal` is the reason why the strategy does not support an optimizer that averages the weights.
    """
    name = settings.engine["optimizer"]["type"]
    if name not in AVERAGES_WEIGHTS:
        return
    if own_average_refusal:
        raise SettingsError(f"strategy {strategy} does not support optimizer.type={name}: {own_average_refusal}")
    if settings.ema.decay:
        raise SettingsError(
            f"optimizer.type={name} averages the weights itself. Set ema.decay=0, not {settings.ema.decay}"
        )
    if settings.schedule.shape != "constant":
        raise SettingsError(
            f"optimizer.type={name} needs a constant learning rate after the warmup, got schedule.shape="
            f"{settings.schedule.shape}. Add --set schedule.shape=constant"
        )
