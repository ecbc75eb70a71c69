"""training/console.py: what a run prints. Run: python -m pytest tests/training/test_console.py"""

from __future__ import annotations

import io
import logging
import re
import subprocess
import sys
from types import SimpleNamespace

import programs
import pytest
import torch

from common.errors import SettingsError
from parallel.process_group import pick_device
from records.run_folder import RunFolder
from training import console, run_setup
from training.arguments import parse_arguments
from training.console import NORMAL, QUIET, VERBOSE, Console
from training.run_setup import CPU_MINUTES, default_preset, limit_default_run

LINE = {
    "epoch": 3,
    "step": 30,
    "learning_rate": 1e-3,
    "train_loss": 3.3484,
    "images_per_second": 562.6,
    "training_seconds": 88.732,
    "data_wait_seconds": 0.4436,
    "memory_gib": 1.456,
    "tracking_seconds": 0.02,
    "test_loss": 3.0,
    "test_accuracy": 0.256,
    "test_top5_accuracy": 0.5554,
    "test_correct": 2560,
    "test_seen": 10000,
    "test_seconds": 5.3,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def now(monkeypatch):
    """A clock that tests advance."""
    time = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: time[0])
    return time


@pytest.fixture
def out(monkeypatch) -> io.StringIO:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    return io.StringIO()


def test_the_line_of_an_epoch_has_its_numbers(out, now):
    shown = Console(out=out)
    shown.clock.start(0, 100)
    shown.clock.step, now[0] = 30, 1180.0
    shown.epoch(LINE, ["test"], 10)
    assert out.getvalue() == (
        "epoch  3/10  train loss 3.348  test accuracy  25.60%  (2560/10000)      563 images/s    89 s  "
        "data wait  0.5%  ETA   7 min\n"
    )


def test_an_epoch_of_skipped_steps_has_no_loss(out, now):
    shown = Console(out=out)
    shown.epoch({key: value for key, value in LINE.items() if key != "train_loss"}, ["test"], 10)
    assert "epoch  3/10  all steps skipped  test accuracy" in out.getvalue()


def test_columns_of_epoch_lines_are_aligned(out, now):
    """Every field starts in the same column, whatever the values."""
    shown = Console(out=out)
    shown.clock.start(0, 100)
    changed = {
        "epoch": 10,
        "train_loss": 0.123,
        "test_accuracy": 1.0,
        "test_correct": 10000,
        "images_per_second": 51_000.0,
        "training_seconds": 3.0,
        "data_wait_seconds": 0.9,
    }
    for line, step in (
        (LINE, 30),
        ({**LINE, **changed}, 90),
        ({**LINE, "test_correct": 7, "test_accuracy": 0.0007}, 30),
    ):
        shown.clock.step, now[0] = step, now[0] + 100
        shown.epoch(line, ["test"], 10)
    lines = out.getvalue().splitlines()
    assert len({len(line) for line in lines}) == 1
    assert (
        len(
            {
                tuple(line.index(word) for word in ("train loss", "test accuracy", "images/s", "data wait", "ETA"))
                for line in lines
            }
        )
        == 1
    )


def test_accuracies_of_ema_and_raw_weights_are_printed_together(out):
    Console(out=out).epoch({**LINE, "test_raw_accuracy": 0.2444}, ["test"], 10)
    assert "test accuracy EMA  25.60%  (2560/10000), raw  24.44%" in out.getvalue()


@pytest.mark.parametrize(
    ("level", "is_main", "lines"), [(QUIET, True, 1), (NORMAL, True, 3), (VERBOSE, True, 4), (VERBOSE, False, 0)]
)
def test_number_of_lines_by_level(out, level, is_main, lines):
    shown = Console(level, is_main, out)
    shown.print_field("run", "runs/mine")
    shown.epoch(LINE, ["test"], 10)
    shown.result(LINE, 10, "runs/mine/report.html")
    assert len(out.getvalue().splitlines()) == lines
    if is_main:
        assert out.getvalue().endswith(
            "done      test accuracy 25.60% (2560/10000) after 3 epochs; see runs/mine/report.html\n"
        )
    assert ("top-5 55.54%" in out.getvalue()) == (level == VERBOSE and is_main)


