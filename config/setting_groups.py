"""The declarations: every setting with its default, description, unit, range and choices, once.

`config/settings.py` combines these groups and checks values against them. `python train.py --list-settings` and
`python tools/list_settings.py --markdown` print them. Nothing here imports PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from config.optimizer_defaults import OPTIMIZER_PARAMS
from config.own_parts import is_own_part
from config.schema import Declared, setting

# Settings of the schedule that only some shapes use; all shapes use the settings of the warmup.
SHAPES_USING = {
    "final_factor": ("cosine", "linear", "trapezoid"),
    "hold_fraction": ("cosine", "linear", "trapezoid"),
    "cooldown_fraction": ("trapezoid",),
    "milestones": ("step",),
    "milestone_factor": ("step",),
}
OPTIONS = "options of the chosen entry; `python model.py` lists them"


@dataclass
class ModelSettings:
    """The network. `python model.py` lists the names that each component registry knows."""

    architecture: str = setting("vit", "network architecture", table=("models/published/table.py", "ARCHITECTURES"))
    patch: int = setting(4, "side of a square patch, in pixels", "[1, 1024]")
    width: int = setting(512, "embedding dimension (d_model, C)", "[1, 65536]")
    depth: int = setting(4, "number of transformer blocks", "[1, 1000]")
    heads: int = setting(6, "number of attention heads (H)", "[1, 1024]")
    head_size: int = setting(64, "dimension of one attention head (D)", "[1, 4096]")
    patch_embedding: str = setting("spt", "patch embedding", table=("models/patch_embedding.py", "PATCH_EMBEDDINGS"))
    position: str = setting("learned", "positional embedding", table=("models/position.py", "POSITIONS"))
    block: str = setting("pre_norm", "layout of a transformer block", table=("model.py", "BLOCKS"))
    attention: str = setting("lsa", "attention module", table=("models/attention.py", "ATTENTIONS"))
    feed_forward: str = setting("mlp", "feed-forward module", table=("models/feed_forward.py", "FEED_FORWARDS"))
    pooling: str = setting(
        "class_token",
        "token pooling: turns the tokens into one vector that is classified",
        table=("models/pooling.py", "POOLINGS"),
    )
    architecture_options: dict[str, Any] = setting({}, "options of a user-defined network, `FILE.py:NAME`")
    patch_embedding_options: dict[str, Any] = setting({}, OPTIONS)
    position_options: dict[str, Any] = setting({}, OPTIONS)
    block_options: dict[str, Any] = setting({}, OPTIONS)
    attention_options: dict[str, Any] = setting({}, OPTIONS)
    feed_forward_options: dict[str, Any] = setting({"hidden": 256}, OPTIONS)
    pooling_options: dict[str, Any] = setting({}, OPTIONS)
    dropout: float = setting(0.1, "dropout probability", "[0, 1)")
    layer_scale: float = setting(
        0.0, "initial value of the learned per-channel factor of every residual branch (LayerScale); 0: off", "[0, inf)"
    )
    drop_path: float = setting(
        0.0,
        "stochastic depth: probability of skipping the last block's branches, rising linearly over the blocks from 0",
        "[0, 1)",
    )
    checkpoint_blocks: bool = setting(
        False, "activation checkpointing: recompute the activations of every block in its backward pass, to save memory"
    )


@dataclass
class AugmentationSettings:
    """Transforms of a training image, in this order. Evaluation only resizes (where needed) and normalizes."""

    resized_crop: bool = setting(False, "crop a random region and resize it; otherwise pad and crop")
    resized_crop_scale: list[float] = setting(
        [0.08, 1.0], "smallest and largest area of a resized crop, as a fraction of the image", "(0, 1]", length=2
    )
    resized_crop_ratio: list[float] = setting(
        [3 / 4, 4 / 3], "smallest and largest aspect ratio (width / height) of a resized crop", "(0, inf)", length=2
    )
    crop_padding: int = setting(
        4, "black pixels added on each side before a random crop back to the image side", "[0, 1024]"
    )
    flip: float = setting(0.5, "probability of a horizontal flip", "[0, 1]")
    flip_mode: str = setting(
        "random",
        "random, or alternating: each image is flipped in every second epoch, half of them in the first",
        choices=("random", "alternating"),
        table=("image_data/augmentation.py", "FLIPS"),
    )
    policy: str = setting(
        "none",
        "augmentation policy; auto_augment is the CIFAR policy",
        choices=("none", "rand_augment", "trivial_augment", "auto_augment"),
        table=("image_data/augmentation.py", "POLICIES"),
    )
    rand_augment_ops: int = setting(2, "RandAugment: operations per image", "[1, 100]")
    rand_augment_magnitude: int = setting(9, "RandAugment: magnitude bin", "[0, 30]")
    brightness: float = setting(0.0, "color jitter x: brightness factor between 1 - x and 1 + x; 0: off", "[0, inf)")
    contrast: float = setting(0.0, "color jitter x: contrast factor between 1 - x and 1 + x; 0: off", "[0, inf)")
    saturation: float = setting(0.0, "color jitter x: saturation factor between 1 - x and 1 + x; 0: off", "[0, inf)")
    erasing: float = setting(0.0, "probability of random erasing", "[0, 1]")
    erasing_scale: list[float] = setting(
        [0.02, 0.33], "smallest and largest erased area, as a fraction of the image", "(0, 1]", length=2
    )
    erasing_ratio: list[float] = setting(
        [0.3, 3.3], "smallest and largest aspect ratio (height / width) of the erased area", "(0, inf)", length=2
    )
    erasing_value: str = setting(
        "zero", "content of the erased area: zero (mean color) or pixel (normal noise)", choices=("zero", "pixel")
    )
    repeats: int = setting(
        1,
        "copies of each image per batch, each augmented independently; an epoch then covers 1/repeats of the images",
        "[1, 1000]",
    )
    mixup: float = setting(0.0, "MixUp: alpha of the Beta distribution; 0: off", "[0, inf)")
    cutmix: float = setting(0.0, "CutMix: alpha of the Beta distribution; 0: off", "[0, inf)")
    mix_probability: float = setting(1.0, "fraction of the images that MixUp or CutMix mixes", "[0, 1]")
    cutmix_share: float = setting(
        0.5, "fraction of the mixed images that get CutMix, where MixUp and CutMix are both on", "[0, 1]"
    )


@dataclass
class ScheduleSettings:
    """The learning-rate schedule: a factor of `optimizer.params.lr`, a function of the optimizer step alone."""

    shape: str = setting(
        "cosine",
        "shape of the learning-rate schedule after the warmup; wsd (warmup-stable-decay) is accepted for trapezoid",
        choices=("cosine", "linear", "constant", "trapezoid", "step"),
        aliases={"wsd": "trapezoid", "warmup_stable_decay": "trapezoid"},
        table=("optim/lr_schedule.py", "SCHEDULES"),
    )
    warmup_fraction: float = setting(
        0.05, "fraction of the run's steps over which the learning rate rises linearly", "[0, 1]"
    )
    warmup_start_factor: float = setting(0.0, "learning-rate factor at the start of the warmup", "[0, 1]")
    final_factor: float = setting(
        0.01, "cosine, linear, trapezoid: learning-rate factor that the schedule falls to", "[0, 1]"
    )
    hold_fraction: float = setting(
        0.0, "cosine, linear, trapezoid: fraction of the run's last steps that stay at final_factor", "[0, 1]"
    )
    cooldown_fraction: float = setting(
        0.2, "trapezoid: fraction of the run's steps over which the learning rate falls linearly", "[0, 1]"
    )
    milestones: list[float] = setting(
        [30 / 90, 60 / 90, 80 / 90],
        "step: fractions of the run at which the learning rate drops (default: ImageNet's epochs 30, 60, 80 of 90)",
        "[0, 1)",
    )
    milestone_factor: float = setting(0.1, "step: learning-rate multiplier at each milestone", "[0, 1]")

    def unused(self) -> list[str]:
        """The settings that the shape does not use; a user-defined shape may use all of them."""
        return [name for name, shapes in SHAPES_USING.items() if not (self.shape in shapes or is_own_part(self.shape))]


@dataclass
class ResizingSettings:
    """Progressive resizing: smaller training images in the first steps, which cost less (arXiv 2104.00298)."""

    initial_scale: float = setting(
        1.0, "side of the training images in the first steps, relative to their full side; 1: off", "(0, 1]"
    )
    fraction: float = setting(0.5, "fraction of the run's steps that train on the smaller images", "[0, 1]")


@dataclass
class LossSettings:
    """The cross-entropy loss."""

    label_smoothing: float = setting(
        0.0, "label smoothing: probability spread evenly over all classes; 0: off", "[0, 1]"
    )


@dataclass
class EmaSettings:
    """The exponential moving average (EMA) of the weights. Where it is on, evaluation and the saved weights use it."""

    decay: float = setting(0.0, "EMA decay per optimizer step; 0: off", "[0, 1)")
    warmup: bool = setting(True, "limit the EMA decay to (1 + steps) / (10 + steps) at the start of a run")


@dataclass
class ParallelSettings:
    """Settings of individual strategies besides `ds_config.json`; a strategy rejects those that it would not use."""

    stages: int = setting(2, "pipeline: number of stages; processes = stages x replicas", "[1, inf)")
    partition: str = setting(
        "parameters",
        "pipeline: quantity that is balanced over the stages: parameters, layers (uniform) or measured time",
        choices=("parameters", "uniform", "time"),
    )
    topology: str = setting(
        "ring", "gossip: graph of workers that average their weights", table=("parallel/topologies.py", "TOPOLOGIES")
    )
    gossip_order: str = setting(
        "adapt_then_combine",
        "gossip: adapt_then_combine: step, then average; adapt_with_combine: average, then step",
        choices=("adapt_then_combine", "adapt_with_combine"),
    )
    moment_steps: int = setting(
        1,
        "gossip: optimizer steps whose mean gradient enters Adam's moments at once (AccumAdam); 1: plain Adam",
        "[1, inf)",
    )
    local_steps: int = setting(32, "local: optimizer steps of each worker between two outer steps", "[1, inf)")
    outer_lr: float = setting(
        0.7, "local: learning rate of the outer optimizer (SGD with Nesterov momentum)", "(0, inf)"
    )
    outer_momentum: float = setting(0.9, "local: momentum of the outer optimizer", "[0, 1)")
    patience_seconds: float = setting(
        120.0,
        "local with peers: longest wait for a peer that is alive but late or stalls in an exchange, in seconds",
        "(0, inf)",
    )


# The keys of ds_config.json, by the path that `--set` takes.
ENGINE_SETTINGS: dict[str, Declared] = {
    "train_batch_size": Declared("global batch size: images per optimizer step over all processes", "[1, inf)"),
    "gradient_accumulation_steps": Declared("micro-batches accumulated per optimizer step", "[1, inf)"),
    "gradient_clipping": Declared("largest norm of the gradient; 0: no clipping", "[0, inf)"),
    "optimizer.type": Declared(
        "optimizer", choices=tuple(OPTIMIZER_PARAMS), table=("optim/optimizers.py", "OPTIMIZERS")
    ),
    "optimizer.params.lr": Declared("peak learning rate", "[0, inf)"),
    "optimizer.params.betas": Declared(
        "decay rates of the running means of the gradient and its square", "[0, 1)", length=2
    ),
    "optimizer.params.eps": Declared("epsilon added to the denominator", "[0, inf)"),
    "optimizer.params.momentum": Declared("momentum: decay rate of the running mean of the gradient", "[0, 1)"),
    "optimizer.params.nesterov": Declared("use Nesterov momentum"),
    "optimizer.params.matrix_lr_factor": Declared(
        "multiplier of the learning rate for matrices trained by Muon, but not of their weight decay", "(0, inf)"
    ),
    "optimizer.params.split_qkv": Declared(
        "Muon: orthogonalize the projections of queries, keys and values as three matrices instead of one"
    ),
    "optimizer.params.weight_decay": Declared(
        "weight decay of matrices and filters; biases, norms, positional embeddings and CLS tokens have none",
        "[0, inf)",
    ),
    "bf16.enabled": Declared(
        "bfloat16: false (fp32); true (compute in bf16, with bf16 weights under zero and pipeline); "
        "autocast (fp32 weights); masters (ddp: bf16 weights beside the fp32 weights that the optimizer updates); "
        "auto (autocast where the device is faster in bf16)"
    ),
    "zero_optimization.stage": Declared(
        "ZeRO stage: what processes share: 0 nothing, 1 optimizer states, 2 also gradients, 3 also weights", "[0, 3]"
    ),
    "zero_optimization.offload_optimizer.device": Declared(
        "device that holds the optimizer states: none (the training device) or cpu", choices=("none", "cpu")
    ),
}
# What ds_config.json must have, with the types of the values. Parameters of the optimizer have defaults.
ENGINE_TYPES: dict[str, type] = {
    "train_batch_size": int,
    "gradient_accumulation_steps": int,
    "gradient_clipping": float,  # without it, DeepSpeed would clip at 1.0
    "optimizer.type": str,
    "optimizer.params": dict,
    "bf16.enabled": bool,
    "zero_optimization.stage": int,
    "zero_optimization.offload_optimizer.device": str,
}
