"""Imports a user's Python file by its path, with the modules that stand next to it.

Every folder of such files is a package of its own, with a name made from its path. So two files of one name, or two
folders whose files both `import helper`, do not meet, and `sys.path` stays as it is. To that end the absolute imports
of neighboring modules are rewritten while a file is compiled: `import helper` becomes `from own_parts_1a2b import
helper`, also inside functions. Neighbors come before modules of the project, as for a script. A file that has changed
since it was imported is imported again.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import re
import sys
from collections.abc import Sequence
from importlib.machinery import FileFinder, ModuleSpec, SourceFileLoader
from importlib.util import module_from_spec
from pathlib import Path
from types import CodeType, ModuleType

from common.paths import PROJECT

PREFIX = "own_parts_"
SOURCE = "own_source"  # attribute of an imported module: digest of its text


def import_file(file: Path) -> ModuleType:
    """Import a Python file and return the module. Raises whatever the file raises."""
    package = _package_of(file.parent)
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        module = sys.modules[name]
        path = getattr(module, "__file__", None)
        if path and _digest(Path(path)) != getattr(module, SOURCE, None):
            _forget(package)
            break
    name = file.stem
    if not name.isidentifier():  # such as my-part.py: import statements and PyTorch's compiler need an identifier
        name = f"{re.sub(r'[^0-9A-Za-z_]', '_', name)}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    _FILES[f"{package}.{name}"] = file
    return importlib.import_module(f"{package}.{name}")


def files_of(file: Path) -> list[Path]:
    """Return a user's file and the neighboring modules that it imports, directly or not, without importing any."""
    found, waiting = {file}, [file]
    while waiting:
        current = waiting.pop()
        try:
            tree = ast.parse(current.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue  # importing it says why
        for node in ast.walk(tree):
            for path in _imported_neighbors(node, file.parent, current):
                if path not in found:
                    found.add(path)
                    waiting.append(path)
    return sorted(found)


def _imported_neighbors(node: ast.AST, folder: Path, importer: Path) -> list[Path]:
    if isinstance(node, ast.Import):
        return [path for alias in node.names for path in neighbors(folder, alias.name)]
    if not isinstance(node, ast.ImportFrom):
        return []
    names = [alias.name for alias in node.names]
    if not node.level:
        return neighbors(folder, node.module or "", names)
    start = importer.parents[node.level - 1]
    return neighbors(start, node.module or "", names) if start.is_relative_to(folder) else []


def neighbors(folder: Path, module: str, names: Sequence[str] = ()) -> list[Path]:
    """Return the files in `folder` that `import module` or `from module import names` reads; empty if it is not there.

    In the project's own folder, the modules of the project are not neighbors: they are imported as everywhere.
    """
    if folder == PROJECT and module.split(".")[0] in _names_of_the_project():
        return []
    path = folder.joinpath(*module.split(".")) if module else folder
    candidates = [path.parent / f"{path.name}.py", path / "__init__.py"] if module else []
    candidates += [file for name in names for file in (path / f"{name}.py", path / name / "__init__.py")]
    found = [file for file in candidates if file.is_file()]
    if found and module:
        above = [parent / "__init__.py" for parent in path.parents if parent != folder and folder in parent.parents]
        found += [file for file in above if file.is_file()]
    return found


def _names_of_the_project() -> set[str]:
    packages = {path.parent.name for path in PROJECT.glob("*/__init__.py")}
    folders = {"benchmarks", "cluster", "environment", "tests"}
    files = {"model", "dali_pipeline", "train", "evaluate", "compare", "report", "prepare_dataset"}
    return packages | folders | files


# --- the import system ----------------------------------------------------------------------------------------------

_FILES: dict[str, Path] = {}  # module -> the user's file, for names that are not those of their files


def _package_of(folder: Path) -> str:
    """Return the name of the package that a folder is, which exists from then on."""
    name = PREFIX + hashlib.sha256(str(folder).encode(errors="surrogateescape")).hexdigest()[:12]
    if name not in sys.modules:
        package = module_from_spec(ModuleSpec(name, None, is_package=True))
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    return name


def _forget(package: str) -> None:
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        del sys.modules[name]
        if "." not in name.removeprefix(f"{package}."):
            vars(sys.modules[package]).pop(name.rpartition(".")[2], None)


def _digest(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


class _Finder:
    """Finds the modules of the packages that `_package_of` makes."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        if not name.startswith(PREFIX) or not path:
            return None
        if name in _FILES:
            return importlib.util.spec_from_file_location(name, _FILES[name], loader=_Loader(name, str(_FILES[name])))
        for folder in path:
            if spec := FileFinder(folder, (_Loader, [".py"])).find_spec(name):
                return spec
        return None


class _Loader(SourceFileLoader):
    """Compiles a user's file with its imports of neighbors rewritten; writes no `__pycache__`."""

    def get_code(self, fullname: str) -> CodeType:
        data = self.get_data(self.path)
        package = fullname.partition(".")[0]
        folder = Path(sys.modules[package].__path__[0])
        tree = _RewriteImports(package, folder).visit(ast.parse(data, self.path))
        return compile(ast.fix_missing_locations(tree), self.path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        setattr(module, SOURCE, _digest(Path(self.path)))
        super().exec_module(module)


class _RewriteImports(ast.NodeTransformer):
    """Makes absolute imports of neighboring modules imports from their package."""

    def __init__(self, package: str, folder: Path):
        self.package, self.folder = package, folder

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        if not node.level and node.module and neighbors(self.folder, node.module, [name.name for name in node.names]):
            node.module = f"{self.package}.{node.module}"
        return node

    def visit_Import(self, node: ast.Import) -> list[ast.AST]:
        made: list[ast.Import | ast.ImportFrom] = []
        for alias in node.names:
            top, _, rest = alias.name.partition(".")
            if not neighbors(self.folder, alias.name):
                made.append(ast.Import([alias]))
            elif alias.asname:  # import a.b as c
                above, _, last = f"{self.package}.{alias.name}".rpartition(".")
                made.append(ast.ImportFrom(above, [ast.alias(last, alias.asname)], 0))
            else:  # import a.b binds a
                if rest:
                    made.append(ast.Import([ast.alias(f"{self.package}.{alias.name}", "_imported_neighbor")]))
                made.append(ast.ImportFrom(self.package, [ast.alias(top)], 0))
        return [ast.copy_location(statement, node) for statement in made]
