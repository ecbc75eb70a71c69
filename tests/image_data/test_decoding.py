"""image_data/preparation/decoding.py: the processes that decode images."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest

from common.errors import StoppedError
from common.paths import PROJECT
from common.stop_signal import StopSignal
from image_data.preparation.decoding import CHUNK, decoder, useful_workers
from image_data.preparation.image_tree import PrepareError
from image_data.preparation.prepare import prepare


def test_a_full_shared_memory_costs_workers_only(tree, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("image_data.preparation.decoding.ProcessPoolExecutor", full)
    monkeypatch.setattr("image_data.preparation.decoding.CHUNK", 1)
    assert len(prepare(root=tree, workers=2).splits["train"]) == 6
    assert "warning: decoding in one process, because /dev/shm is not usable" in capsys.readouterr().err


def test_only_as_many_processes_are_started_as_there_are_chunks_of_a_split():
    assert useful_workers(8, [CHUNK, 1]) == 1  # decoded in this process: the splits come one after the other
    assert [useful_workers(8, [1, n * CHUNK + 1]) for n in (1, 2, 100)] == [2, 3, 8]


def test_decoding_processes_are_new_and_ctrl_c_does_not_reach_them():
    """A fork of a program with threads may crash."""
    forked = "'pytest' in __import__('sys').modules"
    blocked = "2 in __import__('signal').pthread_sigmask(0, [])"
    with decoder(2) as decode:
        assert list(decode(eval, [forked, blocked] * 2)) == [False, True] * 2
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_script_without_a_guard_decodes_in_processes(tmp_path):
    """The new processes do not run the script that prepares."""
    script = tmp_path / "mine.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(PROJECT)!r})\nprint('begins', flush=True)\n"
        "from image_data.preparation.decoding import decoder\n"
        "with decoder(2) as decode:\n    print(list(decode(abs, [-1, 2])))\n"
    )
    for source in ({"args": [sys.executable, script]}, {"args": [sys.executable, "-"], "input": script.read_text()}):
        run = subprocess.run(**source, capture_output=True, text=True, timeout=60)
        assert run.stdout == "begins\n[1, 2]\n" and not run.stderr, run.stderr


def test_a_stop_of_the_process_group_is_no_lack_of_memory(monkeypatch):
    """Slurm and `timeout` signal the decoding processes too, which end at once."""
    monkeypatch.setattr(StopSignal, "newest", stop := StopSignal.__new__(StopSignal))
    stop.number = signal.SIGTERM
    dies = "__import__('os').kill(__import__('os').getpid(), 15)"
    with pytest.raises(StoppedError, match="decoding images"), decoder(2) as decode:
        list(decode(eval, [dies]))
    monkeypatch.setattr(StopSignal, "newest", None)
    with pytest.raises(PrepareError, match="out of memory"), decoder(2) as decode:
        list(decode(eval, [dies]))


def test_workers_do_not_outlive_a_killed_parent(tmp_path):
    script = (
        "import os, signal\nfrom image_data.preparation.decoding import decoder\n"
        "with decoder(2) as decode:\n"
        "    print(list(decode(abs, [1, 2, 3])), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", script], cwd=PROJECT, stdout=subprocess.PIPE, start_new_session=True)
    try:
        # Returns only when every process that holds the pipe is gone.
        assert run.communicate(timeout=20)[0] == b"[1, 2, 3]\n"
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        raise
