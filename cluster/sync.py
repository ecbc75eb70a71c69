"""Copy code and dataset to hosts that lack them, and create the Python environment there: the work of `--sync`.

Only the project's own files are copied: those that git tracks, and new code files. Run folders, `.git`, `.env` and
other private files stay here. Nothing is deleted on a host; code files that only the host has are moved to
`.stale-code/`.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster import remote
from cluster.host_checks import stale_files
from cluster.remote import Host, Unreachable, say

# Top-level folders that belong to one machine or to its runs.
KEPT = {"data", "runs", "results"}
# Runs on the host: argv = the project, the folder for stale files. Reads one path per NUL from standard input.
MOVE = """
import os, sys
project, aside = sys.argv[1:]
for path in filter(None, sys.stdin.read().split("\\0")):
    target = os.path.join(aside, path)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    os.rename(os.path.join(project, path), target)
    try:
        os.removedirs(os.path.dirname(os.path.join(project, path)))
    except OSError:
        pass  # it still holds other files
"""


def fix_hosts(report: Any, what: dict[str, Any], inspect: Callable) -> Any:
    """Copy what the hosts of a report lack, as far as possible from here, and check them again."""
    if shutil.which("rsync") is None:
        say("error: this machine has no rsync; type: apt-get install rsync")
        return report
    own = remote.ask("localhost", "probe.py", what)
    pairs = [
        (host, answer)
        for host, answer in zip(report.hosts, report.answers, strict=True)
        if not isinstance(answer, Unreachable) and not remote.is_here(host.name)
    ]
    failures = remote.at_once(lambda pair: _fix_host(pair[0], pair[1], own, what), pairs)
    for (host, _), failure in zip(pairs, failures, strict=True):
        if failure:
            say(f"error: {host.name} {failure.reason}: {failure.fix}")
    return inspect(report.hosts, what)


def _fix_host(host: Host, answer: dict[str, Any], own: dict[str, Any], what: dict[str, Any]) -> None:
    if not answer["rsync"]:
        raise Unreachable("has no rsync", "apt-get install rsync there")
    project = what["project"]
    if any(answer["code"].get(path) != digest for path, digest in own["code"].items()):
        say(f"{host.name}: copying the project to {project}")
        copy(host, project, files_to_copy(project, own["code"], [what["runs"], what["data"]]))
    if stale := stale_files(answer["code"], own["code"]):
        move_aside(host, project, stale)
    if own["data"] and answer["data"] != own["data"]:
        say(f"{host.name}: copying {what['data']}")
        copy_data(host, what["data"], what["runs"])
    if (own["environment"] or {}).keys() - (answer["environment"] or {}).keys():
        create_environment(host, project, what["python"], own["environment"]["python"])


def files_to_copy(project: str, code: dict[str, str], runs: list[str]) -> list[str]:
    """Paths in the project that a host needs: tracked files (without git, all visible files) and code files.

    Args:
        code: the code files by `probe.code_of`, which holds new ones that git does not track yet.
        runs: folders of runs and data; if one is inside the project, its files are left out.
    """
    words = ["git", "-C", project, "ls-files", "-z"]
    try:
        listed = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="surrogateescape"
        )
        found = set(filter(None, listed.stdout.split("\0"))) if listed.returncode == 0 else set()
    except OSError:  # git is not installed
        found = set()
    kept = [*sorted(KEPT), *inside_of(project, runs)]
    for path in () if found else Path(project).rglob("*"):
        inside = path.relative_to(project)
        if path.is_file() and not any(part[0] == "." or part == "__pycache__" for part in inside.parts):
            found.add(str(inside))
    chosen = sorted(
        path
        for path in found | code.keys()
        if os.path.lexists(os.path.join(project, path))
        and not any(Path(path).is_relative_to(folder) for folder in kept)
    )
    run_folders = {os.path.dirname(path) for path in chosen if os.path.basename(path) == "run.json"} - {""}
    return [path for path in chosen if not any(Path(path).is_relative_to(folder) for folder in run_folders)]


def inside_of(folder: str, others: list[str]) -> list[str]:
    """Those of the other folders that lie inside `folder`, relative to it."""
    folder = os.path.realpath(folder)
    paths = [Path(os.path.realpath(other)) for other in others if other]
    return [str(path.relative_to(folder)) for path in paths if path.is_relative_to(folder) and path != Path(folder)]


def copy_data(host: Host, data: str, runs: str) -> None:
    """Copy a prepared dataset. Links out of its folder are copied as what they lead to: a class may be a link."""
    options = ["--copy-unsafe-links", *(f"--exclude=/{inside}/" for inside in inside_of(data, [runs]))]
    # dataset.json last: its presence means that the copy is complete
    copy(host, data, options=[*options, "--exclude=/dataset.json"])
    copy(host, data, options=options)


def move_aside(host: Host, project: str, paths: list[str]) -> None:
    """Move code files that only the host has out of Python's sight, into the hidden folder .stale-code/TIME."""
    aside = f"{project}/.stale-code/{time.strftime('%Y%m%d-%H%M%S')}"
    say(f"{host.name}: moving {len(paths)} code file{'' if len(paths) == 1 else 's'} that are not here to {aside}")
    words = remote.command(host.name, ["python3", "-c", MOVE, project, aside])
    run(host, words, "could not move stale code files", "\0".join(paths))


def create_environment(host: Host, project: str, python: str, version: str) -> None:
    """Create the project's .venv on a host with environment/setup.sh.

    Args:
        python: the interpreter in .venv, and its `version`, of which the host's own Python should be if it has that.

    Raises:
        Unreachable: with the reason.
    """
    if not python.startswith(f"{project}/.venv/"):
        raise Unreachable(
            f"has no interpreter {python}",
            f"--sync creates {project}/.venv only; start with that one here too (environment/setup.sh)",
        )
    say(f"{host.name}: creating the Python environment (minutes)")
    driver = [f"DRIVER_CUDA={os.environ['DRIVER_CUDA']}"] if os.environ.get("DRIVER_CUDA") else []
    first = f"FIRST_PYTHON=python{'.'.join(version.split('.')[:2])}"
    words = ["env", f"PYTHON={python}", first, *driver, f"{project}/environment/setup.sh"]
    run(host, remote.command(host.name, words), "could not create the environment")


def copy(host: Host, folder: str, paths: list[str] | None = None, options: list[str] | None = None) -> None:
    """Copy a folder, or only `paths` in it, to the same path on a host."""
    run(host, remote.command(host.name, ["mkdir", "-p", "--", str(Path(folder))]), "could not create the folder")
    # --protect-args: before 3.2.4, rsync let the shell there split the path at its spaces
    words = ["rsync", "-a", "--partial", "--protect-args", *(options or []), "-e", shlex.join(remote.SSH)]
    if paths is not None:
        words += ["--from0", "--files-from=-"]
    words += ["--", f"{folder}/", f"{host.name}:{folder}/"]
    run(host, words, "could not receive a copy", None if paths is None else "\0".join(paths))


def run(host: Host, words: list[str], failure: str, text: str | None = None) -> None:
    """Run a command with `text` as its input. Raises Unreachable with the last lines of its output."""
    done = subprocess.run(words, input=text or "", capture_output=True, text=True, errors="surrogateescape")
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise Unreachable(failure, " / ".join(last) or f"exit code {done.returncode}")
