"""Cost of each recipe before it is run: parameters, FLOPs, steps, and the expected seconds on one GPU.

    python benchmarks/recipe_costs.py                        # the table
    python benchmarks/recipe_costs.py speedrun --peak 312    # one recipe, on a GPU of 312 TFLOP/s (an A100)
    python benchmarks/recipe_costs.py --update               # write it into docs/recipes.md, between its marks

Nothing is trained and no memory is allocated: networks are built without weights. FLOPs count matrix products and
convolutions, a multiply-add as 2 (papers that write "FLOPs" mostly count it as 1). A training step counts as three
forward passes. The utilization of each recipe is an estimate until it is measured, and so are its seconds.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.errors import SettingsError, unknown
from common.paths import PROJECT
from config.command_line import Parser, above_zero, run_cli
from config.settings import preset_names, resolve

DOCUMENT = PROJECT / "docs" / "recipes.md"
MARKS = re.compile(r"(<!-- plan -->\n).*?(<!-- end -->)", re.DOTALL)
PEAK = 989.0  # TFLOP/s of an H200 in bf16, dense (NVIDIA's data sheet gives 1,979 with sparsity)


@dataclass(frozen=True)
class Data:
    """Properties of a dataset that determine the cost of a run."""

    num_train: int
    num_classes: int
    image_side: int  # 0: images of many sizes


DATASETS = {"cifar100": Data(50_000, 100, 32), "cifar10": Data(50_000, 10, 32), "imagenet": Data(1_281_167, 1000, 0)}


@dataclass(frozen=True)
class Aim:
    """Purpose of a recipe: dataset, expected share of a GPU's peak (None: for a CPU, or too small), goal."""

    dataset: str
    utilization: float | None
    goal: str


# Utilization: speedrun is measured on one H100 (28.5 s), 300ep on one H200 (37.75 ms per step); others are estimates.
# Small vision transformers use a tenth to a fifth of an A100 in mixed precision; an H200 has three times its
# arithmetic, but not three times its bandwidth, and depthwise convolutions are bound by that. ResNet-50 uses 19 % of an
# A100 at 2,470 images/s (NVIDIA/DeepLearningExamples).
AIMS = {
    "speedrun": Aim("cifar100", 0.144, "75 %, least time"),
    "100ep": Aim("cifar100", 0.08, "> 80.32 %"),
    "300ep": Aim("cifar100", 0.157, "> 83.54 %, <= 6 M"),
    "1500ep": Aim("cifar100", 0.07, "> 85.32 %, <= 6 M"),
    "dhvt-t-2": Aim("cifar100", 0.05, "83.54 %, the published baseline"),
    "cifar10": Aim("cifar10", 0.07, "> 96.5 %, <= 4 M"),
    "cifar10-fast": Aim("cifar10", 0.08, "94 %, least time"),
    "finetune": Aim("cifar100", 0.25, "> 90 %"),
    "imagenet-resnet50": Aim("imagenet", 0.12, "> 76.0 %"),
    "spt-lsa": Aim("cifar100", 0.025, "the first network of this kind"),
    "tutorial": Aim("cifar10", None, "55 %"),
    "cpu": Aim("cifar100", None, "64 % in 20 minutes on two cores, 74 % after all epochs"),
    "cpu-quick": Aim("cifar100", None, "50 % in 3 minutes on two cores"),
    "cpu-fp32": Aim("cifar100", None, "64 % in 20 minutes on two cores"),
}


@dataclass(frozen=True)
class Plan:
    """Cost of a recipe."""

    name: str
    goal: str
    parameters: int
    flops: int  # of one image's forward pass
    epochs: int
    batch: int
    steps: int
    training_flops: float  # of the whole run
    seconds: float | None  # expected on one GPU

    @property
    def petaflop(self) -> float:
        """PFLOP of the full run."""
        return self.training_flops / 1e15


def plan(name: str, peak: float = PEAK) -> Plan:
    """Return the plan of a preset. Raises SettingsError for a preset without an entry in AIMS."""
    if name not in AIMS:
        raise SettingsError(unknown("recipe", name, list(AIMS)))
    aim, settings = AIMS[name], resolve(name, [])
    data = DATASETS[aim.dataset]
    from comparison.variant_costs import cost  # imports PyTorch: late, so that --help answers at once

    counted = cost(settings, data.num_classes, settings.image_side or data.image_side)
    batch = settings.engine["train_batch_size"]
    steps = settings.epochs * (data.num_train // batch)
    training = counted.training_flops(steps, steps, batch)
    seconds = training / (peak * 1e12 * aim.utilization) if aim.utilization else None
    return Plan(name, aim.goal, counted.parameters, counted.flops, settings.epochs, batch, steps, training, seconds)


def table(plans: list[Plan]) -> str:
    """Return the plans as a Markdown table."""
    rows = [
        "| recipe | dataset | goal | parameters | GFLOP per image | epochs | batch | steps | PFLOP "
        "| share of peak | expected time |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for p in plans:
        use = AIMS[p.name].utilization
        of_peak, time = (f"{100 * use:.3g} %", duration(p.seconds)) if use else ("–", "–")
        rows.append(
            f"| `{p.name}` | {AIMS[p.name].dataset} | {p.goal} | {p.parameters:,} | {figure(p.flops / 1e9)} "
            f"| {p.epochs:,} | {p.batch:,} | "
            f"{p.steps:,} | {figure(p.petaflop)} | {of_peak} | {time} |"
        )
    return "\n".join(rows)


def figure(number: float) -> str:
    """Return three digits, without an exponent for large numbers: "0.0013", "3.79", "2,833"."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def duration(seconds: float) -> str:
    """Return two digits, enough for an estimate: "41 s", "17 min", "6.4 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def update(text: str) -> str:
    """Return `text` with the table between its marks replaced."""
    return MARKS.sub(lambda m: f"{m[1]}{table([plan(name) for name in AIMS])}\n{m[2]}", text)


def main() -> None:
    parser = Parser(
        "python benchmarks/recipe_costs.py [PRESET ...]",
        "Estimate the cost of each recipe before it is run.",
        example="python benchmarks/recipe_costs.py speedrun --peak 312",
    )
    parser.add_argument(
        "recipes", nargs="*", metavar="PRESET", help=f"presets: {', '.join(preset_names())} (default: all)"
    )
    parser.add_argument(
        "--peak",
        type=above_zero,
        default=PEAK,
        metavar="TFLOPS",
        help=f"peak TFLOP/s of the GPU in bf16 (default: {PEAK:g}, an H200)",
    )
    parser.add_argument("--update", action="store_true", help=f"write the table into {DOCUMENT.relative_to(PROJECT)}")
    args = parser.parse_args()
    if args.update:
        DOCUMENT.write_text(update(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table([plan(name, args.peak) for name in args.recipes or AIMS]))


if __name__ == "__main__":
    sys.exit(run_cli(main))