@pytest.mark.parametrize(
    ("stream", "environment", "has_colors"),
    [
        (Terminal, {}, True),
        (Terminal, {"NO_COLOR": "1"}, False),
        (Terminal, {"NO_COLOR": ""}, True),
        (Terminal, {"TERM": "dumb"}, False),
        (io.StringIO, {}, False),
    ],
)
def test_colors_are_printed_on_terminals_only(out, monkeypatch, stream, environment, has_colors):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    to = stream()
    shown = Console(out=to)
    shown.print_field("run", "runs/mine")
    shown.epoch(LINE, ["test"], 10)
    assert ("\033[" in to.getvalue()) == has_colors
    assert "test accuracy  25.60%" in re.sub(r"\033\[\d+m", "", to.getvalue())


def test_a_data_wait_of_ten_percent_is_yellow(out):
    terminal = Terminal()
    for wait in (1.0, 20.0):
        Console(out=terminal).epoch({**LINE, "data_wait_seconds": wait}, ["test"], 10)
    assert [f"\033[{console.YELLOW}m" in line for line in terminal.getvalue().splitlines()] == [False, True]


def test_the_eta_comes_from_the_steps_of_this_process(now):
    clock = console.Clock()
    clock.start(50, 100)
    assert clock.seconds_left() == 0
    clock.step, now[0] = 60, 1020.0
    assert clock.seconds_left() == pytest.approx(80)
    clock.step = 100
    assert clock.seconds_left() == 0


