"""The commands of README.md and docs/*.md, and a small copy of the project to run them in, with drawn data and a run.

Every line of a ```bash block is a command. Each command gets one of these treatments:

    run        a quick program of ours: it runs in that copy, with the flags of ADDED
    train      training: its launcher prints the command (DRY_RUN=1), whose arguments are parsed, settings checked for
               every default preset and network built
    parse      another program of ours: its arguments are parsed, and it ends there
    foreign    a program of somebody else, listed in FOREIGN

A command that is none of these is an error (`treatment`).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from project_files import project_files

from common.paths import PROJECT

PAGES = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted((PROJECT / "docs").glob("*.md"))]
RUN = (
    "model.py",
    "evaluate.py",
    "prepare_dataset.py",
    "compare.py",
    "dali_pipeline.py",
    "tools/keep_run.py",
    "report.py",
    "tools/update_docs.py",
)
LAUNCHERS = ("./launch_local_train.sh", "./launch_distributed_train.sh", "sbatch")
# Commands that start a program of ours: how they begin, the last word before its arguments, and that program.
STARTERS = (
    ("docker run", "vit", []),  # the name of the image; the command follows
    ("sbatch", "cluster/slurm/compare.sbatch", ["python", "compare.py"]),
    ("torchrun", "train.py", ["python", "train.py"]),
    ("./gpu_check.sh", "./gpu_check.sh", ["python", "benchmarks/gpu_check.py"]),
)
FOREIGN = (
    ".",
    "source",
    "sudo",
    "apt-get",
    "ssh",
    "ssh-keygen",
    "ssh-copy-id",
    "tensorboard",
    "pip",
    "git",
    "cd",
    "docker",
    "srun",
    "export",
    "wandb",
    "mlflow",
    "jupyter",
)
# Further flags that make a command quick: a comparison prints only its plan, for a dataset of CIFAR's size without
# having one; preparation uses no worker processes, and the archive although the dataset exists.
ADDED = {
    "compare.py": ["--dry-run", "--data-dir", "none"],
    "prepare_dataset.py": ["--force", "--workers", "1"],
    "report.py": ["--quick"],
}
# Paths of the reader's machine, and their substitutes in the project copy.
PATHS = {"/big/disk/imagenet": "big/disk/imagenet", "/local/disk": "local/disk"}


@dataclass(frozen=True)
class Command:
    """One command, and the first page that shows it."""

    words: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    page: str = field(default="", compare=False)

    def __str__(self) -> str:
        return " ".join([*(f"{name}={value}" for name, value in self.environment), *self.words])

    @property
    def script(self) -> str:
        """The script that runs, as written."""
        return self.words[1] if self.words[0] == "python" and len(self.words) > 1 else self.words[0]

    @property
    def arguments(self) -> list[str]:
        """The arguments of the script, with the substitutes of PATHS."""
        words = self.words[2:] if self.words[0] == "python" else self.words[1:]
        return [PATHS.get(word, word) for word in words]


def commands(pages: list[Path] = PAGES) -> list[Command]:
    """Return every command of the pages, each once."""
    found: dict[Command, None] = {}
    for page in pages:
        for block in re.findall(r"^ *```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                for words in split(line):
                    names = [word for word in words if re.match(r"[A-Z_]+=", word)]
                    names = names[
                        : next((i for i, word in enumerate(words) if word not in names), len(words))
                    ]  # those in front
                    if words[len(names) :]:
                        found.setdefault(
                            Command(
                                tuple(started_by(words[len(names) :])),
                                tuple(tuple(name.split("=", 1)) for name in names),
                                page.name,
                            )
                        )
    return list(found)


def started_by(words: list[str]) -> list[str]:
    """Return the command of ours that a container, Slurm or another program starts, or the command itself."""
    for first, last, ours in STARTERS:
        if " ".join(words).startswith(first) and last in words:
            return [*ours, *words[words.index(last) + 1 :]] or words
    return words


def split(line: str) -> list[list[str]]:
    """Return the commands of a line: `a && b | c` are three."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
    lexer.whitespace_split = True
    parts: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("&|;"):
            parts.append([])
        else:
            parts[-1].append(word)
    return [part for part in parts if part]


