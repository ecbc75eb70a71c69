"""benchmarks/mutation.py: which mistakes are planted, which tests run, and what counts as noticed.

pytest tests/benchmarks/test_mutation.py
"""

from __future__ import annotations

import ast
import itertools
import json
from pathlib import Path

import pytest
from programs import git

from benchmarks import mutation
from benchmarks.lib import mutant_trial
from benchmarks.lib.mutant_trial import KILLED, SURVIVED, TIMED_OUT, UNTESTED, Trial, Verdict, read_output
from benchmarks.lib.mutants import places, sample
from benchmarks.lib.nearest_tests import NearestTests
from common.errors import UserError
from common.paths import PROJECT

SOURCE = '''
"""Not 1 of these: a < b."""
from typing import TYPE_CHECKING
import os
LIMIT = 5
def work(values, x: int = 3, flag=True) -> "list[1]":
    # x < 1 stays
    if x <= len(values) and not flag:
        raise ValueError(f"{x + 1} is wrong")
    values.sort(key=len)
    total = min(x * 2, LIMIT)
    return values[x:total], place(values, x, side="left"), os.getcwd(), sorted(values), x.abs()
if TYPE_CHECKING:
    ELSE = 1
'''


def mistakes(source: str = SOURCE) -> set[tuple[str, str]]:
    """Kind and changed line of every mistake."""
    data, found = source.encode(), set()
    for kind, line, edits in places(source):
        for edit in edits:
            changed = (data[: edit.start] + edit.text.encode() + data[edit.end :]).decode()
            found.add((kind, changed.splitlines()[line - 1].strip()))
    return found


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("constant", "LIMIT = 6"),
        ("constant", "LIMIT = 4"),
        ("constant", 'def work(values, x: int = 3, flag=False) -> "list[1]":'),
        ("comparison", "if x < len(values) and not flag:"),
        ("and or", "if x <= len(values) or not flag:"),
        ("negation", "if not (x <= len(values) and not flag):"),
        ("negation", "if x <= len(values) and (flag):"),
        ("removed statement", "pass"),
        ("dropped keyword", "values.sort()"),
        ("opposite", "total = max(x * 2, LIMIT)"),
        ("arithmetic", "total = min(x / 2, LIMIT)"),
    ],
)
def test_a_mistake_is_planted(kind, line):
    assert (kind, line) in mistakes()


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("bound", "values[x + 1:total]"),
        ("bound", "values[x:total - 1]"),
        ("swapped arguments", 'place(x, values, side="left")'),
        ("dropped keyword", "place(values, x),"),
        ("removed call", " (values), x.abs()"),
        ("removed call", "sorted(values), x"),
    ],
)
def test_a_mistake_in_a_long_line_is_planted(kind, part):
    assert any(found == kind and part in line for found, line in mistakes())


def test_nothing_is_planted_in_messages_annotations_comments_and_typing_blocks():
    found = {line for _, line in mistakes()}
    assert not any(part in line for line in found for part in ("x + 2", "x - 1}", "list[2]", "ELSE =", "x: int =="))
    assert not any("min(LIMIT, x * 2)" in line for line in found)  # the order of two equal roles
    assert not any(line.endswith("os, sorted(values), x.abs()") for line in found)  # a module is no value


def test_a_sample_is_reproducible_compiles_and_does_not_move_when_other_lines_change():
    file = "models/pooling.py"
    source = (PROJECT / file).read_text()
    mutants = list(itertools.islice(sample({file: source}, seed=0), 20))
    assert mutants == list(itertools.islice(sample({file: source}, seed=0), 20))
    assert [mutant.name for mutant in mutants] != [
        mutant.name for mutant in itertools.islice(sample({file: source}, seed=1), 20)
    ]
    for mutant in mutants:
        ast.parse(mutant.apply(source))
        assert mutant.diff(source).count("\n-") + mutant.diff(source).startswith("-") >= 1
    moved = itertools.islice(sample({file: f"# another first line\n{source}"}, seed=0), 20)
    assert [(mutant.name, mutant.line - 1) for mutant in moved] == [(mutant.name, mutant.line) for mutant in mutants]


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_tests_are_ordered_by_imports(tmp_path):
    write(
        tmp_path,
        {
            "models/layers.py": "",
            "models/vit.py": "from models.layers import x",
            "models/choice.py": "module = import_module({'vit': 'models.vit'}[name])\nstart(HERE / 'server.py')",
            "models/server.py": "",
            "train.py": "def main():\n    from models import vit",
            "tests/helpers/tools.py": "import models.vit",
            "tests/models/test_vit.py": "import models.vit",
            "tests/models/test_layers.py": "import tools",
            "tests/models/test_choice.py": "import models.choice",
            "tests/test_train.py": "run('train.py')",
            "tests/other/test_direct.py": "import models.layers",
            "tests/other/test_unrelated.py": "import os",
            "tests/gpu/test_gpu.py": "import models.layers",
        },
    )
    assert NearestTests(tmp_path).of("models/layers.py") == [
        "tests/models/test_layers.py",
        "tests/models/test_vit.py",
        "tests/models/test_choice.py",
        "tests/other/test_direct.py",
        "tests/test_train.py",
    ]
    assert NearestTests(tmp_path).of("models/server.py") == ["tests/models/test_choice.py"]


