"""docs/notebook.ipynb: its cells run in order, here on the small run of the tests, and show what they say.

Cells are executed in this process: what Jupyter adds is the display of a cell's last value.
"""

from __future__ import annotations

import ast
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from common.paths import PROJECT

NOTEBOOK = json.loads((PROJECT / "docs" / "notebook.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def execute(source: str, scope: dict[str, Any]) -> Any:
    """Run a cell and return the value of its last expression, which Jupyter would show."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), scope)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), scope) if last else None  # type: ignore[attr-defined]


def test_the_notebook_is_valid_and_holds_no_outputs():
    """The keys that nbformat 4.5 requires; outputs of one machine do not belong into the repository."""
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    names = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(names)) == len(names) and {"kernelspec", "language_info"} <= set(NOTEBOOK["metadata"])
    for cell in NOTEBOOK["cells"]:
        assert isinstance(cell["metadata"], dict) and isinstance(cell["source"], list)
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)


def test_the_cells_run_and_show_a_run_its_predictions_and_a_comparison(unbroken, monkeypatch, capsys):
    monkeypatch.chdir(PROJECT / "docs")
    monkeypatch.setattr(sys, "path", list(sys.path))
    scope: dict[str, Any] = {"__name__": "__main__"}
    assert execute(CODE[0], scope) is None and Path(os.getcwd()) == PROJECT
    scope["RUN"] = unbroken.folder
    shown = [execute(cell, scope) for cell in CODE[1:]]
    pictures = [value._repr_png_() for value in shown if value is not None]
    assert len(pictures) == 3 and all(picture.startswith(b"\x89PNG") for picture in pictures)
    text = capsys.readouterr().out
    last = unbroken.metrics()[-1]
    assert f"test accuracy {100 * last['test_accuracy']:.2f} % ({last['test_correct']}/70)" in text
    report = json.loads((PROJECT / scope["REPORT"]).read_text())
    assert report["question"] in text and all(name in text for name in report["arms"])


def test_a_cell_that_fails_is_not_hidden():
    with pytest.raises(NameError):
        execute("1 + missing", {})
