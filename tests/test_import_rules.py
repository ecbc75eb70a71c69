"""The import rules of CONTRIBUTING.md: imports go down the layers, without circles; a heavy library has one home.

Every Python file is parsed, nothing is imported. Imports inside functions, under TYPE_CHECKING and in main blocks
count.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from project_files import project_files

from common.paths import PROJECT

# Lowest first. Packages of one layer do not import one another; a file of the root is a room of its own.
LAYERS = [
    {"common"},
    {"config"},
    {"records", "image_data", "optim", "models"},
    {"dali_pipeline", "model"},
    {"parallel"},
    {"inference"},
    {"reports"},
    {"training"},
    {"comparison"},
    {"train", "evaluate", "compare", "report", "prepare_dataset", "cluster", "tools", "benchmarks", "environment"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
SCRIPTS = {"train", "evaluate", "compare", "report", "prepare_dataset"}
STARTED = SCRIPTS | {"cluster", "tools", "benchmarks", "environment"}
WITHOUT_TORCH = {"common", "config", "records"}
HEAVY = {  # library: files and folders that may import it
    "deepspeed": ("parallel/zero.py", "parallel/zero_state.py", "parallel/pipeline.py", "parallel/pipeline_stages.py"),
    "nvidia": ("image_data/dali_backend.py",),
    "matplotlib": ("reports/",),
    "jinja2": ("reports/index.py",),
    "timm": ("models/published/timm_models.py", "optim/"),
    "torchft": ("parallel/peers/",),
    "optuna": ("comparison/search_study.py", "comparison/search_runs.py"),
    "onnx": ("inference/onnx_export.py",),
    "onnxruntime": ("inference/onnx_export.py",),
    "wandb": ("training/experiment_trackers.py",),
    "mlflow": ("training/experiment_trackers.py",),
    "tensorboard": ("training/tensorboard_tracker.py",),
}
MEASURED_THERE = ("benchmarks/",)  # programs that time other people's libraries side by side
BARE_HOSTS = (
    "cluster/agent.py",
    "cluster/probe.py",
    "cluster/reachability.py",
    "cluster/hostfile.py",
)  # standard library alone
SENT_OR_STARTED = (
    "cluster/",
    "tools/",
    "benchmarks/",
)  # may name themselves: `sys.path.insert(0, ...)` before the first import
FILES = [path for path in project_files(".py") if not path.startswith("tests/")]


class Import(NamedTuple):
    """One imported module: dotted name, line, whether it is imported with the file, and whether by a main block."""

    module: str
    line: int
    at_module_level: bool
    in_main_block: bool


def is_main_block(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Compare)
        and getattr(node.test.left, "id", "") == "__name__"
    )


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"


def imports(
    tree: ast.AST, modules: set[str], at_module_level: bool = True, in_main_block: bool = False
) -> Iterator[Import]:
    """Every import of a file; `from package import module` names the module where there is one."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_module_level, in_main_block)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield Import(name if name in modules else node.module, node.lineno, at_module_level, in_main_block)
        else:
            runs_later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_type_checking(node)
            yield from imports(node, modules, at_module_level and not runs_later, in_main_block or is_main_block(node))


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def broken_rules(root: Path, files: Iterable[str]) -> list[str]:
    """One sentence for every place in the files below `root` that breaks a rule."""
    path_of = {module_of(path): path for path in files}
    trees = {path: ast.parse((root / path).read_text(encoding="utf-8")) for path in files}
    broken, arrows = [], {}
    for path, tree in trees.items():
        room, own = path.split("/")[0].removesuffix(".py"), set()
        if room not in LEVEL:
            broken.append(f"{path}: {room} is not a room of LAYERS")
            continue
        for found in imports(tree, set(path_of)):
            where, library = f"{path}:{found.line}", found.module.split(".")[0]
            target = next((path_of[name] for name in prefixes(found.module) if name in path_of), None)
            if library in HEAVY and not path.startswith((*HEAVY[library], *MEASURED_THERE)):
                broken.append(f"{where}: {library} is imported outside {', '.join(HEAVY[library])}")
            if library == "torch" and found.at_module_level and room in WITHOUT_TORCH:
                broken.append(f"{where}: {room} imports PyTorch at module level")
            if target is None:
                continue
            if path in BARE_HOSTS:
                broken.append(f"{where}: runs on bare hosts, where the project is not, and imports {target}")
            there = target.split("/")[0].removesuffix(".py")
            hands_over = found.in_main_block and "/" not in path and there == "tools"
            if target != path:
                own.add(target) if not hands_over else None
            if there == room or hands_over:
                continue
            if LEVEL[there] >= LEVEL[room] and not (
                room in {"cluster", "tools", "benchmarks"} | SCRIPTS and there in STARTED
            ):
                broken.append(f"{where}: {room} imports {there}, which is not below it")
            if there in STARTED and room not in STARTED:
                broken.append(f"{where}: a package imports {target}, which is started, not imported")
            if there in SCRIPTS:
                broken.append(f"{where}: {target} is a script, which nobody imports")
        arrows[path] = own
        broken += own_path(path, tree)
        if path.endswith("__init__.py") and [type(node) for node in tree.body] not in ([], [ast.Expr]):
            broken.append(f"{path}: an __init__.py holds a docstring and nothing else")
    return broken + [f"circle: {' -> '.join(circle)}" for circle in circles(arrows)]


