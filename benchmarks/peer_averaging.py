"""WeightAveraging over peers that die and come late: our exchange (torchft's lighthouse, Gloo) against hivemind's, on this machine.

    python benchmarks/peer_averaging.py --hivemind-python hivemind/bin/python                    both, 2 and 3 peers: 5 minutes
    python benchmarks/peer_averaging.py --systems torchft --rounds 5 --pairs 2                   a quick look at ours
    python benchmarks/peer_averaging.py --hivemind-python hivemind/bin/python --json results/peers/cpu.json --markdown results/peers/cpu.md

Every peer is a process with the same small network. It takes some SGD steps on data of its own, averages its weights with the
others, notes the seconds and a hash of what it has then, and goes on; there is no outer step, so that both systems do the
same. Two scenes, each for every system in turn, `--repeats` times:

    steady    all peers from start to end: seconds an exchange, from the call to the return, by every peer, once each has made three
    churn     three peers; one is killed (SIGKILL, with all its children) and another one starts: how long the survivors'
              exchanges took that met the death, whether they ended in equal weights, and how long the newcomer needed
              from its start to weights that another peer has too

An exchange counts as shared when another peer has the same weights after one, up to rounding (hivemind adds rounded differences, so that
its peers agree without being equal in every bit, which is counted beside it). hivemind is tried as its documentation has it
(matchmaking 5 s, requests 3 s) and at the shortest times that held together on one machine; its averager never forms a group
before its matchmaking time is over unless `target_group_size` peers are there, so it is told how many peers there are.
hivemind wants protobuf and pydantic of its own: pip install hivemind==1.1.12 into an environment of its own, with this torch.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.lib import tables  # noqa: E402
from benchmarks.lib.options import add_reports, keep, origin, several  # noqa: E402
from benchmarks.lib.timing import machine  # noqa: E402
from common.errors import RunError
from common.paths import PROJECT
from config.command_line import Parser, at_least_one, run_cli  # noqa: E402

KINDS = {  # name: matchmaking and request seconds
    "torchft": (0.0, 0.0),
    "hivemind": (5.0, 3.0),
    "hivemind, short": (1.0, 0.5),
}
LIMIT_SECONDS = 120.0  # for a peer to come somewhere
TOLERANCE = 1e-6  # between weights that are equal: they are about 0.06, and half a second of training moves them by far more


@dataclass
class Peer:
    """A worker process and the lines it writes."""

    name: str
    child: subprocess.Popen
    log: Path

    def lines(self) -> list[dict[str, Any]]:
        text = self.log.read_text() if self.log.exists() else ""
        return [json.loads(line) for line in text.split("\n")[:-1]]

    def kill(self) -> None:
        os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait()


class Scene:
    """Peers of one system; the first is where the others join."""

    def __init__(self, kind: str, options: argparse.Namespace, group: int):
        self.kind, self.options, self.group = kind, options, group
        self.folder = tempfile.TemporaryDirectory()
        self.peers: list[Peer] = []

    def start(self) -> Peer:
        name = f"peer-{len(self.peers)}"
        folder = Path(self.folder.name)
        python = sys.executable if self.kind == "torchft" else str(self.options.hivemind_python)
        matchmaking, request = KINDS[self.kind]
        command = [python, str(PROJECT / "benchmarks" / "lib" / "peer_averaging_worker.py"), self.kind.partition(",")[0], str(folder), name, str(self.options.parameters),
                   str(self.options.step_seconds), str(self.group), str(matchmaking), str(request)]
        with (folder / f"{name}.err").open("w") as errors:
            child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True,
                                     env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HIVEMIND_LOGLEVEL": "ERROR"})
        self.peers.append(Peer(name, child, folder / f"{name}.jsonl"))
        return self.peers[-1]

    def wait_for(self, peer: Peer, rounds: int, since: float = 0.0) -> list[dict[str, Any]]:
        """Its first `rounds` exchanges that began after a time."""
        deadline = time.time() + LIMIT_SECONDS
        while True:
            lines = [line for line in peer.lines() if line["at"] - line["seconds"] >= since]
            if len(lines) >= rounds:
                return lines[:rounds]
            if time.time() > deadline or peer.child.poll() is not None:
                raise SystemExit(f"{self.kind}: {peer.name} did not come to {rounds} exchanges\n{self.errors()}")
            time.sleep(0.05)

    def end(self) -> None:
        for peer in self.peers:
            if peer.child.poll() is None:
                peer.kill()
        self.folder.cleanup()

    def errors(self) -> str:
        return "\n".join(Path(self.folder.name, f"{peer.name}.err").read_text()[-1500:] for peer in self.peers)


def shared(line: dict[str, Any], others: list[list[dict[str, Any]]]) -> bool:
    """Whether another peer has had the same weights after an exchange, up to what rounding does."""
    return any(max(abs(a - b) for a, b in zip(line["probe"], other["probe"], strict=True)) < TOLERANCE for lines in others for other in lines)


def same_bits(line: dict[str, Any], others: list[list[dict[str, Any]]]) -> bool:
    return any(line["hash"] == other["hash"] for lines in others for other in lines)


def steady(kind: str, options: argparse.Namespace, size: int) -> dict[str, Any]:
    scene = Scene(kind, options, size)
    try:
        first = scene.start()
        scene.wait_for(first, 1)
        for _ in range(size - 1):
            scene.start()
        for peer in scene.peers:
            scene.wait_for(peer, 3)
        since = time.time()
        counted = {peer.name: scene.wait_for(peer, options.rounds, since) for peer in scene.peers}
        logs = {peer.name: peer.lines() for peer in scene.peers}
        pairs = [(line, [logs[other] for other in logs if other != name]) for name, lines in counted.items() for line in lines]
        return {"seconds": [line["seconds"] for line, _ in pairs], "exchanges": len(pairs), "shared": sum(shared(*pair) for pair in pairs),
                "same_bits": sum(same_bits(*pair) for pair in pairs), "loss": [logs[first.name][0]["loss"], logs[first.name][-1]["loss"]]}
    finally:
        scene.end()


def churn(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    scene = Scene(kind, options, 3)
    try:
        first = scene.start()
        scene.wait_for(first, 1)
        second, doomed = scene.start(), scene.start()
        for peer in (second, doomed):
            scene.wait_for(peer, 5)
        doomed.kill()
        killed = time.time()
        survivors = [first, second]
        marks = [len(peer.lines()) for peer in survivors]
        for peer, mark in zip(survivors, marks, strict=True):
            scene.wait_for(peer, mark + 4)
        met = [max(line["seconds"] for line in peer.lines()[mark : mark + 4]) for peer, mark in zip(survivors, marks, strict=True)]
        logs = [peer.lines() for peer in survivors]
        equal = next((line["at"] - killed for line in logs[0] if line["at"] > killed and shared(line, logs[1:])), None)
        late, began = scene.start(), time.time()
        arrived, deadline = None, time.time() + LIMIT_SECONDS
        while arrived is None and time.time() < deadline:
            logs = [peer.lines() for peer in survivors]
            arrived = next((line["at"] - began for line in late.lines() if shared(line, logs)), None)
            time.sleep(0.05)
        return {"longest_exchange": met, "equal_again": equal, "late_equal": arrived, "alive": [peer.child.poll() is None for peer in survivors]}
    finally:
        scene.end()


def run(options: argparse.Namespace) -> dict[str, Any]:
    theirs = hivemind_version(options.hivemind_python) if options.hivemind_python else None
    results: dict[str, Any] = {kind: {**{f"{size} peers": [] for size in options.pairs}, "churn": []} for kind in options.systems}
    for _ in range(options.repeats):
        for kind in options.systems:  # they take turns
            for size in options.pairs:
                results[kind][f"{size} peers"].append(steady(kind, options, size))
                print(f"{kind}, {size} peers: {row_of_steady(results[kind][f'{size} peers'])}", flush=True)
            if not options.no_churn:
                results[kind]["churn"].append(churn(kind, options))
                print(f"{kind}, churn: {results[kind]['churn'][-1]}", flush=True)
    about = {"parameters": options.parameters, "step_seconds": options.step_seconds, "rounds": options.rounds, "repeats": options.repeats}
    return {**origin(), "machine": machine(packages=("torch", "torchft")), "hivemind": theirs, **about, "results": results}


def hivemind_version(python: Path) -> str:
    """What it runs with. Raises RunError for a Python that has none."""
    ask = "from importlib.metadata import version as v; print(f\"hivemind {v('hivemind')}, torch {v('torch')}\")"
    try:
        done = subprocess.run([python, "-c", ask], capture_output=True, text=True)
    except OSError as error:
        raise RunError(f"{python} does not start: {error.strerror}") from error
    if done.returncode:
        raise RunError(f"{python} has no hivemind: {done.stderr.splitlines()[-1]}")
    return done.stdout.strip()


def row_of_steady(runs: list[dict[str, Any]]) -> str:
    seconds = [value for result in runs for value in result["seconds"]]
    shared_by, bits, of = (sum(result[key] for result in runs) for key in ("shared", "same_bits", "exchanges"))
    return f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} .. {max(seconds):.2f}), shared {shared_by}/{of}, in every bit {bits}/{of}"


def as_markdown(report: dict[str, Any]) -> str:
    """Two tables."""
    sizes = [name for name in next(iter(report["results"].values())) if name != "churn"]
    times = "; ".join(f"`{kind}`: matchmaking {matching:g} s, requests {request:g} s" for kind, (matching, request) in KINDS.items() if matching)
    lines = ["# WeightAveraging over peers", "",
             f"{report['parameters']:,} parameters, about {report['step_seconds']} s of training between two exchanges, {report['rounds']} exchanges "
             f"a peer, {report['repeats']} turn(s); {report['machine']['cpu']}, {report['machine']['cores']} cores. {tables.made_by(report)}", "",
             *([f"{report['hivemind']}. {times}.", ""] if report["hivemind"] else []),
             "Seconds an exchange, median (least .. most), and how many of them another peer shared:", "",
             "| system | " + " | ".join(sizes) + " |", "|---|" + "---|" * len(sizes)]
    lines += [f"| {kind} | " + " | ".join(row_of_steady(parts[size]) for size in sizes) + " |" for kind, parts in report["results"].items()]
    lines += ["", "One of three killed, then another one started; medians:", "",
              "| system | longest exchange of the survivors after the death | survivors equal again after | newcomer equal to another after |",
              "|---|---|---|---|"]
    for kind, parts in report["results"].items():
        if parts["churn"]:
            lines.append(f"| {kind} | {middle([max(one['longest_exchange']) for one in parts['churn']])} | "
                         f"{middle([one['equal_again'] for one in parts['churn']])} | {middle([one['late_equal'] for one in parts['churn']])} |")
    return "\n".join(lines) + "\n"


def middle(values: list[float | None]) -> str:
    found = [value for value in values if value is not None]
    text = f"{statistics.median(found):.1f} s" if found else "never"
    return text if len(found) == len(values) else f"{text}; not at all in {len(values) - len(found)} of {len(values)}"


def parse_arguments() -> argparse.Namespace:
    parser = Parser("python benchmarks/peer_averaging.py", "WeightAveraging over peers that die and come late: ours (torchft) against hivemind's.",
                    example="python benchmarks/peer_averaging.py --systems torchft --rounds 5 --pairs 2")
    what = parser.add_argument_group("what is compared")
    what.add_argument("--systems", type=lambda text: text.split(";"), default=list(KINDS), metavar="A;B",
                      help=f"of {'; '.join(KINDS)} (default: all)")
    what.add_argument("--hivemind-python", type=Path, metavar="FILE", help="a Python that has hivemind (default: none, for --systems torchft)")
    what.add_argument("--pairs", type=several(int), default="2,3", metavar="N,M", help="numbers of peers (default: %(default)s)")
    what.add_argument("--no-churn", action="store_true", help="the steady scenes only")
    work = parser.add_argument_group("what the peers do")
    work.add_argument("--parameters", type=at_least_one, default=4_417_608, metavar="N", help="of the network (default: those of the preset spt-lsa)")
    work.add_argument("--step-seconds", type=float, default=1.0, metavar="S", help="seconds of training between two exchanges (default: 1)")
    how = parser.add_argument_group("how it is measured")
    how.add_argument("--rounds", type=at_least_one, default=10, metavar="N", help="exchanges a peer that count (default: %(default)s)")
    how.add_argument("--repeats", type=at_least_one, default=3, metavar="N", help="turns of every system (default: %(default)s)")
    add_reports(parser)
    options = parser.parse_args()
    if not set(options.systems) <= set(KINDS):
        parser.error(f"--systems {';'.join(options.systems)}: known are {'; '.join(KINDS)}")
    if options.systems != ["torchft"] and not options.hivemind_python:
        parser.error("--hivemind-python FILE names the Python that has hivemind; without one, --systems torchft")
    return options


def main() -> int:
    options = parse_arguments()
    return run_cli(lambda: measure_and_report(options))


def measure_and_report(options: argparse.Namespace) -> None:
    report = run(options)
    print("\n" + as_markdown(report))
    keep((options.json, json.dumps(report, indent=2) + "\n"), (options.markdown, as_markdown(report)))


if __name__ == "__main__":
    sys.exit(main())
