"""Feed-forward trees: every neuron and a mask against visiting the path only, and a plain MLP of as many neurons as the peer.

    python benchmarks/tree_evaluation.py                                   on the CPU, and on the GPU when there is one
    python benchmarks/tree_evaluation.py --kind fff_fan_out --depths 2 3 4 --json tree_evaluation.json

Forward is without gradients (evaluation of a network), training is forward and backward. The three take turns in each
round, so that a slow moment of the machine meets all of them; a figure is the median of the rounds with the least and the
most behind it. "path / mask" under 1 says that visiting the path only is the faster one there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.lib.options import keep, origin
from benchmarks.lib.timing import machine, synchronise
from config.command_line import Parser, at_least_one

if TYPE_CHECKING:
    from torch import Tensor, nn

TOKENS = 65  # an image of 32 x 32 in patches of 4, and the class token


def main() -> None:
    args = parse_arguments()
    import torch  # after the arguments, so that --help answers at once

    devices = args.devices or (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    rows = []
    for device in devices:
        name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        images = args.images or (512 if device == "cuda" else 32)
        dtype = "bfloat16" if args.bf16 else "float32"
        print(f"\n{name}, {dtype}, {images} images of {TOKENS} tokens, width {args.width}, PyTorch {torch.__version__}; milliseconds")
        print(f"{args.kind:>11} {'neurons':>8} {'used':>5}  {'':8} {'mask':>23} {'path':>23} {'MLP':>23}  path / mask  mask / MLP")
        for depth in args.depths:
            candidates, facts = make_candidates(args.kind, depth, args.width)
            x = torch.randn(images, TOKENS, args.width, dtype=getattr(torch, dtype), device=device)
            for candidate in candidates.values():
                candidate.to(device, x.dtype)
            for phase, step in (("forward", forward), ("training", training)):
                times = take_turns(candidates, step, x, args.rounds)
                medians = {candidate: statistics.median(seconds) for candidate, seconds in times.items()}
                print(f"{'depth ' + str(depth):>11} {facts['neurons']:8} {facts['used']:5}  {phase:8} "
                      + " ".join(f"{show(seconds):>23}" for seconds in times.values())
                      + f"  {medians['path'] / medians['mask']:11.2f}  {medians['mask'] / medians['mlp']:10.2f}", flush=True)
                rows.append({"device": name, "dtype": dtype, "images": images, "tokens": TOKENS, "width": args.width, "kind": args.kind,
                             "depth": depth, **facts, "phase": phase, "seconds": times, "median_seconds": medians})
    where = machine(torch.device("cuda" if "cuda" in devices else "cpu"))
    keep((args.json, json.dumps({**origin(), "machine": where, "rounds": args.rounds, "rows": rows}, indent=1) + "\n"))


def make_candidates(kind: str, depth: int, width: int) -> tuple[dict[str, nn.Module], dict[str, int]]:
    """The two evaluations of one tree, an MLP with as many neurons, and how many there are and are used."""
    from models.feed_forward import FEED_FORWARDS, MLP
    from models.parts import Dimensions, make_part

    dims = Dimensions(num_classes=100, image_side=32, patch=4, width=width, depth=1, heads=1, head_size=64, num_prefix=1, dropout=0.0)
    mask, path = (make_part(FEED_FORWARDS, "feed_forward", kind, dims, {"depth": depth, "evaluation": how}) for how in ("mask", "path"))
    path.load_state_dict(mask.state_dict())
    neurons = sum(len(level.bias) for level in mask.levels)
    return {"mask": mask, "path": path, "mlp": MLP(dims, neurons)}, {"neurons": neurons, "used": mask.num_visited}


def forward(module: nn.Module, x: Tensor) -> None:
    import torch

    with torch.no_grad():
        module(x)


def training(module: nn.Module, x: Tensor) -> None:
    module.zero_grad(set_to_none=True)
    module(x.detach().requires_grad_()).float().square().mean().backward()


def take_turns(candidates: dict[str, nn.Module], step: Any, x: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(rounds + 1):
        for name, module in candidates.items():
            synchronise(x.device)
            start = time.perf_counter()
            step(module, x)
            synchronise(x.device)
            if round_:
                times[name].append(time.perf_counter() - start)
    return times


def show(seconds: list[float]) -> str:
    return f"{1e3 * statistics.median(seconds):.2f} ({1e3 * min(seconds):.2f}-{1e3 * max(seconds):.2f})"


def parse_arguments() -> argparse.Namespace:
    parser = Parser("python benchmarks/tree_evaluation.py", "Time the two evaluations of feed-forward trees against each other and an MLP.",
                    example="python benchmarks/tree_evaluation.py --kind fff_fan_out --depths 2 3 4")
    what = parser.add_argument_group("what is compared")
    what.add_argument("--kind", default="fff", choices=["fff", "fff_fan_out"], help="tree (default: fff)")
    what.add_argument("--depths", type=at_least_one, nargs="+", default=[3, 5, 7, 9, 11], metavar="N",
                      help="steps from root to leaf (default: 3 5 7 9 11)")
    what.add_argument("--width", type=at_least_one, default=512, metavar="N", help="numbers of a token (default: 512)")
    what.add_argument("--images", type=at_least_one, metavar="N", help=f"of {TOKENS} tokens, in a batch (default: 32 on a CPU, 512 on a GPU)")
    what.add_argument("--bf16", action="store_true", help="weights and tokens in bfloat16 instead of float32")
    how = parser.add_argument_group("how it is measured")
    how.add_argument("--devices", nargs="+", choices=["cpu", "cuda"], help="where it runs (default: the CPU, and the GPU when there is one)")
    how.add_argument("--rounds", type=at_least_one, default=5, metavar="N", help="timed turns of each (default: 5)")
    how.add_argument("--json", type=Path, metavar="FILE", help="write every time here (default: nowhere)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
