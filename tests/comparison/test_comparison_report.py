"""compare.py: the content of a report, from invented runs and from real ones.

The real runs are forks of train.py; one goes through the launcher.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time

import programs
import psutil
import pytest
from comparisons import COMMON, VARIANTS, report
from torch import nn

import compare
import comparison.report
import reports.style
from benchmarks.lib.forked_programs import run_script
from common.paths import PROJECT
from common.text import without_paths
from comparison.planned_run import PlannedRun
from image_data.dataset import Dataset
from models import feed_forward as feedforward
from records.run_folder import RunFolder
from reports.style import BLACK, short_names
from reports.variants import accuracy_against

# --- content of a report ------------------------------------------------------------------------------------------


def test_unequal_variants_are_named_and_marked(ask, invented, tmp_path, monkeypatch):
    # as if the variants had been run one after the other, with an edit between them
    monkeypatch.setattr("comparison.run_queue.changed_since", lambda code: [])
    for seed in (0, 1):
        invented.facts[f"gated-seed{seed}"] = {
            "code": {"fingerprint": "456", "files": {"train.py": "other", "models/position.py": "only here"}},
            "device": "NVIDIA H200",
            "changes": [{"after_step": 4, "what": ["processes: 1 before, 2 now"]}],
        }
    ask(COMMON + VARIANTS.replace("32", "40") + "train_batch_size = 32\n")
    text, data = report(tmp_path)
    assert data["arms"]["gated"]["unequal"] == [
        "parameters: 50,060 instead of 48,460 (1.03 x)",
        "source code: 'train.py' differ",
        "device: 1 x NVIDIA H200 instead of 1 x CPU",
        "images trained on: 192 instead of 384",
        "seed 0 resumed after step 4: processes: 1 before, 2 now",
        "seed 1 resumed after step 4: processes: 1 before, 2 now",
    ]
    assert "- **gated**\\* against plain:" in text and "| gated\\* |" in text
    assert "- **gated**\\*: images trained on: 192" in text


def test_the_report_names_the_processor_that_trained_and_marks_another_one(ask, invented, tmp_path):
    for name, cores in (("plain", 2), ("gated", 4)):
        for seed in (0, 1):
            invented.facts[f"{name}-seed{seed}"] = {"processor": {"name": "AMD EPYC", "cores": cores}}
    assert ask()[0] == 0
    text, data = report(tmp_path)
    assert data["arms"]["gated"]["unequal"] == [
        "device: 1 x CPU (AMD EPYC, 4 cores) instead of 1 x CPU (AMD EPYC, 2 cores)"
    ]
    assert "depend on the device (CPU (AMD EPYC, 2 cores), CPU (AMD EPYC, 4 cores))" in text


def test_without_a_record_of_the_source_the_commits_are_compared(ask, invented, tmp_path):
    for name in ("plain", "gated"):
        for seed in (0, 1):
            facts = {"code": None, "commit": "abc" if name == "plain" else None, "uncommitted_changes": None}
            invented.facts[f"{name}-seed{seed}"] = facts
    assert ask()[0] == 0
    text, data = report(tmp_path)
    assert data["arms"]["gated"]["unequal"] == ["commit: unknown instead of abc"]
    assert data["commits"] == ["abc", "unknown"] and "Commit abc, unknown" in text


def test_equal_variants_are_reported_as_equal(ask, invented, tmp_path):
    ask()
    text, data = report(tmp_path)
    assert "compared over all runs: equal." in text and "\\*" not in text


def test_without_runs_of_the_first_variant_no_other_takes_its_place(ask, invented, tmp_path, monkeypatch):
    invented.fails["plain"] = "error: out of memory"
    drawn = {}
    monkeypatch.setattr(comparison.report, "save", lambda figure, path: drawn.update({path.stem: figure}))
    third = '[[variants]]\nname = "third"\nidea = "Less."\nmodel.depth = 1\n'
    assert ask(COMMON + VARIANTS + third)[0] == 1
    text, data = report(tmp_path)
    assert "Runs were not compared: the first variant has no finished run" in text
    assert "compared over all runs" not in text
    assert [axes.get_title() for axes in drawn["curves"].axes] == ["gated", "third *"]
    for name in ("accuracy", "costs", "curves", "curves-by-cost"):
        colors = {line.get_color() for axes in drawn[name].axes for line in axes.lines}
        assert colors and BLACK not in colors, name


def test_pictures_show_many_variants_with_long_names(tmp_path):
    names = [f"{'long-' * 18}{i:02}" for i in range(60)] + ["a" * 50 + "b" + "c" * 49, "a" * 50 + "d" + "c" * 49]
    shown = short_names([names[0] + " *", *names]).values()
    assert len(set(shown)) == len(names) + 1 and max(map(len, shown)) <= 30 and next(iter(shown)).endswith(" *")
    costs = {name: {"accuracy": [50.0 + i], "parameters": i} for i, name in enumerate(names)}
    figure = accuracy_against(costs, names[0], "Which?", "accuracy (%)")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == list(short_names(names).values())
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert legend.y0 >= 0 and figure.axes[0].get_position().width > 0.3


def test_the_numbers_of_a_report(ask, invented, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison.report, "save", reports.style.save)  # its pictures are rendered
    for seed in range(6):
        invented.accuracy |= {
            f"plain-seed{seed}": 0.5 + seed / 100,
            f"gated-seed{seed}": 0.55 + seed / 100 + (seed % 2) / 1000,
        }
    code, out, _ = ask(COMMON + VARIANTS, "--seeds", "6")
    text, data = report(tmp_path)
    plain, gated = data["results"]["validation"]
    assert (
        code == 0
        and plain["mean"] == pytest.approx(52.5)
        and plain["sd"] == pytest.approx(1.8708, abs=1e-4)
        and plain["n"] == 6
    )
    assert gated["difference"]["mean"] == pytest.approx(5.05) and gated["difference"]["p"] == 2 / 64
    assert gated["difference"]["half"] == pytest.approx(0.0575, abs=1e-4)
    sentence = (
        "+5.05 points (95 % CI +4.99 to +5.11, n = 6; p < 0.0001 paired t, p = 0.031 sign-flip; d = 92.2): "
        "confirmed better"
    )
    assert gated["difference"]["sentence"] == sentence and sentence in out
    assert f"- **gated** against plain: {sentence}." in text
    assert "commit abc" in text.lower() and "`model.feed_forward` 'geglu' (not 'mlp')" in text
    for name in ("differences.png", "accuracy.png", "costs.png", "curves.png", "curves-by-cost.png"):
        assert (tmp_path / "results" / "gates" / name).stat().st_size > 5000 and f"({name})" in text


def test_a_margin_makes_equivalence_a_verdict(ask, invented, tmp_path):
    for seed in range(6):
        invented.accuracy[f"gated-seed{seed}"] = 0.5 + (seed % 2) / 1000
    ask("margin = 1.0\n" + COMMON + VARIANTS, "--seeds", "6")
    text, data = report(tmp_path)
    assert data["results"]["validation"][1]["difference"]["verdict"] == "equivalent" and data["margin"] == 1.0
    assert "equivalent within ±1 points" in text and "two one-sided t tests" in text


def test_the_test_split_appears_with_final_only(ask, invented, tmp_path):
    ask()
    text, data = report(tmp_path)
    assert "12.35" not in text and "0.1234" not in json.dumps(data) and "test_accuracy" not in json.dumps(data)
    assert "## Result on the validation split" in text and "neither used nor shown" in text
    code, out, _ = ask(COMMON + VARIANTS, "--final")
    text, data = report(tmp_path)
    assert (
        text.index("## Result on the test split") < text.index("## Result on the validation split") and "12.35" in text
    )
    assert data["results"]["test"][0]["mean"] == pytest.approx(12.3456) and data["final"]


PART = """from torch import nn
class Same(nn.Module):
    def __init__(self, dims):
        super().__init__()
        self.map = nn.Linear(dims.width, dims.width)
    def forward(self, x):
        return self.map(x)
