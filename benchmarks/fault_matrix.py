"""Fault injection: does a run that was interrupted at a random moment end with the same bits as an undisturbed run?

    python benchmarks/fault_matrix.py                                             every fault twice: a few minutes
    python benchmarks/fault_matrix.py --rounds 200 --out results/fault_matrix/cpu     the table in results/
    python benchmarks/fault_matrix.py --rounds 5 --faults killed-saving,cut

A round starts train.py on a small drawn dataset, injects one fault of `faults.py` and starts the same command again
until the run is finished. It then compares the weights byte by byte and metrics.jsonl number by number (except times)
with the undisturbed run. "Survived" means that both are equal after one further start; everything else is "lost", with
the reason. A fault that finds the run finished did not occur, and the round is repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.lib.faults import FAULTS, Round, TooLate, small_disk
from benchmarks.lib.options import keep, output_file, some_of
from benchmarks.lib.timing import machine
from common.errors import UserError
from config.command_line import Parser, at_least_one, run_cli
from image_data.preparation.prepare import prepare
from records.checkpoint_store import UNFINISHED, step_of
from records.provenance import commit_text, provenance
from records.run_folder import RunFolder

# Dropout and augmentation are on, so that a resumed run depends on its random numbers. A validation split makes the run
# keep a best checkpoint. 240 images make 3 steps per epoch.
TINY = """
epochs = 10
[model]
patch = 8
width = 32
depth = 2
heads = 2
head_size = 16
feed_forward_options = { hidden = 48 }
dropout = 0.1
[engine]
train_batch_size = 64
[engine.optimizer.params]
lr = 3e-3
"""
SHAPES = {"side": 32, "train_per_class": 30, "test_per_class": 5}
FLAGS = ("--name", "run", "--hold-out", "0.2", "--checkpoint-every", "2steps")
CLOCKS = ("_seconds", "_per_second", "_gib")
MOST_STARTS = 20  # of one round, until its fault occurs before the run is over


# --- rounds -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """Result of a round: the step of the fault, and the reason if the run was lost."""

    fault: str
    seed: int
    step: int  # of the newest checkpoint after the fault, 0: none
    half_written: bool  # whether the fault left a half-written checkpoint
    lost: str | None


def run_round(
    fault: str, seed: int, work: Path, words: list[str], undisturbed: RunFolder, seconds: float, operations: int
) -> Outcome:
    """Run one round in its own folder, which remains if the run was lost."""
    draw = random.Random(seed)
    for _ in range(MOST_STARTS):
        folder = Path(tempfile.mkdtemp(prefix=f"{fault}-{seed}-", dir=work))
        now = Round(folder / "runs", [*words, "--runs-dir", str(folder / "runs")], seconds, operations, draw)
        try:
            FAULTS[fault](now)
        except TooLate:
            shutil.rmtree(folder)
            continue
        except AssertionError as error:
            return Outcome(fault, seed, 0, False, str(error))
        newest = now.record.newest_checkpoint()
        half_written = bool(list(now.record.folder.glob(f"state/{UNFINISHED}*")))
        done = now.begin().end()
        if " is finished; " in done.err:  # it was killed between its last write and its exit
            shutil.rmtree(folder)
            continue
        lost = difference(now.record, undisturbed) if done.code == 0 else done.text
        if lost is None:
            shutil.rmtree(folder)
        return Outcome(fault, seed, step_of(newest) if newest else 0, half_written, lost)
    return Outcome(fault, seed, 0, False, f"the fault came too late {MOST_STARTS} times")


def difference(record: RunFolder, undisturbed: RunFolder) -> str | None:
    """Return the first bitwise difference between two finished runs, None if there is none."""
    for name in ("weights.safetensors", "best.safetensors"):
        if (record.folder / name).read_bytes() != (undisturbed.folder / name).read_bytes():
            return f"{name} differs"
    ours, theirs = [
        [{key: value for key, value in line.items() if not key.endswith(CLOCKS)} for line in other.metrics()]
        for other in (record, undisturbed)
    ]
    return None if ours == theirs else f"metrics.jsonl differs: {ours} instead of {theirs}"


def main() -> int:
    args = parse_arguments()
    faults = args.faults
    if "disk-full" in faults and not may_mount():
        faults.remove("disk-full")
        if not faults:
            raise UserError("disk-full needs a process that may mount a disk; run as root, or choose other --faults")
        print("warning: skipping disk-full: this process may not mount a disk")
    work = Path(tempfile.mkdtemp(prefix="faults-"))
    words = make_scene(work)
    undisturbed, seconds, operations = run_undisturbed(work, words)
    began = time.monotonic()
    plan = [(faults[i % len(faults)], args.seed + i) for i in range(args.rounds or 2 * len(faults))]
    with ThreadPoolExecutor(args.at_once) as pool:
        pending = [
            pool.submit(run_round, fault, seed, work, words, undisturbed, seconds, operations) for fault, seed in plan
        ]
        outcomes = []
        for i, future in enumerate(pending):
            outcomes.append(future.result())
            fault, seed, lost = outcomes[-1].fault, outcomes[-1].seed, outcomes[-1].lost
            print(f"[{i + 1}/{len(plan)}] {fault}, seed {seed}: {f'LOST: {lost}' if lost else 'survived'}", flush=True)
    table = as_table(outcomes)
    print(table)
    if args.out:
        keep_table(args.out, table, outcomes, time.monotonic() - began)
    lost = any(outcome.lost for outcome in outcomes)
    if lost:
        print(f"the folders of the lost rounds are in {work}")
    else:
        shutil.rmtree(work)
    return int(lost)


def make_scene(work: Path) -> list[str]:
    """Draw the dataset, write the preset, and return the arguments of train.py."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        prepare(work / "shapes", dataset="shapes", workers=1, shapes=SHAPES)
    (work / "tiny.toml").write_text(TINY)
    return ["--preset", str(work / "tiny.toml"), "--data-dir", str(work / "shapes"), *FLAGS]


