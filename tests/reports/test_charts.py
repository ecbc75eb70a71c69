"""reports/templates/charts.js: which runs become one curve, and where its points are.

Skipped without Node.js. The page in a browser: test_index_browser.py. Run: python -m pytest tests/reports
"""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

import pytest

from common.paths import PROJECT

CHARTS = (PROJECT / "reports" / "templates" / "charts.js").read_text()
WINDOW = "const window = { addEventListener() {} };"


def evaluate(expression: str, **values: Any) -> Any:
    """Return the value of an expression of the page's functions."""
    if not shutil.which("node"):
        pytest.skip("Node.js is not installed")
    constants = "".join(f"const {name} = {json.dumps(value)};" for name, value in values.items())
    code = f"{WINDOW}\n{CHARTS}\n{constants}\nconsole.log(JSON.stringify({expression}));"
    done = subprocess.run(["node", "-e", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def run(name: str, seed: int, date: str = "2026-01-01", state: str = "finished", setting: str = "a") -> dict[str, Any]:
    return {"name": name, "seed": seed, "date": date, "state": state, "setting": setting}


def test_a_group_is_the_newest_finished_run_of_each_seed():
    rows = [run("x-seed0", 0, "2026-01-02"), run("x-seed0.old-1", 0), run("x-seed1", 1)]
    rows += [run("x-seed2", 2, state="running"), run("y", 0, setting="b")]
    names = "groupRuns(rows, fold).map((group) => [group.name, group.rows.map((row) => row.name)])"
    alone = [[row["name"], [row["name"]]] for row in rows]
    assert evaluate(names, rows=rows, fold=True) == [["x (2 seeds)", ["x-seed0", "x-seed1"]], alone[1], *alone[3:]]
    assert evaluate(names, rows=rows, fold=False) == alone


def test_losses_by_step_wait_for_the_first_evaluation_before_they_have_steps_or_minutes():
    losses = {"step_loss": [3, 2], "step_loss_epoch": [0.5, 1]}
    epochs = {"epoch": [1, 2], "step": [10, 20], "minutes": [3, 6]}
    points = "['epoch', 'step', 'minutes'].map((axis) => [...pointsOf({ curves }, 'step_loss', axis).values()])"
    by_epoch = [[0.5, 3], [1, 2]]
    assert evaluate(points, curves=losses) == [by_epoch, [], []]
    assert evaluate(points, curves={**losses, **epochs}) == [by_epoch, [[5, 3], [10, 2]], [[1.5, 3], [3, 2]]]
