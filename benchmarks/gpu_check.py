"""Check of a machine: does everything work here, and how fast? Parts in separate processes, a page and a JSON report.

    ./gpu_check.sh [--quick] [--parts a,b] [--archive cifar100.zip] [--out DIR]     all parts: ten minutes on a GPU
    ./gpu_check.sh --minutes 15                                                     what a GPU can show in 15 minutes
    ./gpu_check.sh --minutes 15 --small                                             a rehearsal of that on a CPU

In: nothing, a prepared dataset (--data-dir, or data/cifar100 if it exists), or an archive of one. Out, in --out:
check.md, check.json and a log for each part, written after each part. Each part has a time limit: a part that hangs or
crashes is ended, and the others continue. The exit code is 0 if no part failed.

`benchmarks/lib/gpu_check_parts.py` holds the parts. With --minutes the phases of `benchmarks/lib/gpu_check_phases.py`
run instead, in order of value: facts, correctness, input, steps with a profile, accuracy, and a longer recipe in the
time left. They install nothing and use DALI and DeepSpeed only where these are installed.
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.lib.check import Check, NotReached, Part, Skipped
from benchmarks.lib.gpu_check_parts import FIRST, PARTS
from benchmarks.lib.gpu_check_phases import PHASES
from benchmarks.lib.options import origin, output_folder
from common.errors import unknown
from common.machine import visible_gpus
from common.paths import PROJECT
from common.text import last_error
from config.command_line import Parser, above_zero
from records.provenance import commit_text

MARKS = {"passed": "ok", "failed": "FAILED", "skipped": "skipped"}
LEAST_SECONDS = 15.0  # a part with less time left is skipped
SMALL_MINUTES = 15.0  # of a rehearsal without --minutes


def run_part(name: str, part: Part, check: Check) -> dict[str, Any]:
    """Run the commands of a part and return its entry of the report."""
    began, figures = time.monotonic(), {}
    log = check.out / f"{name}.log"
    try:
        if check.seconds_left() < LEAST_SECONDS:
            raise Skipped("no time left")
        run_commands(part, check, log)
        figures = part.read(check, text_of(log))
        status, words = "passed", ""
    except Skipped as reason:
        status, words = "skipped", str(reason)
    except NotReached as reason:
        status, words, figures = "failed", str(reason), figures_so_far(part, check, log)
    except Exception as error:  # commands that end well and leave another result than expected
        status, words, figures = "failed", f"its result cannot be read: {type(error).__name__}: {error}", {}
    return {
        "name": name,
        "what": part.what,
        "status": status,
        "seconds": round(time.monotonic() - began, 1),
        "words": words,
        "figures": figures,
    }


def run_commands(part: Part, check: Check, log: Path) -> None:
    """Run the commands one after the other, or all at once. Raises NotReached if one fails or the limit passes."""
    log.unlink(missing_ok=True)
    commands, end_at = part.commands(check), time.monotonic() + part.limit(check)
    if not part.at_once:
        for command in commands:
            run_command(command, log, end_at - time.monotonic(), check)
        return
    logs = [log.with_name(f"{log.stem}-{i + 1}.log") for i in range(len(commands))]
    for one in logs:
        one.unlink(missing_ok=True)
    with ThreadPoolExecutor(len(commands)) as pool:
        pending = [
            pool.submit(run_command, command, one, end_at - time.monotonic(), check)
            for command, one in zip(commands, logs, strict=True)
        ]
    log.write_text("".join(map(text_of, logs)))
    problems = [str(error) for one in pending if (error := one.exception())]
    if problems:
        raise NotReached("; ".join(problems))


def text_of(log: Path) -> str:
    return log.read_text(errors="replace") if log.exists() else ""


def figures_so_far(part: Part, check: Check, log: Path) -> dict[str, Any]:
    """Return what a failed part has measured, as far as it can be read."""
    try:
        return part.read(check, text_of(log))
    except Exception:  # a failed part may leave any state behind
        return {}


def run_command(command: Sequence[str], log: Path, limit_seconds: float, check: Check) -> None:
    """Run a command in its own session, so that all its processes can be ended.

    Raises:
        NotReached: it fails or takes too long.
    """
    environment = {**os.environ, "PYTHON": sys.executable, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    if not check.num_gpus:
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
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
        raise NotReached(f"exceeded its time limit and was ended; see {log.name}") from None
    finally:
        end(child)
    if code:
        printed = log.read_text(errors="replace").rpartition("\n$ ")[2].partition("\n")[2]
        raise NotReached(f"{last_error(printed) or 'no output'} (exit code {code}); see {log.name}")


def end(child: subprocess.Popen) -> None:
    """End all remaining processes of a command's session; its own process group first gets five seconds."""
    with suppress(ProcessLookupError, subprocess.TimeoutExpired):
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGTERM)
            child.wait(5)
    for folder in Path("/proc").glob("[0-9]*"):  # jobs of a shell with `set -m` have process groups of their own
        with suppress(ProcessLookupError):
            if os.getsid(int(folder.name)) == child.pid:
                os.kill(int(folder.name), signal.SIGKILL)
    child.wait()


