"""Compare the hosts' answers: a table with one row per host, and the problems in words, each with a fix.

Nothing here contacts a host; `preflight.py` does. docs/cluster.md lists every message.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cluster.probe import IMPORTABLE
from cluster.remote import Host, Unreachable

MIN_DISK_GB, MIN_SHM_GB = 5, 0.5
MIN_FREE_SHARE = 0.9  # of a GPU's memory; less means that another program uses it
MAX_SKEW_SECONDS = 5.0
PACKAGES = ("torch", "cuda", "deepspeed", "dali", "numpy")
COLUMNS = ("host", "code", "python", "torch", "deepspeed", "dali", "gpus", "data", "disk", "clock", "port")


@dataclass(frozen=True)
class Problem:
    """`what` continues a sentence that begins with the host's name. A warning does not prevent the start."""

    host: str
    what: str
    fix: str
    warning: bool = False

    def __str__(self) -> str:
        return f"{self.host} {self.what}.\n    {'' if self.warning else 'Fix: '}{self.fix}"


Answer = dict[str, Any] | Unreachable


def check(hosts: list[Host], answers: list[Answer], here: dict[str, Any], on_cpu: bool) -> list[Problem]:
    """All problems, errors before warnings. `here` is the answer of the machine on which the command was typed."""
    pairs = list(zip(hosts, answers, strict=True))
    problems = [
        Problem(host.name, answer.reason, answer.fix) for host, answer in pairs if isinstance(answer, Unreachable)
    ]
    present = [(host, answer) for host, answer in pairs if not isinstance(answer, Unreachable)]
    for test in (_machines, _code, _environment, _gpus, _data, _disk_space, _clock):
        problems += test(present, here, on_cpu)
    return sorted(problems, key=lambda problem: problem.warning)


def _machines(present: list, here: dict, on_cpu: bool) -> list[Problem]:
    problems = []
    names: dict[str, str] = {}
    for host, answer in present:
        if not answer.get("identity"):
            continue
        first = names.setdefault(answer["identity"], host.name)
        if first != host.name:
            fix = f"two starts on one machine would compete for its GPUs; write one line for it, under the name {first}"
            problems.append(Problem(host.name, f"is the same machine as {first}", fix))
    return problems


def _code(present: list, here: dict, on_cpu: bool) -> list[Problem]:
    problems = []
    for host, answer in present:
        name, files = host.name, answer["code"]
        if not answer["project"] or not files:
            problems.append(
                Problem(
                    name, "does not have the project at this path", f"copy it: --sync, or use a disk that {name} shares"
                )
            )
            continue
        if not answer["cwd"]:
            problems.append(Problem(name, "does not have your current folder", "start from the project's folder"))
        differ = sorted(path for path in here["code"] if files.get(path) != here["code"][path])
        if differ:
            if answer["commit"] != here["commit"]:
                what = f"has another commit ({answer['commit'][:8] or 'none'}, here {here['commit'][:8] or 'none'})"
            else:
                what = "has the same commit, but other uncommitted changes"
            problems.append(
                Problem(name, f"{what}: {_first_few(differ)}", "copy this machine's code: --sync, or git pull there")
            )
        extra = stale_files(files, here["code"])
        if extra:
            fix = "they can shadow modules: --sync moves them to the project's .stale-code, or remove them there"
            problems.append(Problem(name, f"has code files that are not here: {_first_few(extra)}", fix))
        missing = sorted(path for path in here["given"] if path not in answer["given"])
        other = sorted(
            path for path in here["given"] if answer["given"].get(path, here["given"][path]) != here["given"][path]
        )
        if missing or other:
            what = f"does not have {_first_few(missing)}" if missing else f"has other content in {_first_few(other)}"
            problems.append(Problem(name, f"{what}, which the command line needs", "copy it there, to the same path"))
    return problems


def stale_files(files: dict[str, str], here: dict[str, str]) -> list[str]:
    """The files of a host that Python could import and that this machine does not have."""
    return sorted(path for path in files.keys() - here.keys() if path.endswith(IMPORTABLE))


