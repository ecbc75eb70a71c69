"""Provenance of a run: command, commit, source code, and versions, so that the run can be repeated.

The commit is that of this project or None: an unpacked download inside another repository, a folder that git refuses,
and a machine without git give None, and `commit_unknown` says why. The source is every Python file of the project that
the process has imported, and every user-defined part that it has loaded, with a digest of each.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from common.files import write_atomically
from common.paths import PROJECT
from common.text import quoted

CODE_DIFF = "code.diff"  # in a run folder: the imported files against the commit
MOST_BYTES = 1_000_000  # of code.diff
GIT_SECONDS = 20  # a repository on a stalled network disk must not stall the training
NOT_SOURCE = ("tests", "data", "runs", "results")  # folders of the project that hold no code of a run
PACKAGES = (
    "torch",
    "torchvision",
    "deepspeed",
    "torchft",
    "numpy",
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
    "nvidia-dali-cuda110",
)


def provenance(own_parts: Iterable[Path] = ()) -> dict[str, Any]:
    """Return command, commit, source and versions, ready for JSON.

    Args:
        own_parts: files of user-defined parts that are not found among the imported modules.

    Returns:
        `commit` and `uncommitted_changes` are None where they are not known; `commit_unknown` then says why.
        `code` is what `source_code` returns.
    """
    commit, changed, problem = commit_of_project()
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": commit,
        "uncommitted_changes": changed,
        **({"commit_unknown": problem} if problem else {}),
        "code": source_code(own_parts),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that affect results."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


# --- commit ---------------------------------------------------------------------------------------------------------


def commit_of_project(project: Path = PROJECT) -> tuple[str | None, bool | None, str | None]:
    """Return commit, whether anything differs from it, and why the commit is unknown (None where it is known)."""
    try:
        top = os.fsdecode(_git(project, "rev-parse", "--show-toplevel").rstrip(b"\n"))
        if not os.path.samefile(top, project):
            return None, None, f"the project is not a git repository itself; the one around it is {top}"
        commit = _git(project, "rev-parse", "--verify", "HEAD").decode().strip()
        return commit, bool(_git(project, "status", "--porcelain").strip()), None
    except FileNotFoundError:
        return None, None, "git is not installed"
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, None, f"git cannot be asked: {error}"
    except subprocess.CalledProcessError as error:
        return None, None, _why(error.stderr.decode(errors="replace"), project)


def _why(message: str, project: Path) -> str:
    """The reason in git's error message, in one line."""
    if "dubious ownership" in message or "unsafe repository" in message:
        return (
            f"git refuses {project}, which belongs to another user; "
            f"run: git config --global --add safe.directory {quoted(project)}"
        )
    if "not a git repository" in message:
        return "the project is not a git repository"
    if "Needed a single revision" in message or "unknown revision" in message:
        return "the git repository has no commit yet"
    lines = message.strip().splitlines()
    return f"git says: {lines[0]}" if lines else "git fails without a message"


def _git(project: Path, *words: str) -> bytes:
    """Output of git in the project, whatever repository the environment names (git hooks set GIT_DIR)."""
    environment = {key: value for key, value in os.environ.items() if key not in ("GIT_DIR", "GIT_WORK_TREE")}
    command = ["git", "-C", str(project), *words]
    environment["LC_ALL"] = "C"  # messages are read in `_why`
    return subprocess.run(command, capture_output=True, check=True, env=environment, timeout=GIT_SECONDS).stdout


def commit_text(facts: Mapping[str, Any], length: int | None = None) -> str:
    """Return the commit in `facts` as text for people, such as "1a2b3c4, with uncommitted changes" or "unknown"."""
    if not facts.get("commit"):
        return "unknown"
    return facts["commit"][:length] + (", with uncommitted changes" if facts.get("uncommitted_changes") else "")


# --- source code ----------------------------------------------------------------------------------------------------


_imported: dict[str, str] = {}  # digests of files as they were when this process imported them


def remember_source() -> None:
    """Record the digests of the files imported so far, for `source_code`. Call it right after importing them.

    What a process runs is what it imported, even if a file is edited before the run folder is written.
    """
    for path in source_files():
        if path not in _imported and (digest := digest_of(path)) is not None:
            _imported[path] = digest


def source_code(own_parts: Iterable[Path] = ()) -> dict[str, Any]:
    """Return a fingerprint of the Python files that this process has imported from the project.

    An edit to any of them changes it, even to a comment; an edit to a file that is not imported does not.

    Returns:
        `fingerprint`: one digest of all; `files`: path relative to the project -> digest (SHA-256, 16 hex digits).
        User-defined parts outside the project have paths that start with `../`.
    """
    digests = {path: _imported.get(path) or digest_of(path) for path in source_files(own_parts)}
    files = {path: digest for path, digest in digests.items() if digest is not None}
    text = "".join(f"{path} {digest}\n" for path, digest in files.items())
    return {"fingerprint": hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16], "files": files}


