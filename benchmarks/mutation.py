"""Mutation testing: plants one-line mistakes in the packages and counts how many the tests notice.

    python benchmarks/mutation.py --sample 200 --minutes 120          # continues where results/mutation.json ends
    python benchmarks/mutation.py --files models/attention.py --sample 20 --out runs/mutation
    python benchmarks/mutation.py --again survived                    # after new tests: the unexplained survivors
    python benchmarks/mutation.py --explain 1f0c2a9d3b "the order of two equal factors"

`benchmarks/lib/mutants.py` draws the sample from the present commit. Each mistake is planted in a clone in a temporary
folder, never in your files. Only the tests that import the changed file run, nearest first, until one fails or the
time limit of a mutant is over. A failing test counts only if it passes without the mistake. Outcomes: killed (a test
failed), timed out (a test hung, which is noticed too), survived, and not tested where the time was over before the
nearest test file was: `--again "not tested"`, with a longer `--limit`. The reports are written after every mutant.

Why not a finished tool: mutmut 3.8 renames functions and plants its mutants behind them. It skips decorated functions
(properties, context managers, `no_grad`) and all that is outside functions (tables, defaults), finds the tests of a
function by calls in its own process, whereas most of our tests start programs, and has no sample by seed. cosmic-ray
8.7 runs one test command for every mutant: the whole suite, or one session per file, with a database and nine
dependencies, and has no sample by seed either.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.lib.mutant_trial import OUTCOMES, SURVIVED, UNTESTED, Trial, Verdict
from benchmarks.lib.mutants import Mutant, sample
from benchmarks.lib.options import output_folder
from common.errors import UserError
from common.files import write_atomically
from common.machine import cpu_name
from common.paths import PROJECT, RESULTS
from common.text import duration
from config.command_line import Parser, at_least_one, run_cli

LEAST_FOR_A_SHARE = 30
PACKAGES = ("image_data", "models", "optim", "parallel", "records", "training", "comparison")


def main() -> int:
    args = parse_arguments()
    report = Report(args.out, args.seed, args.sample)
    if args.explain:
        report.explain(*args.explain)
        return 0
    commit = git("rev-parse", "HEAD").strip()
    sources = {file: git("show", f"{commit}:{file}") for file in args.files or package_files(commit)}
    chosen = list(itertools.islice(sample(sources, args.seed), args.sample))
    todo = report.left(chosen, args.again)
    print(f"{len(chosen)} mutants of commit {commit[:10]}, {len(chosen) - len(todo)} of them done")
    deadline = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        trials = [Trial(Path(folder) / str(i), commit, args.limit) for i in range(args.jobs)]
        queue, lock = iter(todo), threading.Lock()

        def work(trial: Trial) -> None:
            while time.monotonic() < deadline:
                with lock:
                    mutant = next(queue, None)
                if mutant is None:
                    return
                began = time.monotonic()
                verdict = trial.judge(mutant, sources[mutant.file])
                with lock:
                    report.add(mutant, mutant.diff(sources[mutant.file]), verdict, commit, time.monotonic() - began)

        with ThreadPoolExecutor(args.jobs) as pool:
            try:
                list(pool.map(work, trials))
            except KeyboardInterrupt:
                deadline = 0.0  # threads end with the mutants they are at
                raise
    print(report.summary())
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        "python benchmarks/mutation.py",
        "Plant one-line mistakes in the packages and count how many the tests notice.",
        "python benchmarks/mutation.py --sample 200 --minutes 120",
        "Explained in docs/benchmarks.md#mutation-testing.",
    )
    parser.add_argument("--sample", type=at_least_one, default=200, metavar="N", help="mutants to try (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the sample (default: 0)")
    parser.add_argument(
        "--minutes", type=float, default=120.0, help="start no mutant after this many minutes (default: 120)"
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="time limit of the tests of a mutant (default: 120)",
    )
    parser.add_argument("--jobs", type=at_least_one, default=2, help="mutants tried at once (default: 2)")
    parser.add_argument(
        "--files", nargs="+", metavar="FILE", help="files to mutate (default: all files of seven packages)"
    )
    parser.add_argument(
        "--again",
        choices=OUTCOMES,
        help="also try the mutants of this outcome again, except explained ones (default: only new ones)",
    )
    parser.add_argument(
        "--explain",
        nargs=2,
        metavar=("ID", "REASON"),
        help="record why a survivor is equivalent, and end (default: none)",
    )
    parser.add_argument(
        "--out",
        type=output_folder,
        default=str(RESULTS),
        metavar="DIR",
        help="folder of mutation.json and .md (default: results)",
    )
    return parser.parse_args()


def git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(PROJECT), *words], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"mutation testing needs a git checkout: git {words[0]} failed: {done.stderr.strip()}")
    return done.stdout


def package_files(commit: str) -> list[str]:
    """Python files of the packages at a commit."""
    names = git("ls-tree", "-r", "--name-only", commit, *PACKAGES).splitlines()
    return [name for name in names if name.endswith(".py") and not name.endswith("__init__.py")]


class Report:
    """mutation.json and the page that is made of it."""

    def __init__(self, folder: Path, seed: int, sample_size: int):
        self.json, self.page = folder / "mutation.json", folder / "mutation.md"
        self.content: dict[str, Any] = {"seed": seed, "sample": sample_size, "processor": cpu_name(), "mutants": []}
        if self.json.is_file():
            self.content = json.loads(self.json.read_text())
        if self.content["seed"] != seed:
            raise UserError(
                f"{self.json} holds seed {self.content['seed']}; add --seed {self.content['seed']} or --out DIR"
            )
        self.mutants: list[dict[str, Any]] = self.content["mutants"]

    def left(self, chosen: list[Mutant], again: str | None) -> list[Mutant]:
        """Return the mutants without a verdict, and those of the outcome `again` that nobody has explained.

        The report then covers at least these mutants.
        """
        self.content["sample"] = max(self.content["sample"], len(chosen))
        self.content["untested"] = sorted({mutant.name for mutant in chosen} - self.tested())
        outcomes = {entry["id"]: "explained" if "reason" in entry else entry["outcome"] for entry in self.mutants}
        return [mutant for mutant in chosen if outcomes.get(mutant.name) in (None, again)]

    def tested(self) -> set[str]:
        """Return the names of the mutants with a verdict, also of those that the present commit no longer has."""
        return {entry["id"] for entry in self.mutants if entry["outcome"] != UNTESTED}

    def add(self, mutant: Mutant, diff: str, verdict: Verdict, commit: str, seconds: float) -> None:
        """Record and print a verdict; one that replaces an earlier verdict keeps it as `first_outcome`."""
        before = next((entry for entry in self.mutants if entry["id"] == mutant.name), {})
        first = before.get("first_outcome", UNTESTED)
        entry = {
            **{"id": mutant.name, "file": mutant.file, "line": mutant.line, "kind": mutant.kind, "diff": diff},
            **{"outcome": verdict.outcome, "first_outcome": verdict.outcome if first == UNTESTED else first},
            **{"test": verdict.test, "test_files_run": verdict.files_run, "test_files": verdict.files},
            **{"seconds": round(seconds, 1), "commit": commit},
        }
        if "reason" in before and verdict.outcome == SURVIVED:
            entry["reason"] = before["reason"]
        if before:
            self.mutants[self.mutants.index(before)] = entry
        else:
            self.mutants.append(entry)
        print(f"{len(self.mutants)}. {verdict.outcome} ({seconds:.0f} s) {mutant.file}:{mutant.line} {mutant.kind}")
        print(f"{diff}\n    {verdict.test or ran(entry)}", flush=True)
        self.write()

    def explain(self, name: str, reason: str) -> None:
        """Record why no test can notice a survivor."""
        found = [entry for entry in self.mutants if entry["id"] == name and entry["outcome"] == SURVIVED]
        if not found:
            raise UserError(f"{self.json} has no survivor {name}; the ids are in {self.page}")
        found[0]["reason"] = reason
        self.write()

    def write(self) -> None:
        self.json.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.json, json.dumps(self.content, indent=1) + "\n")
        write_atomically(self.page, self.markdown())

    def summary(self) -> str:
        """Return how many of the tested mutants were noticed."""
        tested = [entry for entry in self.mutants if entry["outcome"] != UNTESTED]
        noticed = sum(entry["outcome"] != SURVIVED for entry in tested)
        share = (
            f" ({100 * noticed / len(tested):.0f} %)" if len(tested) >= LEAST_FOR_A_SHARE else ", too few for a share"
        )
        return f"{noticed} of {len(tested)} mutants noticed{share}"

    def markdown(self) -> str:
        """Return the page: totals, one row per package, and every survivor with its diff and reason."""
        survivors = [entry for entry in self.mutants if entry["outcome"] == SURVIVED]
        left = len(set(self.content.get("untested", [])) - self.tested())
        at_first = sum(entry["first_outcome"] == SURVIVED for entry in self.mutants)
        commits = sorted({entry["commit"][:10] for entry in self.mutants})
        lines = [
            *("# Mutation testing", ""),
            "One-line mistakes at random places, and whether a test noticed. Written by `benchmarks/mutation.py` from",
            *("`mutation.json`.", ""),
            f"**{self.summary()}.** Of the sample of {self.content['sample']}, {left} have not been tested.",
            f"{at_first} survived at first. Of the {len(survivors)} that survive now, "
            f"{sum('reason' in entry for entry in survivors)} have a reason.",
            "",
            f"Seed {self.content['seed']}; commit {', '.join(commits)}; {self.content['processor']}; "
            f"{duration(sum(entry['seconds'] for entry in self.mutants))} in total.",
            *("", "| package | mutants | " + " | ".join(OUTCOMES) + " |", "|---" + "|---:" * (len(OUTCOMES) + 1) + "|"),
        ]
        for package in PACKAGES:
            found = [entry["outcome"] for entry in self.mutants if entry["file"].startswith(f"{package}/")]
            counts = [len(found), *(found.count(outcome) for outcome in OUTCOMES)]
            lines.append(f"| {package} | " + " | ".join(map(str, counts)) + " |")
        lines += ["", "## Survivors", ""] if survivors else []
        for entry in survivors:
            lines += [f"`{entry['id']}` {entry['file']}:{entry['line']}: {entry.get('reason', ran(entry))}.", ""]
            lines += ["```diff", entry["diff"], "```", ""]
        return "\n".join(lines).rstrip() + "\n"


def ran(entry: dict[str, Any]) -> str:
    """Return how far the tests of a mutant came."""
    return f"{entry['test_files_run']} of {entry['test_files']} test files ran to their end"


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
