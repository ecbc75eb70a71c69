"""Test files that import a file of the project, nearest first, found by parsing.

    nearest = NearestTests(project)
    nearest.of("models/attention.py")    # ["tests/models/test_attention.py", "tests/models/test_parts.py", ...]

The distance of a test is the number of imports between it and the file. A test that starts a script, as in
`run("train.py")`, imports it. A test file named after the file comes first, then the folder of its package.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

HELPERS = "tests/helpers/"  # on the path of the tests: `import programs`
NOT_NEAR = ("tests/docs/", "tests/gpu/", "tests/cluster/", "tests/benchmarks/")  # texts, other machines, measurements


class NearestTests:
    """The import graph of a project, from each test file down."""

    def __init__(self, project: Path):
        files = sorted(path.relative_to(project) for path in project.rglob("*.py"))
        self.files = {str(path) for path in files if not any(part[0] == "." for part in path.parts)}
        self.tests = [file for file in sorted(self.files) if Path(file).name.startswith("test_")]
        self.tests = [file for file in self.tests if file.startswith("tests/") and not file.startswith(NOT_NEAR)]
        self.imports = {
            file: set(self._imports(file, ast.parse((project / file).read_text(encoding="utf-8"))))
            for file in self.files
        }
        self.distances = {test: self._distances(test) for test in self.tests}

    def of(self, file: str) -> list[str]:
        """Return the tests that import a file, directly or not, nearest first."""
        own, folder = f"test_{Path(file).name}", f"tests/{file.split('/')[0]}/"
        reached = [test for test in self.tests if file in self.distances[test]]
        return sorted(
            reached,
            key=lambda test: (Path(test).name != own, not test.startswith(folder), self.distances[test][file], test),
        )

    def _imports(self, file: str, tree: ast.AST) -> Iterator[str]:
        """Files of the project that a file imports anywhere, modules that it names, and scripts that a test names."""
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Constant) and file.startswith("tests/") and node.value in self.files:
                yield str(node.value)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
                names = [node.value]  # for import_module, as the strategies are loaded
                yield from self.files & {str(Path(file).parent / node.value)}  # a program beside the file
            for name in names:
                path = name.replace(".", "/") + ".py"
                yield from self.files & {path, HELPERS + path}

    def _distances(self, test: str) -> dict[str, int]:
        found, border = {test: 0}, [test]
        while border:
            after = {target for file in border for target in self.imports[file]} - found.keys()
            found |= dict.fromkeys(after, found[border[0]] + 1)
            border = sorted(after)
        return found