def test_the_eta_counts_with_the_costs_of_steps(now):
    """Progressive resizing: the last half of the steps has larger images."""
    clock = console.Clock()
    clock.start(10, 100, lambda step, total: step + 3 * max(0, step - total // 2))
    clock.step, now[0] = 30, 1020.0
    assert clock.seconds_left() == pytest.approx(20 + 4 * 50)


def test_a_log_file_gets_a_line_every_two_minutes_of_a_long_epoch(out, now):
    shown = Console(out=out, bars=io.StringIO())
    shown.clock.start(0, 100)
    with shown.bar(epoch=1, done=0, total=50, batch=64) as bar:
        for _ in range(9):
            now[0] += 50
            bar.advance()
            bar.loss(2.5)
    assert out.getvalue().splitlines() == [
        "  in epoch 1: step 3 of 50, train loss 2.500, ETA 81 min",
        "  in epoch 1: step 6 of 50, train loss 2.500, ETA 78 min",
        "  in epoch 1: step 9 of 50, train loss 2.500, ETA 76 min",
    ]
    assert shown.bars.getvalue() == ""


def test_a_line_clears_the_bar_first_and_shows_it_again(out):
    done = []
    shown = Console(out=out, bars=Terminal())
    shown.active_bar = SimpleNamespace(
        clear=lambda: done.append(("clear", out.getvalue())), refresh=lambda: done.append(("refresh", out.getvalue()))
    )
    shown.say("a line")
    assert done == [("clear", ""), ("refresh", "a line\n")]


def test_a_terminal_gets_a_bar_with_the_eta(out, now, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    shown = Console(out=out, bars=Terminal())
    shown.clock.start(0, 100)
    with shown.bar(epoch=2, done=10, total=50, batch=64) as bar:
        now[0] += 10
        bar.advance()
        bar.loss(2.5)
        bar.bar.refresh()
    assert "epoch 2:  22%" in shown.bars.getvalue() and "loss 2.500, run ETA 16 min" in shown.bars.getvalue()
    assert out.getvalue() == ""
    quiet = Console(QUIET, out=out, bars=Terminal())
    with quiet.bar(1, 0, 50, 64) as bar:
        bar.advance()
    assert quiet.bars.getvalue() == ""


def test_quiet_prints_the_result_and_nothing_else(training, runs):
    """In a separate process, so that output of libraries at import is seen too."""
    command = [
        sys.executable,
        "train.py",
        *(str(word) for word in training if word != "--no-report"),
        "--name",
        "quiet",
        "--max-steps",
        "3",
        "--quiet",
        "--no-tensorboard",
    ]
    environment = {key: value for key, value in programs.clean_environment().items() if key != "DS_ACCELERATOR"}
    done = subprocess.run(
        command, cwd=programs.PROJECT, env=environment, text=True, capture_output=True, timeout=programs.LIMIT_SECONDS
    )
    assert re.fullmatch(
        r"done      test accuracy [\d.]+% \(\d+/70\) after 0.75 epochs; see \S+/quiet/report\.html\n", done.stdout
    ), done
    assert done.stderr == "" and not (runs / "quiet" / "tensorboard").exists()
    assert (runs / "quiet" / "report.html").is_file() and len(RunFolder(runs / "quiet").metrics()) == 1


def test_verbose_prints_changed_settings(training):
    out = programs.run("train.py", *training, "--name", "verbose", "--max-steps", 2, "--verbose").out
    assert "setting   model.width = 32 (default: 512)" in out and "      learning rate " in out
    refused = programs.run("train.py", *training, "--quiet", "--verbose", code=2)
    assert "not allowed with" in refused.err


def test_an_epoch_of_zero_seconds_is_printed():
    out = io.StringIO()
    Console(out=out).epoch(
        {**LINE, "training_seconds": 0.0, "data_wait_seconds": 0.0, "images_per_second": 0.0}, ["test"], 10
    )
    assert "data wait  0.0%" in out.getvalue()


@pytest.mark.parametrize(("level", "shown"), [(QUIET, ""), (NORMAL, "compile   off, because it does not work\n")])
def test_quiet_silences_log_messages_of_engines(level, shown):
    out = io.StringIO()
    Console(level, out=out)
    logging.getLogger("engine").warning("compile   off, because %s", "it does not work")
    assert out.getvalue() == shown
    Console(level, is_main=False, out=out)
    logging.getLogger("engine").info("peers     of a process that is not the main one")
    assert out.getvalue() == shown


def test_the_default_preset_follows_the_selected_device(monkeypatch):
    """DS_ACCELERATOR=cpu on a machine with a GPU."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    out = io.StringIO()
    assert (
        default_preset(pick_device(), Console(out=out)).startswith("cpu")
        and "because there is no GPU" in out.getvalue()
    )
    assert default_preset(torch.device("cuda"), Console(out=out)) == "spt-lsa"


def test_gpus_that_pytorch_cannot_use_are_an_error(monkeypatch, signals):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(run_setup, "visible_gpus", lambda: ["0", "1"])
    with pytest.raises(SettingsError, match=r"nvidia-smi shows 2 GPU\(s\), but PyTorch \d\S+ cannot use them; "):
        run_setup.start_process(NORMAL, False, False, None)


def test_the_default_run_of_a_cpu_ends_after_twenty_minutes(monkeypatch):
    def limit(*words: str, device: str = "cpu") -> tuple[float | None, bool, str]:
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        args, out = parse_arguments(), io.StringIO()
        limit_default_run(args, torch.device(device), Console(out=out))
        return args.max_minutes, args.only_shortens, out.getvalue()

    minutes, only_shortens, said = limit("--seed", "1")
    assert minutes == CPU_MINUTES and only_shortens and said.startswith("budget") and said.count("\n") == 1
    assert limit("--max-minutes", "3") == (3.0, False, "")
    assert limit("--max-minutes", "3", "--epochs", "2") == (3.0, True, "")
    assert limit("--max-minutes", "3", "--set", "epochs=2") == (3.0, True, "")
    chosen = (["--preset", "cpu"], ["--epochs", "2"], ["--set", "epochs=2"], ["--max-steps", "9"], ["--profile", "3"])
    for words in chosen:
        assert limit(*words) == (None, False, "")
    assert limit(device="cuda") == (None, False, "")


def test_a_console_whose_reader_is_gone_says_nothing_and_raises_nothing(monkeypatch):
    class ClosedPipe(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", ClosedPipe())
    shown = Console(VERBOSE)
    shown.epoch(LINE, ["test"], 10)
    shown.result(LINE, 10, "runs/mine/report.html")
    monkeypatch.setattr(sys, "stdout", None)  # as after `train.py >&-`
    Console().epoch(LINE, ["test"], 10)