def treatment(command: Command) -> str:
    """Return run, train, parse or foreign. Raises AssertionError for an unknown command."""
    program, script = command.words[0], command.script
    if program in LAUNCHERS or script == "train.py":
        return "train"
    if program in ("./run_tests.sh", "environment/setup.sh", "ls", "cat") or program in FOREIGN:
        return "foreign"
    if program == "python" and (PROJECT / script).is_file():
        # an export takes ten seconds, and tests/inference/test_onnx_export.py makes some
        return "run" if script in RUN and "--export" not in command.words else "parse"
    raise AssertionError(
        f"{command.page} shows '{command}', which has no treatment: add it to tests/helpers/documentation.py"
    )


def own_part_examples() -> list[tuple[str, str, str]]:
    """Return the examples of docs/own-parts.md: setting, name of the part, complete file."""
    text = (PROJECT / "docs" / "own-parts.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## [^\n`]*`([\w.]+)`\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    return [
        (
            setting,
            re.search(r"mine\.py:(\w+)", section)[1],  # type: ignore[index]  # every section has a command
            re.search(r"```python\n(.*?)```", section, re.DOTALL)[1],  # type: ignore[index]  # and an example
        )
        for setting, section in sections
    ]


def make_world(folder: Path, shapes: Path, run: Path) -> Path:
    """Copy the programs to `folder`, with the data, images, archives and runs that the pages mention."""
    from trees import python_archive, save, tree_files

    from image_data.preparation.prepare import prepare

    for name in (name for name in project_files() if not name.startswith((".", "tests/", "results/"))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT / name, folder / name)
    for name in ("cifar100", "cifar10", "shapes"):
        shutil.copytree(shapes, folder / "data" / name)
    for name, pixels in tree_files().items():
        for place in ("big/disk/imagenet", "pets"):
            save(folder / place / name, pixels)
        save(folder / "photos" / name.replace("/", " "), pixels)
    shutil.make_archive(str(folder / "pets"), "zip", folder, "pets")
    prepare(folder / "data" / "pets", archive=folder / "pets.zip", workers=1)
    python_archive(folder / "cifar-10-python.tar.gz", 10)
    for name in ("photo.jpg", "cat.png", "image.png"):
        shutil.copy(next((folder / "photos").iterdir()), folder / name)
    shutil.copy(run / "weights.safetensors", folder)
    (folder / "hostfile").write_text("node1 slots=8\nnode2 slots=8\n")  # as docs/cluster.md describes it
    facts = json.loads((run / "run.json").read_text())
    facts["dataset"]["folder"] = "data/cifar100"
    for name in {
        match for command in commands() for word in command.words for match in re.findall(r"^runs/([\w.-]+)", word)
    } | {"newest"}:
        shutil.copytree(run, folder / "runs" / name)
        (folder / "runs" / name / "run.json").write_text(json.dumps(facts))
    (example,) = re.findall(r"```toml\n(question.*?)```", (PROJECT / "docs" / "comparing.md").read_text(), re.DOTALL)
    (folder / "experiments" / "geglu.toml").write_text(example)
    (folder / "mine.py").write_text("\n\n".join(code for _, _, code in own_part_examples()))
    (search,) = re.findall(r"```toml\n(question.*?)```", (PROJECT / "docs" / "search.md").read_text(), re.DOTALL)
    (folder / "experiments" / "learning-rate.toml").write_text(search)
    return folder


def inside(folder: str, only_parse: bool, script: str, *arguments: str) -> None:
    """Run a program of the project copy; to be called in a separate process, by `programs.Program`."""
    os.chdir(folder)
    sys.path[:] = [folder, *(path for path in sys.path if path and Path(path).resolve() != PROJECT)]
    # This process was forked from one that had imported modules of the project itself, which know its folder.
    for name, module in list(sys.modules.items()):
        file = Path(getattr(module, "__file__", None) or "/")
        if file.is_relative_to(PROJECT) and file.relative_to(PROJECT).parts[0] != ".venv":
            del sys.modules[name]
    sys.argv = [script, *arguments]
    if only_parse:
        understand = argparse.ArgumentParser.parse_known_args

        def parse(*words, **options):
            found, rest = understand(*words, **options)
            if not rest:
                sys.exit(0)
            return found, rest

        argparse.ArgumentParser.parse_known_args = parse
    runpy.run_path(script, run_name="__main__")
