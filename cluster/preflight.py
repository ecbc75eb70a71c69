"""Check in parallel whether training can start on every host of the hostfile, and print what to fix first.

    python cluster/preflight.py              checks the project's hostfile and its dataset data/cifar100
    python cluster/preflight.py --hostfile lab --data-dir data/imagenet --measure        also bandwidth and latency
    python cluster/preflight.py --sync       copies code and dataset to hosts that lack them, creates the environment

Prints a table with one row per host. Exit codes: 0 training can start, 3 something must be fixed, 2 the hostfile is
wrong. ./launch_distributed_train.sh runs the same check before each start.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cluster import host_checks as checks  # noqa: E402
from cluster import hostfile, remote, sync
from cluster.host_checks import Answer, Problem  # noqa: E402
from cluster.remote import Host, Unreachable, say  # noqa: E402
from common.errors import SettingsError
from common.paths import PROJECT
from config.command_line import Parser, run_cli  # noqa: E402
from config.own_modules import files_of
from config.own_parts import OwnPart, own_parts_of
from config.settings import as_typed
from config.toml_file import read_toml

EXIT_USAGE, EXIT_PREFLIGHT = 2, 3


@dataclass
class Rendezvous:
    """Address and port where the ranks meet, and each host's network interface that leads there."""

    address: str
    port: int
    interfaces: dict[str, str]


@dataclass
class Report:
    """The hosts' answers. `rendezvous` is None if training cannot start."""

    hosts: list[Host]
    answers: list[Answer]
    problems: list[Problem]
    table: str
    on_cpu: bool
    rendezvous: Rendezvous | None

    @property
    def can_start(self) -> bool:
        return not any(not problem.warning for problem in self.problems)

    def absent(self) -> list[Host]:
        """The hosts that do not answer."""
        return [host for host, answer in zip(self.hosts, self.answers, strict=True) if isinstance(answer, Unreachable)]

    def show(self) -> None:
        say(self.table)
        serious = [problem for problem in self.problems if not problem.warning]
        for problem in self.problems:
            if problem.warning:
                say(f"warning: {problem}")
        if serious:
            say(f"\nerror: {serious[0]}")
            for problem in serious[1:]:
                say(f"error: {problem}")


def hosts_of(path: str) -> list[Host]:
    """The machines of a hostfile. If the file is wrong, print one sentence and end the program."""
    try:
        return [Host(*line) for line in hostfile.read(path)]
    except hostfile.HostfileError as error:
        say(f"error: {error}")
        raise SystemExit(EXIT_USAGE) from None


def request(python: str, data: Path, runs: Path, arguments: list[str]) -> dict[str, Any]:
    """The request for every host: the same paths everywhere."""
    return {
        "project": str(PROJECT),
        "python": python,
        "data": str(data.absolute()),
        "runs": str(runs.absolute()),
        "cwd": os.getcwd(),
        "given": given_files(arguments),
    }


def given_files(arguments: list[str]) -> list[str]:
    """The files that train.py reads because of its arguments: those named, user-defined parts and what these import."""
    found: set[str] = set()
    parts: list[OwnPart] = []
    for argument in arguments:
        words = argument.split("=")
        for text in ("=".join(words[i:]) for i in range(len(words))):  # such as --set=PATH=FILE.py:NAME
            file = Path(os.path.abspath(os.path.expanduser(text)))
            parts += own_parts_of(as_typed(text), (Path.cwd(), PROJECT))
            if os.path.isfile(file):
                found.add(str(file))
                if file.suffix == ".toml":
                    with suppress(SettingsError):  # train.py says why
                        parts += own_parts_of(read_toml(file, text), (file.parent,))
    return sorted(found | {str(file) for part in parts for file in files_of(part.file) if file.is_file()})


