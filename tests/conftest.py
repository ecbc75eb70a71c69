"""Shared fixtures: a small generated dataset, the preset of a tiny network, and one uninterrupted run."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import zipfile
from pathlib import Path

# Libraries read these when they are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes with a thread per core each were 40 times slower
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded

import programs
import pytest
from launching import STUB, fake
from small_runs import TEST_PER_CLASS, TINY, TRAIN_PER_CLASS

from common.paths import PROJECT, RUNS_OF_COMPARISON
from common.stop_signal import StopSignal
from image_data.preparation.prepare import prepare
from records.run_data import RunData
from records.run_folder import RunFolder

LONGEST = (
    "test_several_hosts.py",
    "test_optimizers_by_strategy.py",
    "test_launchers.py",
    "test_resume.py",
    "test_peer_engine.py",
    "test_zero.py",
    "test_strategies_benchmark.py",
    "test_input_pipeline.py",
    "test_engines.py",
    "test_ema.py",
    "test_comparison_report.py",
    "test_training_step.py",
    "test_train.py",
    "test_robust_launch.py",
    "test_depthwise_kernel.py",
    "test_non_finite.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """Give every test, and the programs that it starts, the same machine, whoever runs the tests and where.

    Only `-m gpu` sees GPUs. Git knows no settings of the user, nor the repository whose hook runs the tests. SIGINT is
    handled even if a shell started the tests in the background with it ignored: programs inherit that, and bash cannot
    trap an ignored signal.
    """
    selected = config.option.markexpr
    if "gpu" not in selected or "not gpu" in selected:
        os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    os.environ["TESTED_BY"] = str(os.getpid())
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        del os.environ[name]
    os.environ |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    for who in ("GIT_AUTHOR", "GIT_COMMITTER"):
        os.environ |= {f"{who}_NAME": "tests", f"{who}_EMAIL": "tests@example.org"}
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list) -> None:
    """Run the longest files first, so that no worker is left with one at the end; one process keeps the order given."""
    if not hasattr(config, "workerinput"):
        return
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


@pytest.fixture(autouse=True)
def no_process_left(request):
    """End what a failing test leaves running: it would disturb later tests and keep pytest from ending."""
    children, failed = set(multiprocessing.active_children()), request.session.testsfailed
    yield
    for child in set(multiprocessing.active_children()) - children:
        child.kill()
        child.join()
    if request.session.testsfailed > failed:
        programs.kill_started_by(request.node.nodeid)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """A prepared dataset of 10 classes: 300 training and 70 test images of 32 x 32 pixels."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    prepare(
        folder,
        dataset="shapes",
        workers=1,
        shapes={"side": 32, "train_per_class": TRAIN_PER_CLASS, "test_per_class": TEST_PER_CLASS},
    )
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A preset of a network that trains in seconds."""
    path = tmp_path_factory.mktemp("presets") / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """The folder of run folders."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def training(shapes, tiny, runs) -> list:
    """The common arguments of train.py, without the pages, which take 40 % of so short a run."""
    return ["--preset", tiny, "--data-dir", shapes, "--runs-dir", runs, "--no-report"]


@pytest.fixture(scope="session")
def unbroken(training, runs) -> RunFolder:
    """A finished, uninterrupted run of all epochs in one process, with its page. Copy it instead of changing it."""
    programs.run("train.py", *(word for word in training if word != "--no-report"), "--name", "unbroken")
    return RunFolder(runs / "unbroken")


@pytest.fixture(scope="session")
def done(unbroken) -> RunData:
    """The data of that run, as reports read it."""
    return RunData.read(unbroken.folder)


@pytest.fixture
def tree(tmp_path) -> Path:
    """A tree of two classes, 3 training and 2 test images of 16 x 16 pixels each."""
    from trees import save, tree_files

    for name, pixels in tree_files().items():
        save(tmp_path / "tree" / name, pixels)
    return tmp_path / "tree"


@pytest.fixture
def zipped(tree, tmp_path) -> Path:
    """The same as an archive."""
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as file:
        for path in sorted(tree.rglob("*.png")):
            file.write(path, f"pets/{path.relative_to(tree)}")
    return tmp_path / "pets.zip"


@pytest.fixture
def signals():
    """Restore the signal handlers that StopSignal replaces, and forget what was asked."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    StopSignal.newest = None
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture
def ask(signals, tmp_path, tiny, shapes, monkeypatch, capsys):
    """Write an experiment file and call compare.py on it; returns exit code, output and errors."""
    from comparisons import COMMON, VARIANTS

    import compare
    from config.command_line import run_cli

    (tmp_path / "tiny.toml").write_text(tiny.read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(RUNS_OF_COMPARISON, "")  # compare.py sets it; other tests do not see it

    def ask(text: str = COMMON + VARIANTS, *words: str):
        (tmp_path / "gates.toml").write_text(text)
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "compare.py",
                str(tmp_path / "gates.toml"),
                "--data-dir",
                str(shapes),
                "--runs-dir",
                str(tmp_path / "runs"),
                "--results-dir",
                str(tmp_path / "results"),
                *words,
            ],
        )
        code = run_cli(compare.main)
        said = capsys.readouterr()
        return code, said.out, said.err

    return ask


@pytest.fixture
def without_advice(monkeypatch):
    """Verdicts without the number of seeds that they advise, which takes most of the time of a simulation."""
    from comparison import significance

    monkeypatch.setattr(significance, "seeds_for", lambda *_: None)


@pytest.fixture
def invented(monkeypatch):
    """Runs of compare.py that are written instead of trained; its pictures are made, but not rendered, into files."""
    from comparisons import Invented

    import compare
    from comparison import report

    made = Invented()
    monkeypatch.setattr(compare, "launch", made)
    monkeypatch.setattr(report, "save", lambda figure, path: path.touch())
    return made


@pytest.fixture
def repo(tmp_path):
    """A copy of the scripts in a folder whose name has a space, with fakes in front of PATH and no GPU."""
    folder = tmp_path / "my repo"
    folder.mkdir()
    programs.copy_scripts(folder)
    shutil.copy(PROJECT / "hostfile", folder)
    (folder / "train.py").write_text(STUB)
    (tmp_path / "bin").mkdir()
    fake(folder, "nvidia-smi", "exit 9")
    return folder