def _environment(present: list, here: dict, on_cpu: bool) -> list[Problem]:
    problems = [
        Problem(
            host.name,
            "has no usable Python environment at this path",
            "create it there: --sync, or environment/setup.sh on that host",
        )
        for host, answer in present
        if not answer["environment"]
    ]
    equipped = [(host, answer["environment"]) for host, answer in present if answer["environment"]]
    for host, found in equipped[1:]:
        first, wanted = equipped[0][0].name, equipped[0][1]
        own, python = _version(found, "python"), _version(wanted, "python")
        if own != python:  # packages may follow from it, and setup.sh keeps the Python of an existing environment
            fix = f"install python{python} there, remove .venv, and run PYTHON=python{python} environment/setup.sh"
            problems.append(Problem(host.name, f"has Python {own} ({first}: {python})", fix))
            continue
        differ = [
            f"{name} {found.get(name, 'missing')} ({first}: {wanted.get(name, 'missing')})"
            for name in PACKAGES
            if _version(found, name) != _version(wanted, name)
        ]
        if differ:
            fix = "run environment/setup.sh on both, with the same DRIVER_CUDA"
            problems.append(Problem(host.name, f"has other versions: {_first_few(differ)}", fix))
    return problems


def _version(found: dict[str, str], name: str) -> str | None:
    """The version to compare. Python 3.11.7 and 3.11.9 run the same code, so only major and minor count there."""
    version = found.get(name)
    return ".".join(version.split(".")[:2]) if version and name == "python" else version


def _gpus(present: list, here: dict, on_cpu: bool) -> list[Problem]:
    if on_cpu:
        return []
    problems = []
    kinds = {host.name: sorted({gpu["name"] for gpu in answer["gpus"][: host.slots]}) for host, answer in present}
    for host, answer in present:
        gpus = answer["gpus"]
        if len(gpus) < host.slots:
            what = f"has {len(gpus)} GPUs and {host.slots} slots" if gpus else "shows no GPU (nvidia-smi)"
            fix = (
                f"write slots={len(gpus)}"
                if gpus
                else "check nvidia-smi on that host, or set DS_ACCELERATOR=cpu to train on the CPUs"
            )
            problems.append(Problem(host.name, what, fix))
        busy = [gpu for gpu in gpus[: host.slots] if gpu["total"] and gpu["free"] < MIN_FREE_SHARE * gpu["total"]]
        if busy:
            free = ", ".join(
                f"GPU {gpu['index']}: {gpu['free'] / 1024:.0f} of {gpu['total'] / 1024:.0f} GB free" for gpu in busy[:4]
            )
            problems.append(
                Problem(
                    host.name, f"has GPUs in use ({free})", "nvidia-smi on that host names the programs", warning=True
                )
            )
        first = present[0][0].name
        if kinds[host.name] and kinds[first] and kinds[host.name] != kinds[first]:
            problems.append(
                Problem(
                    host.name,
                    f"has other GPUs ({_first_few(kinds[host.name])}) than {first} ({_first_few(kinds[first])})",
                    "training runs at the pace of the slowest",
                    warning=True,
                )
            )
    return problems


def _data(present: list, here: dict, on_cpu: bool) -> list[Problem]:
    reference = next((answer["data"] for answer in [here, *(answer for _, answer in present)] if answer["data"]), None)
    if reference is None:
        return []  # each host prepares the dataset at the start
    problems = []
    for host, answer in present:
        found = answer["data"]
        if found is None:
            problems.append(
                Problem(
                    host.name, "does not have the dataset", "copy it: --sync, or prepare it there with the same command"
                )
            )
        elif found["fingerprint"] != reference["fingerprint"]:
            what = f"has another dataset ({_short(found)}, elsewhere {_short(reference)})"
            problems.append(Problem(host.name, what, "copy the right one: --sync"))
        elif found["sizes"] != reference["sizes"]:
            differ = [name for name, size in reference["sizes"].items() if found["sizes"].get(name) != size]
            problems.append(
                Problem(
                    host.name, f"has an incomplete copy of the dataset ({_first_few(differ)})", "copy it again: --sync"
                )
            )
        elif found["missing"]:
            fix = "copy the image tree to the same path there (--sync copies the data folder only), or share its disk"
            problems.append(Problem(host.name, f"does not have images of the dataset ({found['missing'][0]})", fix))
    return problems