def inspect(hosts: list[Host], what: dict[str, Any]) -> Report:
    """Check all hosts in parallel; takes seconds."""
    here, *answers = remote.at_once(
        lambda name: remote.ask(name, "probe.py", what), ["localhost", *(host.name for host in hosts)]
    )
    if isinstance(here, Unreachable):
        say(f"error: this machine {here.reason}: {here.fix}")
        raise SystemExit(EXIT_PREFLIGHT)
    present = [answer for answer in answers if not isinstance(answer, Unreachable)]
    on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu" or not any(answer["gpus"] for answer in present)
    problems = checks.check(hosts, answers, here, on_cpu)
    ports, rendezvous = {}, None
    if len(present) == len(hosts):
        rendezvous, unmet = find_rendezvous(hosts, answers)
        problems = unmet + problems
        ports = {host.name: "ok" for host in hosts} | {problem.host: "closed!" for problem in unmet}
    return Report(hosts, answers, problems, checks.table(hosts, answers, here, ports, on_cpu), on_cpu, rendezvous)


def master_port() -> int | None:
    """The port from the variable MASTER_PORT; None if it is unset or empty. Raises ValueError."""
    text = os.environ.get("MASTER_PORT", "")
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and 1024 <= int(text) <= 65535):
        raise ValueError(f"MASTER_PORT must be a port number from 1024 to 65535, not '{text}'")
    return int(text)


@contextmanager
def listening(name: str, seconds: float = 15) -> Iterator[tuple[int, str]]:
    """Start a program on a host that listens on a free port and answers clients with the token: (port, token)."""
    token = secrets.token_hex(16)
    words = {"role": "listen", "token": token, "seconds": seconds, "port": master_port() or 0}
    process = remote.start(name, ["python3", "-", json.dumps(words)])
    assert process.stdin and process.stdout and process.stderr
    try:
        process.stdin.write((PROJECT / "cluster" / "reachability.py").read_text())
        process.stdin.close()
        for line in process.stdout:
            found = remote.answer_in(line, "reachability.py")
            if "port" in found:
                yield found["port"], token
                return
            if "error" in found:
                raise Unreachable(f"has no free port ({found['error']})", "choose another MASTER_PORT, or unset it")
        raise remote.explain(name, process.wait(), process.stderr.read())
    finally:
        process.kill()
        process.wait()


def find_rendezvous(hosts: list[Host], answers: list[dict[str, Any]]) -> tuple[Rendezvous | None, list[Problem]]:
    """Find an address and a free port of the first host that all others can connect to."""
    first, others = hosts[0], hosts[1:]
    own = [address for _, address in answers[0]["addresses"]]
    known = os.environ.get("MASTER_ADDR") or remote.address_of(first.name)
    candidates = (
        [known]
        if known and os.environ.get("MASTER_ADDR")
        else [*([known] if known and known in own else []), *(a for a in own if a != known)]
    )
    try:
        with listening(first.name) as (port, token):
            if not others:
                return Rendezvous("127.0.0.1", port, {}), []
            if not candidates:
                return None, [
                    Problem(
                        first.name,
                        "has no network address (IPv4) except the loopback",
                        "connect it to the network of the others",
                    )
                ]
            asked = {"role": "connect", "token": token, "port": port, "addresses": candidates}
            results = remote.at_once(lambda host: remote.ask(host.name, "reachability.py", asked), others)
    except Unreachable as error:
        return None, [Problem(first.name, error.reason, error.fix)]
    lost = [
        Problem(host.name, result.reason, result.fix)
        for host, result in zip(others, results, strict=True)
        if isinstance(result, Unreachable)
    ]
    if lost:
        return None, lost
    for address in candidates:
        reached = [result["reached"][address] for result in results]
        if all("error" not in result for result in reached):
            first_address = reached[0]["there"]  # `address` may be a name: MASTER_ADDR=node1
            used = zip(hosts, answers, [first_address, *(result["here"] for result in reached)], strict=True)
            return Rendezvous(
                address, port, {host.name: name for host, answer, own in used if (name := interface_of(answer, own))}
            ), []
    fix = "open all ports from 1024 up between the hosts (training uses many), or set MASTER_ADDR to another address"
    shut_out = [
        (host, result["reached"])
        for host, result in zip(others, results, strict=True)
        if all("error" in tried for tried in result["reached"].values())
    ]
    if shut_out:
        return None, [
            Problem(host.name, f"cannot reach {first.name}: {_tried(reached, port)}", fix) for host, reached in shut_out
        ]
    return None, [Problem(first.name, f"has no address that all others reach (of {', '.join(candidates)})", fix)]


