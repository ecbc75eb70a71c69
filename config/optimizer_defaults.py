"""Parameters of every optimizer with their defaults, which `--set optimizer.params.<name>=` overrides.

`ds_config.json` declares the default optimizer. A preset or `--set optimizer.type=NAME` that names another one starts
from its entry here. Nothing here imports PyTorch; `optim/optimizers.py` builds the optimizers.
"""

from __future__ import annotations

from typing import Any

ADAM = {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8}

OPTIMIZER_PARAMS: dict[str, dict[str, Any]] = {
    "AdamW": {**ADAM, "weight_decay": 0.05},
    "Adam": {**ADAM, "weight_decay": 0.0},  # added to the gradient, not decoupled
    "SGD": {
        "lr": 0.1,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 5e-4,
    },  # residual networks on CIFAR (arXiv 1605.07146)
    # lr and weight_decay are AdamW's, because Muon's updates are scaled to the size of AdamW's (arXiv 2502.16982).
    # matrix_lr_factor multiplies lr for hidden matrices alone; AdamW with betas and eps trains everything else.
    "Muon": {
        "lr": 1e-3,
        "matrix_lr_factor": 1.0,
        "momentum": 0.95,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "weight_decay": 0.05,
        "split_qkv": False,  # orthogonalize the projections of queries, keys and values as three matrices
    },
    "AdamWScheduleFree": {
        "lr": 2.5e-3,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "weight_decay": 0.05,
    },  # lr: the default of the package schedulefree
    "Lamb": {
        "lr": 5e-3,
        "betas": [0.9, 0.999],
        "eps": 1e-6,
        "weight_decay": 0.02,
    },  # ResNets at batch 2048 (arXiv 2110.00476)
    "Lion": {
        "lr": 1e-4,
        "betas": [0.9, 0.99],
        "weight_decay": 0.5,
    },  # a tenth of AdamW's learning rate and ten times its weight decay (arXiv 2302.06675)
}