@pytest.mark.parametrize(
    ("output", "code", "expected"),
    [
        ("3 passed in 1.0s", 0, (None, True)),
        ("no tests ran", 5, (None, True)),
        ("FAILED tests/a.py::test_b[1 - 2] - assert 1 == 2\n", 1, ((KILLED, "tests/a.py::test_b[1 - 2]"), False)),
        ("ERROR tests/a.py - ImportError: no\n", 2, ((KILLED, "tests/a.py"), False)),
        ("a.py:3: Failed: Timeout (>9.0s)\nFAILED tests/a.py::test_b\n", 1, ((TIMED_OUT, "tests/a.py::test_b"), False)),
        ("!!! session-timeout: 2.0 sec exceeded !!!", 1, (None, False)),
        ("", -11, ((KILLED, None), False)),
    ],
)
def test_the_output_of_pytest_is_read(output, code, expected):
    assert read_output(output, code) == expected


def test_a_mutant_is_killed_by_a_test_that_passes_without_it(tmp_path, monkeypatch):
    project = tmp_path / "project"
    write(
        project,
        {
            "sums.py": "def add(a, b):\n    return a + b\n\n\ndef unused(a):\n    return a + 1\n",
            "tests/test_sums.py": "import sys\n\nfrom sums import add\n\n\ndef test_broken():\n    assert 0\n\n\n"
            # A program that a test forks imports the main module again: it must not be that of the user's tree.
            "def test_main():\n    assert not hasattr(sys.modules['__main__'], '__file__')\n\n\n"
            "def test_add():\n    assert add(2, 1) == 3\n",
            "pyproject.toml": "[tool.pytest.ini_options]\npythonpath = ['.']\n",
        },
    )
    for words in (["init"], ["add", "."], ["commit", "-m", "first"]):
        git(project, *words)
    monkeypatch.setattr(mutant_trial, "PROJECT", project)
    source = (project / "sums.py").read_text()
    trial = Trial(tmp_path / "clone", "HEAD", limit_seconds=60)
    verdicts = {
        (mutant.line, mutant.kind): trial.judge(mutant, source)
        for mutant in sample({"sums.py": source}, seed=0)
        if mutant.kind == "arithmetic"
    }
    assert verdicts == {
        (2, "arithmetic"): Verdict(KILLED, "tests/test_sums.py::test_add", 0, 1),
        (6, "arithmetic"): Verdict(SURVIVED, None, 1, 1),
    }
    assert trial.is_sound == {"tests/test_sums.py::test_broken": False, "tests/test_sums.py::test_add": True}
    assert (project / "sums.py").read_text() == source and (tmp_path / "clone" / "sums.py").read_text() == source


def test_the_report_counts_and_a_survivor_is_explained(tmp_path, capsys):
    report = mutation.Report(tmp_path, seed=0, sample_size=4)
    drawn = list(itertools.islice(sample({"models/a.py": SOURCE}, seed=0), 4))
    first, second, third, _ = report.left(drawn, None)
    report.add(first, "-a\n+b", Verdict(SURVIVED, None, 2, 3), "abc", 1.0)
    report.add(second, "-c\n+d", Verdict(KILLED, "tests/a.py::test_b", 0, 3), "abc", 1.0)
    report.add(third, "-e\n+f", Verdict(UNTESTED, None, 0, 3), "abc", 1.0)
    page = (tmp_path / "mutation.md").read_text()
    assert "**1 of 2 mutants noticed, too few for a share.** Of the sample of 4, 2 have not been tested." in page
    assert "| models | 3 | 1 | 0 | 1 | 1 |" in page and "2 of 3 test files ran to their end" in page
    again = mutation.Report(tmp_path, seed=0, sample_size=4)
    assert again.left(drawn, None) == drawn[3:] and again.left(drawn, SURVIVED) == [first, drawn[3]]
    again.explain(first.name, "both give the same")
    assert again.left(drawn, SURVIVED) == drawn[3:]
    assert "both give the same.\n\n```diff\n-a\n+b\n```" in (tmp_path / "mutation.md").read_text()
    with pytest.raises(UserError, match="has no survivor"):
        again.explain(second.name, "no")
    again.add(first, "-a\n+b", Verdict(KILLED, "tests/a.py::test_c", 0, 3), "def", 1.0)
    kept = json.loads((tmp_path / "mutation.json").read_text())["mutants"][0]
    assert (kept["first_outcome"], kept["outcome"], kept["commit"]) == (
        SURVIVED,
        KILLED,
        "def",
    ) and "reason" not in kept
    with pytest.raises(UserError, match="holds seed 0"):
        mutation.Report(tmp_path, seed=1, sample_size=9)


@pytest.mark.parametrize(("size", "left"), [(2, 0), (1, 0), (5, 3)])
def test_the_report_counts_a_sample_of_another_size(tmp_path, size, left):
    report = mutation.Report(tmp_path, seed=0, sample_size=2)
    drawn = list(itertools.islice(sample({"models/a.py": SOURCE}, seed=0), 5))
    report.left(drawn[:2], None)
    for mutant in drawn[:2]:
        report.add(mutant, "-a\n+b", Verdict(KILLED, "tests/a.py::test_b", 0, 3), "abc", 1.0)
    again = mutation.Report(tmp_path, seed=0, sample_size=200)  # the default of --explain, which draws nothing
    assert "Of the sample of 2, 0 have not been tested." in again.markdown()
    again.left(drawn[:size], None)
    assert f"Of the sample of {max(2, size)}, {left} have not been tested." in again.markdown()


def test_mutants_of_lines_that_were_edited_since_do_not_count_as_tested(tmp_path):
    report = mutation.Report(tmp_path, seed=0, sample_size=2)
    drawn = list(itertools.islice(sample({"models/a.py": SOURCE}, seed=0), 4))
    for mutant in report.left(drawn[:2], None):
        report.add(mutant, "-a\n+b", Verdict(KILLED, "tests/a.py::test_b", 0, 3), "abc", 1.0)
    assert report.left(drawn[1:3], None) == [drawn[2]]
    assert "Of the sample of 2, 1 have not been tested." in report.markdown()
