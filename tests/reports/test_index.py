"""The page of all runs: one file, harmless names, links, the end of a run. Run: python -m pytest tests/reports"""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path

import pytest
from programs import run as run_script
from report_data import References, add_run

from common.errors import RunError
from common.paths import RUNS_OF_COMPARISON
from config.settings import resolve
from reports import index
from reports.index import for_script, index_of, write_index
from training.trackers import RunIndex, Tracking

EVIL = "</script><img src=x onerror=alert(1)>"


def data_of(text: str) -> dict:
    packed = re.search(r'id="data">([A-Za-z0-9+/=]+)</script>', text)
    assert packed is not None
    return json.loads(gzip.decompress(base64.b64decode(packed[1])))


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """The page of two runs, one of them with markup in its name and in a setting."""
    runs = tmp_path_factory.mktemp("pages") / "runs"
    add_run(runs / "plain")
    add_run(runs / "<img src=x onerror=alert(1)> & 50% #1", 1, feed_forward=EVIL)
    (runs / "javascript:alert(1)").mkdir()
    return write_index(runs, None).path


def test_the_page_needs_no_other_file(page):
    text = page.read_text()
    references = References(text)
    assert references.found == [] and "img" not in references.tags
    assert "default-src 'none'" in text and len(text) < 8e6
    assert len(re.findall(r"<script (nonce|type)=[^>]*>", text)) == text.count("</script>") == 5


def test_names_and_settings_are_data_and_links_are_quoted(page):
    text = page.read_text()
    assert EVIL not in text
    data = data_of(text)
    keys = [column["key"] for column in data["columns"]]
    assert EVIL in {row["values"][keys.index("model.feed_forward")] for row in data["rows"]}
    links = {row["href"] for row in data["rows"]}
    assert links == {
        "./plain/",
        "./%3Cimg%20src%3Dx%20onerror%3Dalert%281%29%3E%20%26%2050%25%20%231/",
        "./javascript%3Aalert%281%29/",
    }
    assert (
        data["constant"]["model.heads"] == resolve("cpu", []).model.heads
        and "model.feed_forward" not in data["constant"]
    )


def test_a_library_cannot_end_its_script_element():
    assert for_script("a = '</script>'; b = '<!-- x'") == "a = '<\\/script>'; b = '<\\!-- x'"


def test_a_page_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(RunError, match="there is no run in .*; start one with"):
        write_index(tmp_path, None)
    add_run(tmp_path / "a")
    (tmp_path / "index.html").mkdir()
    with pytest.raises(RunError, match="cannot be written .*--out FILE.html"):
        write_index(tmp_path, None)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".index.html")]
    monkeypatch.setitem(index.LIBRARIES, "plotly", ("no_such_package", "x.js"))
    with pytest.raises(RunError, match="needs the package no_such_package"):
        write_index(tmp_path, None)


def test_a_run_ends_with_the_page_and_never_because_of_it(unbroken, tmp_path, monkeypatch):
    names = [row["href"] for row in data_of((unbroken.folder.parent / "index.html").read_text())["rows"]]
    assert f"./{unbroken.folder.name}/report.html" in names
    said: list[str] = []
    monkeypatch.setattr(index, "read_table", lambda *args: 1 / 0)
    with Tracking([RunIndex(tmp_path / "run")], say=said.append):
        pass
    assert said == ["warning: RunIndex is disabled (ZeroDivisionError: division by zero); training continues"]


def test_a_run_of_a_comparison_belongs_to_the_page_of_all_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "RUNS", tmp_path / "runs")
    assert index_of(tmp_path / "runs" / "pairs-small" / "mlp-seed0") == tmp_path / "runs"
    assert index_of(tmp_path / "elsewhere" / "mine") == tmp_path / "elsewhere"
    (tmp_path / "disk").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "disk")
    monkeypatch.setattr(index, "RUNS", tmp_path / "linked")
    assert index_of(tmp_path / "linked" / "pairs-small" / "mlp-seed0") == tmp_path / "linked"
    monkeypatch.setenv(RUNS_OF_COMPARISON, str(tmp_path / "scratch"))  # compare.py --runs-dir scratch
    assert index_of(tmp_path / "scratch" / "pairs-small" / "mlp-seed0") == tmp_path / "scratch"


def test_the_command_writes_the_page_and_prints_the_list(page, tmp_path):
    runs = page.parent
    common = ("--runs-dir", runs, "--results-dir", tmp_path)
    said = run_script("report.py", "--index", *common, "--out", tmp_path / "all.html").out
    assert "all.html (2 runs, 1 other folder)" in said and '"./' not in (tmp_path / "all.html").read_text()[:2000]
    listed = run_script("report.py", "--list", "--sort", "train_loss", "--where", "name=plain", *common).out
    assert listed.splitlines()[1].startswith("plain ") and listed.splitlines()[2] == "1 run, of 3 rows"
    wrong = run_script("report.py", "--list", "--where", "depht=3", *common, code=1).err
    assert wrong.startswith("error: --where: unknown column 'depht'") and wrong.count("\n") == 1
    both = run_script("report.py", "--list", "--index", code=2).err
    assert both.startswith("error: --index and --list exclude each other")
