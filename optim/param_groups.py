"""Parameter groups for the optimizer, the same for every engine."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import nn

from common.errors import SettingsError

Groups = list[dict[str, Any]]


def parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float, find_hidden: bool = False, split_rows: bool = False
) -> Groups:
    """Return the trainable parameters, grouped by weight decay and learning rate; with `find_hidden` also by `hidden`.

    Weight decay does not apply to vectors and scalars (norms, biases, temperatures). A module may set more for its own
    parameters: `no_weight_decay`, a set of names, and `learning_rate_factors`, a dictionary from name to factor.
    As in timm, `no_weight_decay` may be a method that returns the names, also those of parameters of submodules.
    Each group has its `initial_lr`, which the schedule multiplies.

    Hidden parameters are the weights of linear maps and of convolutions that mix channels. Excluded are modules marked
    `is_input_or_output_layer`, which read the images or return the scores; a submodule of one that does neither sets
    `is_input_or_output_layer = False`. A module with matrices of its own names them in `muon_matrices`.

    With `split_rows`, hidden weights of modules with `row_splits` (queries, keys, values in one weight) have groups of
    their own with the same `row_splits`. Weights may be sharded, so the numbers belong to the group. Hidden kernels of
    `nn.Conv1d` have groups with `is_conv1d`, because their shape could also be that of a stack of matrices.

    Raises:
        SettingsError: `row_splits` that do not add up to the rows of a weight.
    """
    groups: dict[tuple, list[nn.Parameter]] = defaultdict(list)
    grouped: set[int] = set()  # ids; several modules may share a parameter
    edges = _marked(model, True) - _marked(model, False)
    undecayed = _without_weight_decay(model)
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in grouped:
                grouped.add(id(parameter))
                decays = parameter.ndim >= 2 and id(parameter) not in undecayed
                factor = getattr(module, "learning_rate_factors", {}).get(name, 1.0)
                hidden = find_hidden and id(module) not in edges and _is_matrix(module, name)
                splits = tuple(getattr(module, "row_splits", ())) if split_rows and hidden else ()
                if splits and sum(splits) != (rows := parameter.shape[0]):
                    raise SettingsError(
                        f"row_splits={splits} of layer {path} must add up to the {rows} rows of its {name}"
                    )
                is_conv1d = hidden and isinstance(module, nn.Conv1d)
                groups[hidden, weight_decay if decays else 0.0, factor, splits, is_conv1d].append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": decay,
            "lr": learning_rate * factor,
            "initial_lr": learning_rate * factor,
            **({"hidden": hidden} if find_hidden else {}),
            **({"row_splits": splits} if splits else {}),
            **({"is_conv1d": True} if is_conv1d else {}),
        }
        for (hidden, decay, factor, splits, is_conv1d), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def _without_weight_decay(model: nn.Module) -> set[int]:
    """Return the ids of all parameters that modules name in `no_weight_decay`."""
    found = set()
    for module in model.modules():
        names: Any = getattr(module, "no_weight_decay", ())
        parameters = dict(module.named_parameters(remove_duplicate=False)) if names else {}
        found |= {id(parameters[name]) for name in (names() if callable(names) else names) if name in parameters}
    return found


def _marked(model: nn.Module, is_input_or_output_layer: bool) -> set[int]:
    """Return the ids of all modules inside those whose `is_input_or_output_layer` has this value."""
    return {
        id(inner)
        for module in model.modules()
        if getattr(module, "is_input_or_output_layer", None) is is_input_or_output_layer
        for inner in module.modules()
    }


def _is_matrix(module: nn.Module, name: str) -> bool:
    """Return whether a parameter of a module is a matrix that Muon may train."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return name == "weight" and module.groups == 1  # a depthwise kernel mixes no channels
    return name == "weight" if isinstance(module, nn.Linear) else name in getattr(module, "muon_matrices", ())