def source_files(own_parts: Iterable[Path] = ()) -> list[str]:
    """Return the imported files, sorted, relative to the project.

    Modules outside the project count if they are not installed ones: a user-defined part is loaded from its path and
    has no place on `sys.path`. A module inside an installed package is installed too, wherever its file is: PyTorch
    loads what it compiles from a cache folder, as `torch._inductor.runtime.compile_tasks.<digest>`.
    """
    root = os.path.realpath(PROJECT)
    inside = root + os.sep
    installed = _installed_folders(root)
    nested = [folder for folder in installed if folder.startswith(inside)]
    found = {os.path.realpath(path) for path in own_parts}
    folders: dict[str, str] = {}  # a process has thousands of modules in few folders
    for module_name, module in list(sys.modules.items()):
        name = getattr(module, "__file__", None)
        # some libraries name files that do not exist: torch.ops says "_ops.py"
        if not isinstance(name, str) or not name.endswith(".py") or not os.path.isabs(name):
            continue
        folder, base = os.path.split(name)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        path = os.path.join(folders[folder], base)
        if os.path.islink(path):
            path = os.path.realpath(path)
        is_inside = path.startswith(inside)
        if is_inside:
            first = path[len(inside) :].split(os.sep)[0]
            if first in NOT_SOURCE or first.startswith("."):
                continue
        if path.startswith(tuple(nested if is_inside else installed)):
            continue
        if is_inside or not _in_installed_package(module_name, installed):
            found.add(path)
    return sorted(os.path.relpath(path, root) for path in found)


def _in_installed_package(module_name: str, installed: list[str]) -> bool:
    package, dot, _ = module_name.partition(".")
    file = getattr(sys.modules.get(package), "__file__", None) if dot else None
    return isinstance(file, str) and any(os.path.realpath(file).startswith(folder) for folder in installed)


def _installed_folders(root: str) -> list[str]:
    """Folders of installed modules, each with a separator at its end; without the project and the current folder."""
    own = {root, os.path.realpath(os.getcwd())}
    folders = {os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, *sys.path) if path}
    return [os.path.join(folder, "") for folder in folders - own]


def digest_of(path: str) -> str | None:
    """Return the digest of a source file, given relative to the project; None where it cannot be read."""
    try:
        return hashlib.sha256((PROJECT / path).read_bytes()).hexdigest()[:16]
    except OSError:
        return None


def changed_since(code: Mapping[str, Any]) -> list[str]:
    """Return the files of `code` (what `source_code` returned for a run) that are not the same on disk any more."""
    return [path for path, digest in code.get("files", {}).items() if digest_of(path) != digest]


def changed_between(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the files that differ between two values of `source_code`.

    Files that only one of them imported do not count: another strategy or flag imports other files.
    """
    before, after = old.get("files", {}), new.get("files", {})
    return sorted(path for path in before.keys() & after.keys() if before[path] != after[path])


def write_code_diff(folder: Path, code: Mapping[str, Any]) -> Path | None:
    """Write `code.diff` into a run folder: how the imported files differ from the commit, so that it can be rebuilt.

    Files that git does not track are included in full. Without a commit, all imported files are included in full.

    Returns:
        The path, or None where nothing differs; then an older `code.diff` is removed.
    """
    paths = list(code.get("files", {}))
    commit, _, _ = commit_of_project(PROJECT)
    inside = [path for path in paths if not path.startswith("..")]
    try:
        tracked = _git(PROJECT, "ls-files", "-z", "--", *inside).split(b"\0") if commit and inside else []
        known = {os.fsdecode(path) for path in tracked if path}
        diff = _git(PROJECT, "diff", "--no-color", "--no-ext-diff", "HEAD", "--", *sorted(known)) if known else b""
    except (OSError, subprocess.SubprocessError):
        known, diff = set(), b""
    diff += b"".join(_as_new_file(path) for path in paths if path not in known)
    if not diff:
        (folder / CODE_DIFF).unlink(missing_ok=True)
        return None
    if len(diff) > MOST_BYTES:
        diff = diff[:MOST_BYTES] + f"\n# cut: {len(diff):,} bytes, limit {MOST_BYTES:,}\n".encode()
    write_atomically(folder / CODE_DIFF, diff)
    return folder / CODE_DIFF


def _as_new_file(path: str) -> bytes:
    """A file as a diff against nothing, which `git apply` and `patch` can read."""
    try:
        lines = (PROJECT / path).read_bytes().split(b"\n")
    except OSError:
        return b""
    name = os.fsencode(path)
    ends = lines[-1] == b""  # with a newline
    lines = lines[:-1] if ends else lines
    if not lines:
        return b""
    head = b"diff --git a/%s b/%s\nnew file mode 100644\n--- /dev/null\n+++ b/%s\n@@ -0,0 +1,%d @@\n"
    body = b"".join(b"+" + line + b"\n" for line in lines)
    return head % (name, name, name, len(lines)) + body + (b"" if ends else b"\\ No newline at end of file\n")