"""


def check_no_path(folder, *paths) -> None:
    for path in folder.glob("report.*"):
        text = path.read_text()
        assert not re.search(r"(?<![\w:/])/(home|tmp|work|root|usr|var|private)/", text)
        assert not [path for path in paths if str(path) in text]


def test_a_report_contains_no_path_of_this_machine_with_own_parts_that_are_tuned_or_set(ask, invented, tmp_path):
    (tmp_path / "mine.py").write_text(PART)
    variants = VARIANTS.replace("A gate.", "mine.py:Same").replace(
        'model.feed_forward = "geglu"\nmodel.feed_forward_options.hidden = 32', "model.depth = 1"
    )
    tune = '[tune]\n"model.feed_forward" = ["mlp", "mine.py:Same"]\n'
    attention = ["--set", f'model.attention="{tmp_path}/mine.py:Same"']
    code, out, err = ask(COMMON + tune + variants.replace("The reference.", "As mine.py:Same."), *attention)
    assert code == 0, err
    text, data = report(tmp_path)
    check_no_path(tmp_path / "results" / "gates", tmp_path)
    assert "--set model.attention=mine.py:Same" in data["command"] and data["arms"]["gated"]["idea"] == "mine.py:Same"
    assert data["tuning"]["candidates"][1] == {"model.feed_forward": "mine.py:Same"}
    assert any(name.startswith("tuning-plain-feed_forward=mine.py_Same-at-") for name in invented.started)
    assert "| plain | mlp |" in text and "is not among the candidates" not in out
    # a part with a bug, and two parts of one name, end everything before the data are fetched
    (tmp_path / "mine.py").write_text(PART.replace("dims.width, dims.width", "dims.breadth, 1"))
    code, _, err = ask(COMMON + tune + variants, "--data-dir", str(tmp_path / "not-there"))
    assert code == 1 and "tune: variant 'plain' with feed_forward mine.py_Same: " in err and "breadth" in err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.py").write_text(PART)
    err = ask(COMMON + tune.replace('"mlp"', '"other/mine.py:Same"') + variants)[2]
    assert "two candidates would both be called feed_forward=mine.py_Same" in err


def test_a_report_contains_no_path_of_this_machine(ask, invented, tmp_path, shapes):
    ask()
    check_no_path(tmp_path / "results" / "gates", tmp_path, shapes)
    assert (
        without_paths("no /a/b/c.toml, see https://x.org/a/b and 3/4 of runs/a")
        == "no c.toml, see https://x.org/a/b and 3/4 of runs/a"
    )
    assert (
        without_paths("listed in ../../tmp/run/bad.txt, ../top.txt and runs/a/../b")
        == "listed in bad.txt, top.txt and runs/a/../b"
    )


# --- real runs ----------------------------------------------------------------------------------------------------


class Forked:
    """A run of train.py as a fork with PyTorch in memory, and with a new feed-forward in the registry."""

    def __init__(self, task: PlannedRun, environment: dict[str, str]):
        self.program = programs.Program(train_with_new_entry, tuple(task.arguments), {})
        self.log = task.log

    def poll(self) -> int | None:
        if self.program.process.is_alive():
            return None
        done = self.program.end()
        self.log.write_text(done.out + done.err)
        return done.code

    def terminate(self) -> None:
        self.program.send(signal.SIGTERM)


class Twice(nn.Module):
    """A linear map, scaled."""

    def __init__(self, dims, factor: float = 0.5):
        super().__init__()
        self.map, self.factor = nn.Linear(dims.width, dims.width), factor

    def forward(self, x):
        return self.map(x) * (1 + self.factor)


def train_with_new_entry(*arguments: str) -> None:
    sys.path.insert(0, str(PROJECT))
    from models import feed_forward as feedforward

    feedforward.FEED_FORWARDS["twice"] = Twice
    run_script("train.py", *arguments)


def test_a_new_feed_forward_is_a_variant_like_any_other_next_to_one_that_fails(ask, monkeypatch, tmp_path, shapes):
    """Real runs: one variant of a new entry, one whose loss explodes, one plain."""
    monkeypatch.setattr(compare, "launch", Forked)
    monkeypatch.setitem(feedforward.FEED_FORWARDS, "twice", Twice)
    variants = VARIANTS.replace("gated", "twice").replace('"geglu"', '"twice"').replace("hidden = 32", "factor = 0.25")
    variants += '[[variants]]\nname = "explodes"\nidea = "A far too large learning rate."\noptimizer.params.lr = 1e30\n'
    code, out, err = ask(COMMON.replace("seeds = 2", "seeds = 1") + variants)
    assert "missing: explodes" in err, out + err
    text, data = report(tmp_path)
    assert code == 1 and list(data["missing"]) == ["explodes-seed0"], data["missing"]
    assert "error: the loss is nan at" in data["missing"]["explodes-seed0"]
    plain, twice, _ = data["results"]["validation"]
    assert plain["n"] == twice["n"] == 1 and twice["images_per_second"] > 0 and 0 <= twice["mean"] <= 100
    assert data["dataset"]["fingerprint"] == Dataset.open(shapes).fingerprint and all(
        "parameters" in line for line in data["arms"]["twice"]["unequal"]
    )
    assert "inconclusive. One seed gives no interval" in text or "identical with every seed" in text
    seen = data["results"]["validation"][0]["by_seed"]["0"] / 100 * 30
    assert seen == pytest.approx(round(seen)) and str(tmp_path) not in text


def test_ctrl_c_lets_the_runs_save(tmp_path, tiny, shapes):
    """End to end: compare.py as a program, the launcher, DeepSpeed's launcher, train.py."""
    (tmp_path / "tiny.toml").write_text(tiny.read_text())
    (tmp_path / "gates.toml").write_text(
        COMMON.replace("steps = 6", "steps = 100000").replace("seeds = 2", "seeds = 1") + VARIANTS
    )
    command = [
        sys.executable,
        str(PROJECT / "compare.py"),
        "gates.toml",
        "--cold",
        "--data-dir",
        str(shapes),
        "--runs-dir",
        "runs",
        "--results-dir",
        "results",
    ]
    child = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=programs.clean_environment(),
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/gates/*/metrics.jsonl")):
        assert child.poll() is None and time.monotonic() < deadline, (
            child.communicate()[0] if child.poll() is not None else "too slow"
        )
        time.sleep(0.1)
    below = psutil.Process(child.pid).children(recursive=True)
    child.send_signal(signal.SIGINT)
    out, _ = child.communicate(timeout=60)
    (metrics,) = tmp_path.glob("runs/gates/*/metrics.jsonl")
    record = RunFolder(metrics.parent)
    assert (
        child.returncode == 75
        and "stopping: 1 run(s) save first" in out
        and "start the same command again to resume" in out
    ), out
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in below)
    assert "saved" in metrics.parent.with_name(f"{metrics.parent.name}.log").read_text()
    saved = int(record.newest_checkpoint().name.removeprefix("step-"))
    assert saved >= 4 and RunFolder.read_progress(record.newest_checkpoint()).epoch >= 1
