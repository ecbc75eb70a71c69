"""Dockerfile and .dockerignore, as far as they can be checked without building an image.

What is copied exists and is not ignored, what runs is valid shell, and the build arguments are those that
environment/setup.sh understands.
"""

from __future__ import annotations

import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest
from launching import run

from common.paths import PROJECT

KNOWN = {"ARG", "CMD", "COPY", "ENV", "FROM", "LABEL", "RUN", "USER", "WORKDIR"}


def instructions(text: str) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile with their arguments, continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


def problems(folder: Path) -> list[str]:
    """Return one sentence for everything in the Dockerfile of a folder that cannot work."""
    found = []
    ignored = (folder / ".dockerignore").read_text().splitlines()
    patterns = [line.removeprefix("**/") for line in ignored if line and not line.startswith("#")]
    for word, rest in instructions((folder / "Dockerfile").read_text()):
        if word not in KNOWN:
            found.append(f"{word} is not an instruction that this test knows")
        if word == "FROM" and (rest.endswith(":latest") or not re.search(r"[:$]", rest)):
            found.append(f"FROM {rest} names no version")
        if word == "COPY":
            for source in rest.split()[:-1]:
                if not (folder / source).exists():
                    found.append(f"COPY {source}: there is no such file")
                if any(fnmatch(source.rstrip("/"), pattern) for pattern in patterns):
                    found.append(f"COPY {source}: .dockerignore leaves it out")
        if word == "RUN":
            checked = subprocess.run(["sh", "-n", "-c", rest], capture_output=True, text=True)
            if checked.returncode:
                found.append(f"RUN is not valid shell: {checked.stderr.strip()}")
            if "apt-get install" in rest and not ("apt-get update" in rest and "rm -rf /var/lib/apt/lists" in rest):
                found.append("apt-get install needs the lists of its own layer, and removes them")
    return found


def test_the_dockerfile_can_be_built_from_this_checkout():
    assert problems(PROJECT) == []
    words = dict(instructions((PROJECT / "Dockerfile").read_text()))
    (command,) = re.findall(r'"(.*?)"', words["CMD"])
    assert (PROJECT / command).stat().st_mode & 0o111


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("COPY nothing.txt ./", "COPY nothing.txt: there is no such file"),
        ("COPY data/ data/", "COPY data/: .dockerignore leaves it out"),
        ("RUN if true; then", "RUN is not valid shell"),
        ("RUN apt-get install -y git", "apt-get install needs the lists of its own layer"),
        ("FROM debian", "FROM debian names no version"),
        ("RUNN true", "RUNN is not an instruction"),
    ],
)
def test_a_mistake_in_a_dockerfile_is_found(tmp_path, line, sentence):
    (tmp_path / "data").mkdir()
    (tmp_path / ".dockerignore").write_text("# caches\ndata\n**/__pycache__\n")
    (tmp_path / "Dockerfile").write_text(f"# one\nFROM debian:bookworm-slim\n{line}\n")
    assert any(sentence in problem for problem in problems(tmp_path)), problems(tmp_path)


def test_the_build_and_every_start_choose_the_same_packages():
    lines = instructions((PROJECT / "Dockerfile").read_text())
    setup = next(i for i, (_, rest) in enumerate(lines) if "environment/setup.sh" in rest)
    assert ("ENV", "DRIVER_CUDA=$CUDA") in lines[lines.index(("ARG", "CUDA=none")) : setup]


@pytest.mark.parametrize("cuda", ["none", "11", "12", "13"])
def test_every_value_of_the_argument_cuda_names_a_set_of_packages(repo, cuda):
    assert cuda in (PROJECT / "Dockerfile").read_text() + (PROJECT / "docs" / "docker.md").read_text()
    done = run(repo, "environment/setup.sh", DRIVER_CUDA=cuda, DRY_RUN="1", PYTHON="/usr/bin/false")
    name = f"environment/requirements-cuda{cuda}.txt" if cuda in ("11", "12") else "requirements.txt"
    assert f"with {name} " in done.stderr
