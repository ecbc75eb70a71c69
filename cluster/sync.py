"""Copies code and dataset to the hosts that lack them, and makes the Python environment there: what `--sync` does.

Nothing is deleted on a host, and its run folders are not touched.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster import remote
from cluster.host_checks import Answer
from cluster.remote import Host, Unreachable, say

# At the top of the project: what belongs to a machine or to its runs.
KEPT = ["/.venv", "/data", "/runs", "/results", "/.torch_extensions", "__pycache__", ".pytest_cache", ".ruff_cache"]


def mend(report: Any, what: dict[str, Any], inspect: Callable) -> Any:
    """Do what can be done from here for the hosts of a report, and look again."""
    if shutil.which("rsync") is None:
        say("this machine has no rsync: apt-get install rsync")
        return report
    own = remote.ask("localhost", "probe.py", what)
    pairs = [
        (host, answer)
        for host, answer in zip(report.hosts, report.answers, strict=True)
        if not isinstance(answer, Unreachable) and not remote.is_here(host.name)
    ]
    for (host, _), failure in zip(pairs, remote.at_once(lambda pair: _mend_one(*pair, own, what), pairs), strict=True):
        if failure:
            say(f"{host.name} {failure.reason}: {failure.mend}")
    return inspect(report.hosts, what)


def _mend_one(host: Host, answer: Answer, own: dict[str, Any], what: dict[str, Any]) -> None:
    if not answer["rsync"]:
        raise Unreachable("has no rsync", "apt-get install rsync there")
    project = what["project"]
    if (
        any(answer["code"].get(path) != digest for path, digest in own["code"].items())
        or answer["commit"] != own["commit"]
    ):
        say(f"{host.name}: copying the project to {project}")
        copy(host, project, [f"--exclude={name}" for name in KEPT])
    if own["data"] and answer["data"] != own["data"]:
        say(f"{host.name}: copying {what['data']}")
        # dataset.json last: it says that the rest is there
        copy(host, what["data"], ["--exclude=/dataset.json"])
        copy(host, what["data"], [])
    if (own["environment"] or {}).keys() - (answer["environment"] or {}).keys():
        make_environment(host, project, what["python"])


def make_environment(host: Host, project: str, python: str) -> None:
    """The project's .venv on a host, by the script that makes it here. Raises Unreachable: why not."""
    if not python.startswith(f"{project}/.venv/"):
        raise Unreachable(
            f"has no interpreter {python}",
            f"--sync makes {project}/.venv only; start with that one here too (environment/setup.sh)",
        )
    say(f"{host.name}: making the Python environment (minutes)")
    driver = [f"DRIVER_CUDA={os.environ['DRIVER_CUDA']}"] if os.environ.get("DRIVER_CUDA") else []
    words = ["env", f"PYTHON={python}", *driver, f"{project}/environment/setup.sh"]
    run(host, remote.command(host.name, words), "could not make the environment")


def copy(host: Host, folder: str, options: list[str]) -> None:
    """The content of a folder to the same path on a host."""
    run(host, remote.command(host.name, ["mkdir", "-p", str(Path(folder))]), "could not make the folder")
    ssh = " ".join(remote.SSH)
    run(
        host,
        ["rsync", "-a", "--partial", *options, "-e", ssh, f"{folder}/", f"{host.name}:{folder}/"],
        "could not be given a copy",
    )


def run(host: Host, words: list[str], failure: str) -> None:
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise Unreachable(failure, " / ".join(last) or f"exit code {done.returncode}")
