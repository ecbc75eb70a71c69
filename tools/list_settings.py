"""Every setting: its path, its value, what it means.

python train.py --list-settings --preset cpu
"""

from __future__ import annotations

import re
from typing import Any

from common.paths import PROJECT
from config.catalog import NAME_TABLES, names_of, setting_paths
from config.settings import resolve

# What stands neither in a comment of config/settings.py nor in a table.
MEANINGS = {
    "epochs": "passes over the training split",
    "train_batch_size": "images of one optimiser step, over all processes",
    "gradient_accumulation_steps": "parts that a process cuts its share of the batch into, one after the other",
    "gradient_clipping": "largest norm of the gradient; 0: no clipping",
    "optimizer.type": "AdamW, Adam, SGD, ...: a name of optim/optimizers.py",
    "optimizer.params.lr": "learning rate at its highest",
    "optimizer.params.betas": "decay of the means of gradient and square",
    "optimizer.params.eps": "added to the root of the mean square",
    "optimizer.params.momentum": "decay of the mean of the gradient",
    "optimizer.params.nesterov": "step from where the momentum leads",
    "optimizer.params.matrix_lr_factor": "of the rate, for the matrices that Muon trains",
    "optimizer.params.weight_decay": "of matrices and filters; biases, norms, positions and class tokens have none",
    "bf16.enabled": "compute in bfloat16, keep fp32 weights; autocast: zero too; auto: where the device is faster",
    "zero_optimization.stage": "what the processes share: 0 nothing, 1 optimiser states, 2 and gradients, 3 and weights",
    "zero_optimization.offload_optimizer.device": "none, or cpu: where the optimiser's states live",
}


def list_settings(preset: str | None, overrides: list[str]) -> int:
    """Print the path, the value and the meaning of every setting, as `python train.py --list-settings` does."""
    settings = resolve(preset, overrides)
    tree: dict[str, Any] = settings.as_dict()
    tree |= tree.pop("engine")
    meanings = MEANINGS | comments() | {path: ", ".join(names_of(path)) for path in NAME_TABLES}
    group = None
    for path in sorted(setting_paths(settings), key=lambda path: "." in path):  # those without a group first
        head = path.partition(".")[0] if "." in path else ""
        if head != group:
            print(f"\n{head or 'the whole run'}")
            group = head
        if path.endswith("_options"):
            chosen = ", ".join(f"{name}={_shown(option)}" for name, option in _value(tree, path).items())
            path, value, meaning = f"{path}.NAME", chosen, "options of that part: python model.py lists them"
        else:
            value, meaning = _shown(_value(tree, path)), meanings.get(path, "")
        print(f"  {path:42} {value:16} {meaning}".rstrip())
    return 0


def _value(tree: Any, path: str) -> Any:
    """The value at a path; None for an option that the chosen part does not have."""
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _shown(value: Any) -> str:
    """A value as one would type it after `--set path=`."""
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return (
        f"{value:.4g}"
        if isinstance(value, float)
        else str(value).lower()
        if isinstance(value, bool)
        else "-"
        if value is None
        else str(value)
    )


def comments() -> dict[str, str]:
    """The comment that stands behind each field of the classes in config/settings.py, by the path of the setting."""
    found, group = {}, ""
    for line in (PROJECT / "config/settings.py").read_text(encoding="utf-8").splitlines():
        if match := re.match(r"class (\w+?)(Settings)?:", line):
            group = (
                f"{match[1].lower()}." if match[2] else ""
            )  # ModelSettings are the group `model`, Settings the whole
        elif match := re.match(r"    (\w+): .*?  # (.*)", line):
            found[f"{group}{match[1]}"] = match[2]
    return found