def own_path(path: str, tree: ast.AST) -> list[str]:
    """Uses of `__file__` that are neither common/paths.py nor the line that lets a started program find the project."""
    if path == "common/paths.py":
        return []
    allowed = {
        id(name)
        for node in ast.walk(tree)
        if path.startswith(SENT_OR_STARTED)
        and isinstance(node, ast.Expr)
        and ast.unparse(node).startswith("sys.path.insert(0, ")
        for name in ast.walk(node)
    }
    return [
        f"{path}:{node.lineno}: a path made from __file__; common/paths.py has them"
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and node.id == "__file__" and id(node) not in allowed
    ]


def prefixes(module: str) -> Iterator[str]:
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        yield ".".join(parts[:end])


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Groups of files that import one another, by Tarjan's algorithm."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(file: str) -> None:
        order[file] = low[file] = len(order)
        stack.append(file)
        for target in sorted(arrows.get(file, ())):
            if target not in order:
                visit(target)
                low[file] = min(low[file], low[target])
            elif target in stack:
                low[file] = min(low[file], order[target])
        if low[file] == order[file]:
            group = [stack.pop()]
            while group[-1] != file:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for file in arrows:
        if file not in order:
            visit(file)
    return found


def test_the_project_keeps_the_import_rules():
    assert broken_rules(PROJECT, FILES) == []


GOOD = {
    "common/__init__.py": '"""Shared."""\n',
    "common/paths.py": "from pathlib import Path\nPROJECT = Path(__file__).parent\n",
    "config/settings.py": "from common.paths import PROJECT\n",
    "models/layers.py": "import torch\nfrom config.settings import x\n",
    "model.py": "from models import layers\n\nif __name__ == '__main__':\n    from tools.describe import main\n",
    "tools/describe.py": "import model\n",
    "train.py": "def main():\n    import model\n",
}


@pytest.mark.parametrize(
    ("path", "text", "sentence"),
    [
        (
            "config/settings.py",
            "def late():\n    from models import layers\n",
            "config imports models, which is not below it",
        ),
        (
            "common/paths.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import config.settings\n",
            "common imports config",
        ),
        ("models/layers.py", "import model\n", "circle: model.py -> models/layers.py"),
        ("models/layers.py", "from image_data import x\n", ""),
        ("image_data/dataset.py", "import models.layers\n", "image_data imports models, which is not below it"),
        (
            "models/other.py",
            "if __name__ == '__main__':\n    import tools.describe\n",
            "models/other.py:2: a package imports tools/describe.py",
        ),
        ("tools/other.py", "from train import main\n", "train.py is a script, which nobody imports"),
        ("config/other.py", "import torch\n", "config imports PyTorch at module level"),
        ("config/other.py", "def late():\n    import torch\n", ""),
        ("parallel/ddp.py", "import deepspeed\n", "deepspeed is imported outside parallel/zero.py"),
        ("parallel/zero.py", "import deepspeed\n", ""),
        ("training/loop.py", "from pathlib import Path\nHERE = Path(__file__)\n", "a path made from __file__"),
        ("common/__init__.py", "import os\n", "an __init__.py holds a docstring and nothing else"),
        ("cluster/agent.py", "from common import paths\n", "runs on bare hosts"),
        ("helpers.py", "", "helpers is not a room"),
    ],
)
def test_a_rule_that_is_broken_is_named(tmp_path, path, text, sentence):
    for name, content in GOOD.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert broken_rules(tmp_path, GOOD) == []
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text(text)
    broken = broken_rules(tmp_path, {**GOOD, path: text})
    assert any(sentence in line for line in broken) if sentence else not broken, broken