def _short(data: dict[str, Any]) -> str:
    return data["fingerprint"].removeprefix("sha256:")[:8]


def _disk_space(present: list, here: dict, on_cpu: bool) -> list[Problem]:
    problems = []
    for host, answer in present:
        if answer["disk"] is not None and answer["disk"] < MIN_DISK_GB:
            full = answer["disk"] < 0.2
            problems.append(
                Problem(
                    host.name,
                    f"has {answer['disk']:g} GB left on the disk of the run folders",
                    "free disk space, or choose another folder with --runs-dir",
                    warning=not full,
                )
            )
        if not on_cpu and host.slots > 1 and answer["shm"] is not None and answer["shm"] < MIN_SHM_GB:
            problems.append(
                Problem(
                    host.name,
                    f"has {answer['shm']:g} GB in /dev/shm, which NCCL needs",
                    "in a container: docker run --shm-size=8g (or --ipc=host)",
                    warning=True,
                )
            )
    return problems


def _clock(present: list, here: dict, on_cpu: bool) -> list[Problem]:
    return [
        Problem(
            host.name,
            f"has a clock that is {abs(skew(answer)):.0f} s {'ahead' if skew(answer) > 0 else 'behind'}",
            "start a time service there: apt-get install chrony",
            warning=True,
        )
        for host, answer in present
        if abs(skew(answer)) > MAX_SKEW_SECONDS
    ]


def skew(answer: dict[str, Any]) -> float:
    """Seconds that a host's clock is ahead of ours (negative: behind).

    The host read its clock between our question and the arrival of its answer, so a time within these two is no
    difference.
    """
    return min(0.0, answer["time"] - answer["asked"]) or max(0.0, answer["time"] - answer["arrived"])


def _first_few(items: list[str], most: int = 3) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def table(hosts: list[Host], answers: list[Answer], here: dict[str, Any], ports: dict[str, str], on_cpu: bool) -> str:
    """One row per host; `!` marks a cell that differs from what it should be."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    present = [answer for answer in answers if not isinstance(answer, Unreachable)]
    wanted: dict[str, str] = next((answer["environment"] for answer in present if answer["environment"]), {})
    data = next((answer["data"] for answer in [here, *present] if answer["data"]), None)
    for host, answer in zip(hosts, answers, strict=True):
        if isinstance(answer, Unreachable):
            rows.append((host.name, answer.reason))
            continue
        found = answer["environment"] or {}
        same = all(answer["code"].get(path) == digest for path, digest in here["code"].items())
        same = same and not stale_files(answer["code"], here["code"])
        code = (answer["commit"][:8] or "no git") + ("" if same else "!") if answer["code"] else "missing!"
        versions = [
            found.get(name, "missing") + ("" if found and _version(found, name) == _version(wanted, name) else "!")
            for name in ("python", "torch", "deepspeed", "dali")
        ]
        gpus = (
            f"{host.slots} on CPU"
            if on_cpu
            else f"{len(answer['gpus'])}/{host.slots}" + ("" if len(answer["gpus"]) >= host.slots else "!")
        )
        shard = _short(answer["data"]) if answer["data"] else "none"
        shard += "" if answer["data"] == data else "!"
        disk = "?" if answer["disk"] is None else f"{answer['disk']:.0f} GB"
        rows.append(
            (host.name, code, *versions, gpus, shard, disk, f"{skew(answer):+.0f} s", ports.get(host.name, "-"))
        )
    widths = [max(len(row[i]) for row in rows if len(row) == len(COLUMNS)) for i in range(len(COLUMNS))]
    widths[0] = max(len(row[0]) for row in rows)
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows
    )