def as_markdown(report: dict[str, Any]) -> str:
    """Return the report as a page."""
    device = report["device"]
    lines = [
        "# GPU check",
        "",
        *(f"- {key}: {value}" for key, value in device.items()),
        f"- commit: {commit_text(report)}",
        "- versions: " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        "",
        "| part | | seconds | result |",
        "|---|---|---:|---|",
    ]
    for part in report["parts"]:
        figures = [f"{key}: {value}" for key, value in part["figures"].items()]
        found = "; ".join([part["words"]] * bool(part["words"]) + figures).replace("|", "/")
        mark = MARKS[part["status"]]
        lines.append(f"| {part['name']}: {part['what']} | {mark} | {part['seconds']:.0f} | {found} |")
    return "\n".join(lines) + "\n"


def write(report: dict[str, Any], out: Path) -> None:
    """Write check.json and check.md; each replaces its previous version at once."""
    for name, text in (("check.json", json.dumps(report, indent=1) + "\n"), ("check.md", as_markdown(report))):
        (out / f"{name}.part").write_text(text)
        (out / f"{name}.part").rename(out / name)


def show(part: dict[str, Any]) -> None:
    print(f"{MARKS[part['status']]:>8}  {part['seconds']:6.1f} s  {part['words']}", flush=True)
    for key, value in part["figures"].items():
        print(f"{'':20}{key}: {value}", flush=True)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        "./gpu_check.sh",
        "Check that everything works on this machine, and measure how fast it is.",
        example="./gpu_check.sh --quick --parts data,train\n./gpu_check.sh --minutes 15",
    )
    parser.add_argument("--parts", metavar="A,B", help="parts to run, see --list (default: all)")
    parser.add_argument("--list", action="store_true", help="list the parts and exit")
    parser.add_argument("--quick", action="store_true", help="shorter parts: under three minutes on a large GPU")
    parser.add_argument(
        "--minutes",
        type=above_zero,
        metavar="N",
        help="run the timed phases in order of value, and end after N minutes (default: no limit, all parts)",
    )
    parser.add_argument(
        "--small",
        action="store_true",
        help=f"rehearse the timed phases on a CPU with tiny networks (default: --minutes {SMALL_MINUTES:g})",
    )
    data = parser.add_mutually_exclusive_group()
    data.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="prepared dataset (default: data/cifar100 if prepared, else drawn)"
    )
    data.add_argument(
        "--archive", type=Path, metavar="FILE", help="archive to prepare the dataset from (default: none)"
    )
    parser.add_argument(
        "--out",
        type=output_folder,
        default=str(PROJECT / "runs" / "gpu-check"),
        metavar="DIR",
        help="output folder (default: runs/gpu-check)",
    )
    options = parser.parse_args(arguments)
    if options.small and options.minutes is None:
        options.minutes = SMALL_MINUTES
    if options.archive and not options.archive.is_file():
        parser.error(f"--archive {options.archive} does not exist; check the path")
    if options.quick and options.minutes is not None:
        parser.error("--quick does not apply to --minutes; choose a smaller number of minutes")
    known = PARTS if options.minutes is None else PHASES
    chosen = list(known) if options.parts is None else [name.strip() for name in options.parts.split(",")]
    for name in filter(None, chosen):
        if name not in known:
            parser.error(f"--parts: {unknown('part', name, list(known))}")
    options.parts = {name: part for name, part in known.items() if name in chosen or name in FIRST}
    return options


def make_check(options: argparse.Namespace, began: float) -> Check:
    """Return what the parts need to know about this machine and the command line."""
    gpus = len(visible_gpus())
    small = options.minutes is not None and (options.small or not gpus)
    if small and not options.small:
        print("warning: no GPU found; rehearsing the phases with tiny networks (--small)", flush=True)
    return Check(
        out=options.out.resolve(),
        num_gpus=0 if small else gpus,
        quick=options.quick,
        data_dir=options.data_dir,
        archive=options.archive and options.archive.resolve(),  # the parts run in the project's folder
        small=small,
        end_at=None if options.minutes is None else began + 60 * options.minutes,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    options = parse_arguments(arguments)
    if options.list:
        for name, part in options.parts.items():
            print(f"{name:14} {part.what}{'' if name not in FIRST else ' (always)'}")
        return 0
    check = make_check(options, began)
    check.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        **origin(),
        "quick": options.quick,
        "minutes": options.minutes,
        "small": check.small,
        "device": {"CPU": platform.processor() or platform.machine()},
        "parts": [],
    }
    write(report, check.out)
    check = replace(check, began=(check.out / "check.json").stat().st_mtime)
    for name, part in options.parts.items():
        on_cpu = "" if check.num_gpus or name in FIRST or check.small else " (no GPU: the CPU form)"
        print(f"{name}: {part.what}{on_cpu}", flush=True)
        entry = run_part(name, part, check)
        if name == "device" and entry["figures"]:
            report["device"] = entry["figures"]
        show(entry)
        report["parts"].append(entry)
        write(report, check.out)
        if name in FIRST and entry["status"] == "failed":
            print(f"error: {name} failed, and the other parts need it", flush=True)
            break
    counts = {status: sum(part["status"] == status for part in report["parts"]) for status in MARKS}
    found = f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped"
    print(f"{found}; {check.out / 'check.md'}")
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that a running part is ended
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; the results so far are written")
