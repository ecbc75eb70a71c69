"""The table of all runs: rows of any folder, cache, seeds, conditions, order. Run: python -m pytest tests/reports"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import statistics
import threading
import time
from pathlib import Path

import pytest
from report_data import add_run

from benchmarks.run_index import add_epoch
from common.errors import SettingsError
from config.settings import resolve
from reports import run_table
from reports.index import payload
from reports.run_list import list_text
from reports.run_query import condition, ordered
from reports.run_rows import POINTS, Row, curves_of, read_row, settings_of
from reports.run_table import CACHE, columns_of, held_files, read_table, varied_columns


@pytest.fixture
def some(tmp_path) -> Path:
    """Two seeds of one setting inside a comparison, and one run of another setting."""
    runs = tmp_path / "runs"
    add_run(runs / "pairs-small" / "mlp-seed0", 0, 0.5)
    add_run(runs / "pairs-small" / "mlp-seed1", 1, 0.6)
    add_run(runs / "other", 0, 0.3, feed_forward="geglu", width=64)
    return runs


def by_name(rows: list[Row]) -> dict[str, Row]:
    return {row.values["name"]: row for row in rows}


def edit_facts(folder: Path, **changes: object) -> None:
    facts = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**facts, **changes}))


def test_a_row_has_settings_results_and_provenance(some):
    rows = by_name(read_table(some))
    assert set(rows) == {"pairs-small/mlp-seed0", "pairs-small/mlp-seed1", "other"}
    last = json.loads((some / "other" / "metrics.jsonl").read_text().splitlines()[-1])
    values = rows["other"].values
    assert values["model.feed_forward"] == "geglu" and values["preset"] == "cpu" and values["state"] == "finished"
    assert values["optimizer.params.lr"] == resolve("cpu", []).engine["optimizer"]["params"]["lr"]
    assert values["test_accuracy"] == last["test_accuracy"] and values["epoch"] == 3
    assert values["training_seconds"] > 300 > last["training_seconds"]  # the sum of three epochs
    assert {"model.feed_forward", "model.width", "seed", "test_accuracy"} <= set(varied_columns(list(rows.values())))
    assert "model.depth" not in varied_columns(list(rows.values()))


def test_seeds_of_one_setting_have_their_mean_and_spread(some):
    rows = by_name(read_table(some))
    pair = [rows[f"pairs-small/mlp-seed{seed}"] for seed in (0, 1)]
    accuracies = [row.values["test_accuracy"] for row in pair]
    for row in pair:
        assert row.values["seeds"] == 2
        assert row.values["seeds_mean"] == pytest.approx(statistics.mean(accuracies), abs=1e-6)
        assert row.values["seeds_sd"] == pytest.approx(statistics.stdev(accuracies), abs=1e-6)
    assert pair[0].setting == pair[1].setting != rows["other"].setting and "seeds" not in rows["other"].values
    edit_facts(some / "pairs-small" / "mlp-seed1", code={"fingerprint": "sha256:another source"})
    rows = by_name(read_table(some))
    assert "seeds" not in rows["pairs-small/mlp-seed0"].values  # runs of two versions of the code have no mean


def test_of_several_runs_of_one_seed_the_newest_counts(some):
    older, newer = (some / "pairs-small" / name for name in ("mlp-seed0", "again"))
    shutil.copytree(older, newer)
    for new, old in ((newer, older), (older, newer)):
        edit_facts(new, started="2026-06-02T12:00:00+00:00")
        edit_facts(old, started="2026-06-01T12:00:00+00:00")
        lines = [json.loads(line) for line in (new / "metrics.jsonl").read_text().splitlines()]
        lines[-1]["test_accuracy"] = 0.25 + 0.5 * (new == newer)
        (new / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        rows = by_name(read_table(some))
        accuracies = [rows[f"pairs-small/{name}"].values["test_accuracy"] for name in (new.name, "mlp-seed1")]
        values = rows["pairs-small/mlp-seed1"].values
        assert values["seeds"] == 2 and values["seeds_mean"] == pytest.approx(statistics.mean(accuracies), abs=1e-6)


def test_a_value_that_some_runs_lack_is_not_shared_by_all(tmp_path):
    for name, max_steps, options in (("a", None, {}), ("b", 100, {"hidden": 512})):
        add_run(tmp_path / name)
        facts = json.loads((tmp_path / name / "run.json").read_text())
        facts["settings"]["model"]["feed_forward_options"] = options
        edit_facts(tmp_path / name, max_steps=max_steps, settings=facts["settings"])
    add_run(tmp_path / "damaged")
    (tmp_path / "damaged" / "run.json").write_text("{")
    rows = read_table(tmp_path)
    columns = {"model.feed_forward_options.hidden", "max_steps"}
    assert columns <= set(varied_columns(rows)) and "model.depth" not in varied_columns(rows)
    constant = payload(rows, tmp_path, tmp_path)["constant"]
    assert not columns & constant.keys() and constant["model.depth"] == rows[0].values["model.depth"]


def test_seeds_of_different_time_budgets_are_not_averaged(tmp_path):
    for seed, minutes in enumerate((3, 20, 20)):
        add_run(tmp_path / f"seed{seed}", seed)
        edit_facts(tmp_path / f"seed{seed}", max_minutes=minutes)
    assert [row.values.get("seeds") for row in read_table(tmp_path)] == [None, 2, 2]


def test_only_changed_folders_are_read_again(some, monkeypatch):
    read: list[str] = []
    monkeypatch.setattr(run_table, "read_row", lambda *args: read.append(args[2]) or read_row(*args))
    first = read_table(some)
    assert len(read) == 3
    assert read_table(some) == first and len(read) == 3
    add_epoch(some / "other")
    assert by_name(read_table(some))["other"].values["epoch"] == 4 and read[3:] == ["other"]
    shutil.rmtree(some / "other")
    assert len(read_table(some)) == 2 and len(read) == 4
    for damage in ("", "{", '{"version": "1", "rows": {}}', "[]"):
        (some / CACHE).write_text(damage)
        assert len(read_table(some)) == 2
    assert len(read) == 4 + 4 * 2


def test_a_table_without_a_writable_cache_is_complete(some, monkeypatch):
    def refuse(path, text):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(run_table, "replace_file", refuse)
    assert len(read_table(some)) == 3 and not (some / CACHE).exists()


def test_a_run_whose_lock_is_held_is_running_while_other_processes_wait_for_locks(some):
    for name in ("other", "pairs-small/mlp-seed0"):
        edit_facts(some / name, total_steps=10**9)
        (some / name / "lock").touch()
    with open(some / "other/lock") as lock, open(some / "other/lock") as same:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = threading.Thread(target=fcntl.flock, args=(same, fcntl.LOCK_EX))
        waiting.start()
        while "-> FLOCK" not in Path("/proc/locks").read_text():
            time.sleep(0.01)
        states = {name: row.values["state"] for name, row in by_name(read_table(some)).items()}
        fcntl.flock(lock, fcntl.LOCK_UN)
        waiting.join()
    assert states == {"other": "running", "pairs-small/mlp-seed0": "unfinished", "pairs-small/mlp-seed1": "finished"}


def test_a_lock_is_known_by_device_and_inode():
    locks = "1: FLOCK  ADVISORY  WRITE 7 fe:10:77 0 EOF\n2: POSIX  ADVISORY  WRITE 7 fe:10:78 0 EOF\n"
    assert held_files(locks + "3: FLOCK  ADVISORY  WRITE 7 00:1b:79 0 EOF") == {(0xFE, 0x10, 77), (0, 0, 79)}


BROKEN = {
    "run.json is cut short": ({"run.json": '{"settings": {'}, "damaged: JSONDecodeError"),
    "run.json is a list": ({"run.json": "[1]"}, "damaged: ValueError: run.json is not a JSON object"),
    "run.json of another program": ({"run.json": '{"name": "x", "date": 3}'}, "run.json has no settings"),
    "groups are numbers": ({"run.json": '{"settings": 1, "dataset": [], "versions": 2}'}, "run.json has no settings"),
    "settings are texts": ({"run.json": '{"settings": {"a": "b"}, "steps_per_epoch": "x"}'}, "no epoch finished yet"),
    "not UTF-8": ({"run.json": b"\xff\xfe{}"}, "damaged: UnicodeDecodeError"),
    "being created": ({"run.json.node7-4711.unfinished": ""}, "run.json is missing: a run that has not started"),
    "not started": ({"run.json.unfinished": "", "lock": ""}, "run.json is missing: a run that has not started"),
    "foreign": ({"notes.txt": "mine"}, "not a run folder: no run.json"),
    "empty": ({}, "empty folder"),
    "broken comparison": ({"report.json": '{"results": {}}'}, "damaged: IndexError"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_folder_is_a_row_with_a_note(tmp_path, what):
    files, note = BROKEN[what]
    (tmp_path / "it").mkdir()
    for name, content in files.items():
        (tmp_path / "it" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (row,) = read_table(tmp_path)
    assert row.note.startswith(note) and "\n" not in row.note
    json.dumps(row.values, allow_nan=False)
    assert note in list_text([row], None, [])


def test_a_folder_that_could_not_be_read_is_read_again(some):
    path = some / "other" / "run.json"
    intact, time_ns = path.read_text(), path.stat().st_mtime_ns
    path.write_text("x" + intact[1:])
    os.utime(path, ns=(time_ns, time_ns))
    assert by_name(read_table(some))["other"].note.startswith("damaged")
    path.write_text(intact)  # size and time are those of the damaged file
    os.utime(path, ns=(time_ns, time_ns))
    assert by_name(read_table(some))["other"].note == ""


def test_broken_metrics_keep_the_intact_lines(some):
    path = some / "other" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], '{"step": 3', '"text"', '{"step": NaN}', lines[1], lines[2][:40]]))
    (some / "other" / "steps.jsonl").write_text("nothing\n{}\n")
    (some / "other" / "evaluation_test.json").write_text("[]")
    row = by_name(read_table(some))["other"]
    assert row.note == "metrics.jsonl: 3 unreadable lines left out" and row.values["state"] == "unfinished"
    assert row.values["epoch"] == 2 and row.curves["epoch"] == [1, 2] and "step_loss" not in row.curves


def test_a_setting_that_is_newer_than_the_run_has_its_default():
    tree = resolve("cpu", []).as_dict()
    assert tree["model"].pop("attention") != tree["model"].pop("block")
    old = settings_of(tree)
    assert old["model.attention"] == resolve(None, []).model.attention and "model.block" in old
    assert not any(path.startswith("engine.") for path in old)


def test_curves_are_thinned_to_the_same_points_with_both_ends():
    lines = [
        {"step": 10 * i, "training_seconds": 60, "train_loss": 1 / i, "test_loss": float("nan")} for i in range(1, 501)
    ]
    steps = [{"step": i, "step_loss": i} for i in range(1, 5001)]
    curves = curves_of(lines, steps, 10)
    assert len(curves["step"]) == len(curves["train_loss"]) == POINTS and "test_loss" not in curves
    assert (curves["epoch"][0], curves["epoch"][-1], curves["minutes"][-1]) == (1, 500, 500)
    assert curves["train_loss"][-1] == pytest.approx(1 / 500, rel=1e-3)
    assert len(curves["step_loss"]) <= POINTS and statistics.mean(curves["step_loss"]) == pytest.approx(2500, rel=0.01)


CONDITIONS = {
    "model.feed_forward=geglu": {"other"},
    "feed_forward!=geglu": {"pairs-small/mlp-seed0", "pairs-small/mlp-seed1"},
    "name=pairs-small/*": {"pairs-small/mlp-seed0", "pairs-small/mlp-seed1"},
    "seed=1": {"pairs-small/mlp-seed1"},
    "model.width >= 64": {"pairs-small/mlp-seed0", "pairs-small/mlp-seed1", "other"},
    "model.width<65": {"other"},
    "flip>0": {"pairs-small/mlp-seed0", "pairs-small/mlp-seed1", "other"},
    "date>=2026": {"pairs-small/mlp-seed0", "pairs-small/mlp-seed1", "other"},
    "date<2026": set(),
    "uncommitted_changes=false": {"pairs-small/mlp-seed0", "pairs-small/mlp-seed1", "other"},
    "seeds!=2": {"other"},
}


def test_conditions_choose_rows(some):
    rows = read_table(some)
    columns = columns_of(rows)
    for text, expected in CONDITIONS.items():
        one = condition(text, columns, rows)
        assert {row.values["name"] for row in rows if one.holds(row)} == expected, text


@pytest.mark.parametrize(
    "text, message",
    [
        ("geglu", "--where 'geglu' is not a condition. Write for example"),
        ("model.feedforward=geglu", "did you mean 'model.feed_forward'?"),
        ("test_accuracy>high", "test_accuracy is a number, and 'high' is not"),
    ],
)
def test_a_wrong_condition_is_one_sentence(some, text, message):
    rows = read_table(some)
    with pytest.raises(SettingsError) as error:
        condition(text, columns_of(rows), rows)
    assert message in str(error.value)


def test_the_best_come_first_and_rows_without_a_value_last():
    rows = [Row("run", name, {"name": name, **values}) for name, values in (
        ("a", {"test_accuracy": 0.2, "train_loss": 3, "date": "2026-01-01"}),
        ("b", {}),
        ("c", {"test_accuracy": 0.5, "train_loss": 1, "date": "2026-02-01"}),
    )]  # fmt: skip

    def order(*args) -> str:
        return "".join(row.path for row in ordered(rows, *args))

    assert order("test_accuracy") == order("train_loss") == order("date") == "cab" and order("name") == "abc"
    assert order("test_accuracy", True) == order("train_loss", True) == order("date", True) == "acb"


def test_the_list_shows_what_was_asked_for_and_what_differs(some, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    (some / "broken").mkdir()
    text = list_text(read_table(some), "test_accuracy", ["test_accuracy>0.2"])
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["pairs-small/mlp-seed1", "pairs-small/mlp-seed0", "other"]
    assert "model.feed_forward" in lines[0] and "geglu" in lines[3] and lines[4] == "3 runs, of 4 rows"


def test_a_comparison_is_a_row_with_its_variants(tmp_path):
    kept = Path(__file__).parents[2] / "results"
    (tmp_path / "runs").mkdir()
    row = by_name(read_table(tmp_path / "runs", kept))["results/attention-defaults-small"]
    report = json.loads((kept / "attention-defaults-small" / "report.json").read_text())
    best = max(report["results"]["validation"], key=lambda one: one["mean"])
    assert row.values["best_variant"] == best["arm"] and row.note == "" and row.page == "report.md"
    assert row.values["validation_accuracy"] == pytest.approx(best["mean"] / 100, rel=1e-3)
    assert [one["name"] for one in row.variants] == list(report["arms"]) and row.variants[0]["verdict"] == "reference"
