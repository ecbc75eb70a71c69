"""Does everything work on this machine, and how fast? Parts in processes of their own, a page and a JSON of what came out.

    ./gpu_check.sh [--quick] [--parts a,b] [--archive cifar100.zip] [--out DIR]         (finds or makes the environment first)

In: nothing, or a prepared dataset (--data-dir, or data/cifar100 where it is), or an archive of one. Out, in --out: check.md,
check.json and a log for each part. Each part has a time limit; one that hangs or crashes is ended, and the others go on.
The exit code is 0 when no part failed. What the parts do is in `benchmarks/lib/gpu_check_parts.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.lib.gpu_check_parts import FIRST, PARTS, Check, NotReached, Part, Skipped
from benchmarks.lib.options import origin
from common.errors import unknown
from common.machine import visible_gpus
from common.paths import PROJECT
from common.text import last_error
from config.command_line import Parser

MARKS = {"passed": "ok", "failed": "FAILED", "skipped": "skipped"}


def run_part(name: str, part: Part, check: Check) -> dict[str, Any]:
    """Its commands one after the other, and what they found."""
    began, log = time.monotonic(), check.out / f"{name}.log"
    log.unlink(missing_ok=True)
    try:
        for command in part.commands(check):
            run_command(command, log, part.limit(check) - (time.monotonic() - began))
        status, words, figures = "passed", "", part.read(check, log.read_text(errors="replace") if log.exists() else "")
    except Skipped as reason:
        status, words, figures = "skipped", str(reason), {}
    except NotReached as reason:
        status, words, figures = "failed", str(reason), {}
    return {
        "name": name,
        "what": part.what,
        "status": status,
        "seconds": round(time.monotonic() - began, 1),
        "words": words,
        "figures": figures,
    }


def run_command(command: Sequence[str], log: Path, limit_seconds: float) -> None:
    """In a session of its own, so that all its processes can be ended. Raises NotReached when it fails or takes too long."""
    environment = {**os.environ, "PYTHON": sys.executable, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    if not visible_gpus():
        environment["DS_ACCELERATOR"] = "cpu"
    with log.open("a") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        child = subprocess.Popen(
            command,
            cwd=PROJECT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        code = child.wait(max(1.0, limit_seconds))
    except subprocess.TimeoutExpired:
        raise NotReached(f"took too long and was ended; see {log.name}") from None
    finally:
        end(child)
    if code:
        said = log.read_text(errors="replace").rpartition("\n$ ")[2].partition("\n")[2]
        raise NotReached(f"{last_error(said) or 'said nothing'} (exit code {code}); see {log.name}")


def end(child: subprocess.Popen) -> None:
    """Whatever of its session is left."""
    try:
        os.killpg(child.pid, signal.SIGTERM if child.poll() is None else signal.SIGKILL)
    except ProcessLookupError:
        return
    try:
        child.wait(5)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def as_markdown(report: dict[str, Any]) -> str:
    device = report["device"]
    lines = [
        "# GPU check",
        "",
        *(f"- {key}: {value}" for key, value in device.items()),
        f"- commit: {report['commit']}{' with uncommitted changes' * report['uncommitted_changes']}",
        "- versions: " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        "",
        "| part | | seconds | what came out |",
        "|---|---|---:|---|",
    ]
    for part in report["parts"]:
        found = part["words"] or "; ".join(f"{key}: {value}" for key, value in part["figures"].items())
        lines.append(
            f"| {part['name']}: {part['what']} | {MARKS[part['status']]} | {part['seconds']:.0f} | {found.replace('|', '/')} |"
        )
    return "\n".join(lines) + "\n"


def write(report: dict[str, Any], out: Path) -> None:
    (out / "check.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "check.md").write_text(as_markdown(report))


def show(part: dict[str, Any]) -> None:
    print(f"{MARKS[part['status']]:>8}  {part['seconds']:6.1f} s  {part['words']}", flush=True)
    for key, value in part["figures"].items():
        print(f"{'':20}{key}: {value}", flush=True)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("./gpu_check.sh", __doc__.partition("\n")[0], example="./gpu_check.sh --quick --parts data,train")
    parser.add_argument(
        "--parts", default=",".join(PARTS), metavar="PARTS", help=f"some of {','.join(PARTS)} (default: all)"
    )
    parser.add_argument("--list", action="store_true", help="say what the parts are, and do nothing")
    parser.add_argument("--quick", action="store_true", help="less of each part: under three minutes on a large GPU")
    parser.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="a prepared dataset (default: data/cifar100 where it is, else drawn shapes)",
    )
    parser.add_argument(
        "--archive", type=Path, metavar="FILE", help="prepare the dataset from this archive (default: none)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=PROJECT / "runs" / "gpu-check",
        metavar="DIR",
        help="where to write (default: runs/gpu-check)",
    )
    options = parser.parse_args(arguments)
    chosen = [name.strip() for name in options.parts.split(",") if name.strip()]
    for name in chosen:
        if name not in PARTS:
            parser.error(f"--parts: {unknown('part', name, list(PARTS))}")
    options.parts = [name for name in PARTS if name in chosen or name in FIRST]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if options.list:
        for name, part in PARTS.items():
            print(f"{name:12} {part.what}{'' if name not in FIRST else ' (always)'}")
        return 0
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    check = Check(out, len(visible_gpus()), options.quick, options.data_dir, options.archive)
    report: dict[str, Any] = {
        **origin(),
        "quick": options.quick,
        "device": {"CPU": platform.processor() or platform.machine()},
        "parts": [],
    }
    for name in options.parts:
        print(
            f"{name}: {PARTS[name].what}{'' if check.num_gpus or name in FIRST else ' (no GPU: as far as a CPU can tell)'}",
            flush=True,
        )
        part = run_part(name, PARTS[name], check)
        if name == "device" and part["figures"]:
            report["device"] = part["figures"]
        show(part)
        report["parts"].append(part)
        write(report, out)
        if name in FIRST and part["status"] == "failed":
            print(f"without {name} the other parts can say nothing", flush=True)
            break
    counts = {status: sum(part["status"] == status for part in report["parts"]) for status in MARKS}
    print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped; {out / 'check.md'}")
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that a part at work is ended
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; what was found until now is written")
