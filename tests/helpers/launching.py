"""The launchers beside a stub of train.py, with fakes of nvidia-smi and the like: what their tests share.

The fixture `repo` is in conftest.py.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys

AWKWARD = [
    "a b",
    "it's",
    'say "x"',
    "a;touch owned",
    "$HOME",
    "$(touch owned)",
    "`touch owned`",
    "a|b>owned&c",
    "*",
    "?[a-z]{1,2}",
    "~",
    "!!",
    "",
    '--set=x={"k": 1}',
]
STUB = """
import json, os, pathlib, signal, sys, time
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
out = pathlib.Path(os.environ["STUB_OUT"])
rank = os.environ["RANK"]
(out / f"started{rank}").write_text(json.dumps([os.getpid(), sys.argv[1:], os.environ["WORLD_SIZE"], os.getcwd()]))
deadline = time.time() + float(os.environ.get("STUB_SECONDS", 0))
while time.time() < deadline and not stop:
    time.sleep(0.05)
time.sleep(0.5 if stop else 0)          # a checkpoint takes its time
time.sleep(0.2)                         # a second signal would come about now
(out / f"saved{rank}").touch()
ranks, latest = int(os.environ["WORLD_SIZE"]), time.time() + 10
while stop and time.time() < latest and not all((out / f"saved{i}").exists() for i in range(ranks)):
    # As train.py does: the launcher tells the others to stop when the first one leaves.
    time.sleep(0.01)
(out / f"ended{rank}").write_text(str(len(stop)))
sys.exit(75 if stop else int(os.environ.get("STUB_CODE", 0)))
"""
IMPORTING = """
import json, os, pathlib, time
pathlib.Path(os.environ["STUB_OUT"], "started" + os.environ["RANK"]).write_text(json.dumps([os.getpid()]))
time.sleep(60)
"""  # a rank that has not set its signal handlers yet


def fake(repo, name, script):
    path = repo.parent / "bin" / name
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


def fake_gpus(repo, count, cuda="13.0"):
    lines = "".join(f"echo 'GPU {i}: H200 (UUID: GPU-{i})'\n" for i in range(count))
    fake(
        repo,
        "nvidia-smi",
        f"if [ \"$1\" = -L ]; then\n{lines}else echo '| Driver Version: 580.1   CUDA Version: {cuda} |'; fi",
    )


def environment(repo, **variables):
    ours = (
        "CUDA_VISIBLE_DEVICES",
        "DS_ACCELERATOR",
        "OMP_NUM_THREADS",
        "NUM_PROCS",
        "MASTER_",
        "HOSTFILE",
        "DRIVER_CUDA",
        "DRY_RUN",
        "INSTALLER",
        "UV_",
        "SSL_CERT_FILE",
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    path = f"{repo.parent / 'bin'}:{os.environ['PATH']}"
    ours_now = {"PYTHON": sys.executable, "STUB_OUT": str(repo.parent), "INSTALLER": "pip"}
    return {**kept, "PATH": path, **ours_now, **variables}


def run(repo, script, *arguments, cwd=None, **variables):
    command = [str(repo / script), *arguments]
    return subprocess.run(
        command, env=environment(repo, **variables), cwd=cwd or repo.parent, capture_output=True, text=True, timeout=120
    )


def dry_run(repo, *arguments, script="launch_local_train.sh", **variables):
    """-> the words of the printed command."""
    result = run(repo, script, *arguments, DRY_RUN="1", **variables)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 1
    # bash itself splits the line, because users paste it there
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {result.stdout}"], capture_output=True, text=True, check=True
    ).stdout
    return words.split("\0")[:-1]


def world(words):
    (encoded,) = [word.split("=", 1)[1] for word in words if word.startswith("--world_info=")]
    return json.loads(base64.urlsafe_b64decode(encoded))["localhost"]