def run_undisturbed(work: Path, words: list[str]) -> tuple[RunFolder, float, int]:
    """Return the reference run, its seconds of training and saving, and its number of file operations."""
    now = Round(work / "undisturbed", [*words, "--runs-dir", str(work / "undisturbed")], 0.0, 0, random.Random(0))
    program = now.begin()
    program.wait_for("engine  ")
    began = time.monotonic()
    done = program.end()
    seconds = time.monotonic() - began
    assert done.code == 0, done.text
    return now.record, seconds, int(done.out.rsplit("operations ", 1)[1])


def may_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            with small_disk(Path(folder) / "try"):
                return True
        except RuntimeError:
            return False


# --- the report ---------------------------------------------------------------------------------------------------


def as_table(outcomes: list[Outcome]) -> str:
    """Return the outcomes by fault as a Markdown table."""
    lines = [
        "| fault | event | rounds | survived | lost | left a half-written checkpoint |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for fault in dict.fromkeys(outcome.fault for outcome in outcomes):
        of_fault = [outcome for outcome in outcomes if outcome.fault == fault]
        lost = sum(outcome.lost is not None for outcome in of_fault)
        half = sum(outcome.half_written for outcome in of_fault)
        lines.append(
            f"| `{fault}` | {FAULTS[fault].__doc__} | {len(of_fault)} | {len(of_fault) - lost} | {lost} | {half} |"
        )
    lost = sum(outcome.lost is not None for outcome in outcomes)
    half = sum(outcome.half_written for outcome in outcomes)
    return "\n".join([*lines, f"| all | | {len(outcomes)} | {len(outcomes) - lost} | {lost} | {half} |"])


def keep_table(out: Path, table: str, outcomes: list[Outcome], seconds: float) -> None:
    """Write `out`.json and `out`.md."""
    facts = {key: value for key, value in provenance().items() if key != "command"}
    content = {
        **facts,
        "command": "python benchmarks/fault_matrix.py",
        "rounds": len(outcomes),
        "seconds": round(seconds),
        "machine": machine(),
        "outcomes": [vars(outcome) for outcome in outcomes],
    }
    text = f"""# {len(outcomes)} rounds of fault injection

A fault interrupts a run of 30 steps at a random moment, and the same command is started again. *Survived*: the final
weights and every number of `metrics.jsonl` equal those of the undisturbed run, bit for bit. One CPU process, ZeRO stage
1, a checkpoint every 2 steps, commit {commit_text(facts, 7)}, made with
`benchmarks/fault_matrix.py --rounds {len(outcomes)}`.

{table}
"""
    keep((out.with_suffix(".json"), json.dumps(content, indent=1) + "\n"), (out.with_suffix(".md"), text))
    print(f"wrote {out.with_suffix('.json')} and {out.with_suffix('.md')}")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        "python benchmarks/fault_matrix.py",
        "Interrupt runs at random moments and check that they end with the same bits.",
        example="python benchmarks/fault_matrix.py --rounds 5 --faults killed-saving,cut",
        notes="faults:\n" + "\n".join(f"  {name:14} {fault.__doc__}" for name, fault in FAULTS.items()),
    )
    what = parser.add_argument_group("faults")
    what.add_argument(
        "--faults",
        type=some_of("fault", FAULTS),
        default=",".join(FAULTS),
        metavar="A,B",
        help="faults to inject, see below (default: all)",
    )
    what.add_argument(
        "--rounds",
        type=at_least_one,
        metavar="N",
        help="total number of rounds, the faults in turns (default: two per fault)",
    )
    what.add_argument(
        "--seed", type=int, default=0, metavar="N", help="random seed for the moments of the faults (default: 0)"
    )
    how = parser.add_argument_group("execution")
    how.add_argument(
        "--at-once",
        type=at_least_one,
        default=os.cpu_count(),
        metavar="N",
        help="concurrent rounds (default: one per core)",
    )
    kept = parser.add_argument_group("output")
    kept.add_argument("--out", type=output_file, metavar="PATH", help="write PATH.json and PATH.md (default: none)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_cli(main))