def interface_of(answer: dict[str, Any], address: str) -> str | None:
    """The network interface that has this address on a host; None if there is none."""
    return next((name for name, own in answer["addresses"] if own == address), None)


def _tried(reached: dict[str, dict], port: int) -> str:
    return ", ".join(f"{address} port {port}: {result['error']}" for address, result in reached.items())


def measure(hosts: list[Host], answers: list[Answer], interfaces: dict[str, str]) -> list[str]:
    """Measure latency and bandwidth from each host to the next, one pair at a time so that no two share a link.

    A host is reached by the address of its interface in `interfaces`, which training uses.
    """
    lines = []
    ring = list(zip(hosts, [*hosts[1:], hosts[0]], strict=True)) if len(hosts) > 2 else [(hosts[0], hosts[-1])]
    for source, target in ring if len(hosts) > 1 else []:
        answer = answers[hosts.index(target)]
        assert not isinstance(answer, Unreachable)
        used = interfaces.get(target.name)
        address = min(answer["addresses"], key=lambda own: own[0] != used)[1]
        try:
            with listening(target.name) as (port, token):
                asked = {"role": "connect", "token": token, "port": port, "addresses": [address], "measure": True}
                best = remote.ask(source.name, "reachability.py", asked)["reached"][address]
            lines.append(
                f"{source.name} -> {target.name}: {best['error']}"
                if "error" in best
                else f"{source.name} -> {target.name}: {best['gigabits']:g} Gbit/s (one TCP stream), "
                f"{best['latency_ms']:g} ms round trip"
            )
        except Unreachable as error:
            lines.append(f"{source.name} -> {target.name}: {error.reason}")
    return lines


def look(hosts: list[Host], what: dict[str, Any], copies: bool, measures: bool) -> Report:
    """Check all hosts, copy what they lack if asked to, print the report, and measure their links if asked to."""
    report = inspect(hosts, what)
    if copies and not report.can_start:
        report = sync.fix_hosts(report, what, inspect)
    report.show()
    if measures and report.rendezvous:
        say("\n".join(measure(hosts, report.answers, report.rendezvous.interfaces)))
    return report


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        "python cluster/preflight.py",
        "Check whether training can start on all hosts of the hostfile, and print what to fix.",
        example="python cluster/preflight.py --hostfile hostfile --measure",
    )
    where = parser.add_argument_group("paths")
    where.add_argument(
        "--hostfile",
        default=str(PROJECT / "hostfile"),
        metavar="FILE",
        help="hostfile with the hosts and their slots (default: hostfile)",
    )
    where.add_argument(
        "--python",
        default=sys.executable,
        metavar="FILE",
        help="Python interpreter for training, at the same path on every host (default: this one)",
    )
    where.add_argument(
        "--data-dir",
        type=Path,
        default=PROJECT / "data" / "cifar100",
        metavar="DIR",
        help="folder of the prepared dataset (default: data/cifar100)",
    )
    where.add_argument(
        "--runs-dir",
        type=Path,
        default=PROJECT / "runs",
        metavar="DIR",
        help="parent folder of run folders (default: runs)",
    )
    more = parser.add_argument_group("more actions")
    more.add_argument("--measure", action="store_true", help="measure bandwidth and latency between the hosts")
    more.add_argument(
        "--sync",
        action="store_true",
        help="copy code and dataset to hosts that lack them, and create the Python environment there",
    )
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    hosts = hosts_of(args.hostfile)
    try:
        master_port()
    except ValueError as error:
        say(f"error: {error}")
        return EXIT_USAGE
    began = time.time()
    what = request(args.python, args.data_dir, args.runs_dir, [])
    report = look(hosts, what, args.sync, args.measure)
    say(
        f"{len(hosts)} hosts, {sum(host.slots for host in hosts)} ranks: "
        f"{'ready' if report.can_start else 'not ready'} ({time.time() - began:.1f} s)"
    )
    return 0 if report.can_start else EXIT_PREFLIGHT


if __name__ == "__main__":
    sys.exit(run_cli(main))
