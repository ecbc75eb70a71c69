"""Measure how fast a failure ends a job on all hosts, and how fast a restart trains again, on two simulated hosts.

    python cluster/failure_trial.py                        prints a table, after some minutes
    python cluster/failure_trial.py --only "cable cut"     measures one row; repeat the option for more
    python cluster/failure_trial.py --launcher torchrun    measures the same events under torchrun, as a baseline
    python cluster/failure_trial.py --launcher ft_launcher    under ft_launcher (pip install nvidia-resiliency-ext)

It needs root, openssh-server and iproute2.
The hosts are network namespaces (simulated_hosts.py) that train a tiny network. After the first checkpoint, a process
is killed or a cable cut, and the time is measured until the last process of training has ended on both hosts.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cluster import simulated_hosts  # noqa: E402
from cluster.simulated_hosts import Hosts, read, wait_until  # noqa: E402
from common.errors import RunError  # noqa: E402
from common.paths import PROJECT  # noqa: E402
from config.command_line import Parser, run_cli  # noqa: E402
from records.checkpoint_store import step_of  # noqa: E402

START_SECONDS, END_SECONDS = 180, 180  # upper limits, for a busy machine
OTHER_LAUNCHERS = {  # module and options
    "torchrun": ("torch.distributed.run", []),
    "ft_launcher": ("nvidia_resiliency_ext.fault_tolerance.launcher", ["--ignore-missing-fault-tol-cfg"]),
}
TINY = ("patch=8", "width=32", "depth=2", "heads=2", "head_size=16", "feed_forward_options.hidden=48")
OURS = (
    "train.py",
    "deepspeed.launcher",
    "agent.py",
    "torch.distributed.run",
    "fault_tolerance.launcher",
)  # part of the commands of a job's processes on a host


@dataclass
class Trial:
    """Training that runs on both hosts."""

    hosts: Hosts
    launchers: list[subprocess.Popen]  # one on the first host; of other launchers one on each
    run: Path

    def newest(self) -> int:
        return max(map(step_of, self.run.glob("state/step-*")), default=0)

    def send(self, number: signal.Signals, script: str) -> None:
        """Send a signal to the process on the second host that runs this script of the project."""
        commands = {pid: read(f"/proc/{pid}/cmdline").split("\0") for pid in self.hosts.processes("box2")}
        (pid,) = [pid for pid, words in commands.items() if str(PROJECT / script) in words and "-m" not in words]
        os.kill(pid, number)

    def kill_rank(self) -> None:
        self.send(signal.SIGKILL, "train.py")

    def suspend_rank(self) -> None:
        self.send(signal.SIGSTOP, "train.py")

    def kill_agent(self) -> None:
        self.send(signal.SIGKILL, "cluster/agent.py")

    def cut_cable(self) -> None:
        self.hosts.cut("box2")

    def cut_all_cables(self) -> None:
        for name in self.hosts.names:
            self.hosts.cut(name)

    def lose_first_host(self) -> None:
        """Cut its cable and kill everything on it, the launcher included, as a power failure would."""
        self.hosts.cut("box1")
        kill_everything(self.hosts, "box1")

    def kill_launcher(self) -> None:
        self.launchers[0].kill()

    def stop_launcher(self) -> None:
        for launcher in self.launchers:
            launcher.terminate()


@dataclass(frozen=True)
class Event:
    """What happens, and when the measurement ends: at the end of the job, or, with restarts, when training resumes."""

    cause: Callable[[Trial], None]
    restarts: int = 0
    only_this: bool = False  # other launchers have no such process


EVENTS = {
    "rank killed (`SIGKILL`)": Event(Trial.kill_rank),
    "rank suspended (`SIGSTOP`)": Event(Trial.suspend_rank),
    "cable cut": Event(Trial.cut_cable),
    "all cables cut (the switch)": Event(Trial.cut_all_cables),
    "first host lost, with the launcher on it": Event(Trial.lose_first_host),
    "agent killed": Event(Trial.kill_agent, only_this=True),
    "launcher killed": Event(Trial.kill_launcher),
    "SIGTERM to the launcher": Event(Trial.stop_launcher),
    "rank killed, `--restarts 1`: both hosts train again": Event(Trial.kill_rank, restarts=1, only_this=True),
    "cable cut, `--restarts 1`: the first host trains on alone": Event(Trial.cut_cable, restarts=1, only_this=True),
}


def main() -> int:
    parser = Parser(
        "python cluster/failure_trial.py",
        "Measure how fast a failure ends a job, and a restart trains again, on two simulated hosts.",
        example='python cluster/failure_trial.py --only "cable cut"',
        notes="events:\n" + "\n".join(f"  {name}" for name in EVENTS),
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="WORDS",
        help="events whose names contain these words; repeat for more (default: all)",
    )
    parser.add_argument(
        "--launcher",
        choices=("this", *OTHER_LAUNCHERS),
        default="this",
        help="launcher to measure: launch_distributed_train.sh, or another one on each host (default: this)",
    )
    args = parser.parse_args()
    if reason := simulated_hosts.missing():
        print(f"error: hosts cannot be simulated on this machine: {reason}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the hosts are removed first
    if args.launcher == "ft_launcher" and not find_spec("nvidia_resiliency_ext"):
        raise RunError("ft_launcher is not installed: pip install nvidia-resiliency-ext")
    other = None if args.launcher == "this" else args.launcher
    chosen = {
        name: event
        for name, event in EVENTS.items()
        if (not args.only or any(words in name for words in args.only)) and not (other and event.only_this)
    }
    with tempfile.TemporaryDirectory() as folder, Hosts(Path(folder, "hosts"), 2) as hosts:
        Path(folder, "hostfile").write_text("box1 slots=1\nbox2 slots=1\n")
        subprocess.run(
            [sys.executable, PROJECT / "prepare_dataset.py", "--dataset", "shapes", "--data-dir", f"{folder}/shapes"],
            check=True,
            capture_output=True,
        )
        print(
            f"two hosts on a machine with {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start\n",
            flush=True,
        )
        print(
            "| event | seconds to the last process, or to the next checkpoint | launcher ends after | exit code |\n"
            "|---|---|---|---|",
            flush=True,
        )
        for number, (name, event) in enumerate(chosen.items()):
            cells = measure(hosts, Path(folder), f"run{number}", event, other)
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return 0


def start(hosts: Hosts, folder: Path, name: str, restarts: int, other: str | None) -> list[subprocess.Popen]:
    """Start training on both hosts; the output goes to folder/NAME.log."""
    arguments = [
        "--preset",
        "cpu",
        *(word for text in TINY for word in ("--set", f"model.{text}")),
        "--set",
        "compile=off",  # it would take most of the time before the first checkpoint
        "--data-dir",
        folder / "shapes",
        "--runs-dir",
        folder / "runs",
        "--epochs",
        "10000",
        "--name",
        name,
    ]
    commands = {"box1": [PROJECT / "launch_distributed_train.sh", *arguments, "--restarts", str(restarts)]}
    variables = {"HOSTFILE": f"{folder}/hostfile", "PYTHON": sys.executable}
    if other:
        module, flags = OTHER_LAUNCHERS[other]
        options = [*flags, "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-id={name}"]
        options.append(f"--rdzv-endpoint={simulated_hosts.ADDRESSES}.1:29500")
        # HANG_SECONDS is what launch_distributed_train.sh sets; others leave PyTorch's 10 minutes.
        variables = {"GLOO_SOCKET_IFNAME": "eth0", "HANG_SECONDS": "50"}
        commands = {
            host: [sys.executable, "-m", module, *options, PROJECT / "train.py", *arguments] for host in hosts.names
        }
        for number, words in enumerate(commands.values(), start=1):
            # It finds out by the machine's name which host keeps the store; here all hosts have the same name.
            is_host = "true" if number == 1 else "false"
            words[3:3] = [f"--local-addr={simulated_hosts.ADDRESSES}.{number}", f"--rdzv-conf=is_host={is_host}"]
    with (folder / f"{name}.log").open("w") as output:
        return [
            subprocess.Popen(
                hosts.command(host, words),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=hosts.environment(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", **variables),
            )
            for host, words in commands.items()
        ]


def measure(hosts: Hosts, folder: Path, name: str, event: Event, other: str | None) -> tuple[str, str, str]:
    """Start training, cause the event, and measure: (seconds, seconds of the launcher, exit code)."""
    log = folder / f"{name}.log"
    hosts.wait_for_network()
    launchers = start(hosts, folder, name, event.restarts, other)
    launcher = launchers[0]
    trial = Trial(hosts, launchers, folder / "runs" / name)
    try:
        wait_until(lambda: launcher.poll() is not None or trial.newest(), START_SECONDS, lambda: read(str(log)))
        assert launcher.poll() is None, read(str(log))
        before, began = trial.newest(), time.monotonic()
        event.cause(trial)
        if event.restarts:
            wait_until(
                lambda: "resuming  after step" in read(str(log)) and trial.newest() > max(before, resumed_at(log)),
                END_SECONDS,
                lambda: read(str(log)),
            )
            return f"{time.monotonic() - began:.0f}", "", ""
        ends: dict[str, float] = {}
        code: int | None = None

        def has_ended() -> bool:
            for what, over in (("ranks", not running(hosts)), ("launcher", launcher.poll() is not None)):
                if over:
                    ends.setdefault(what, time.monotonic() - began)
            return len(ends) == 2

        try:
            wait_until(has_ended, END_SECONDS)
            code = launcher.returncode
        except AssertionError:
            if not other:
                raise AssertionError(f"{running(hosts)}\n{read(str(log))}") from None
            for host in hosts.names:  # they need not end by themselves
                kill_everything(hosts, host)
        seconds = {what: f"{ends[what]:.0f}" if what in ends else f"> {END_SECONDS}" for what in ("ranks", "launcher")}
        if code is not None and code < 0:  # killed by the event
            return seconds["ranks"], "", ""
        return seconds["ranks"], seconds["launcher"], "" if code is None else str(code)
    finally:
        for host in hosts.names:
            hosts.reconnect(host)
        for launcher in launchers:
            launcher.terminate()
            launcher.wait(END_SECONDS)
        wait_until(lambda: not hosts.at_work(), END_SECONDS, lambda: f"left behind: {hosts.at_work()}")


def kill_everything(hosts: Hosts, name: str) -> None:
    """Kill every process on a host except its SSH servers."""
    for pid in hosts.processes(name):
        if "sshd" not in read(f"/proc/{pid}/cmdline"):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def resumed_at(log: Path) -> int:
    """The step from which the run resumed."""
    return int(re.findall(r"resuming  after step ([\d,]+)", read(str(log)))[-1].replace(",", ""))


def running(hosts: Hosts) -> list[str]:
    """The processes of training on both hosts."""
    return [
        words
        for words in hosts.at_work()
        if any(ours in words for ours in OURS) and "run_hosts.py" not in words and "ssh" not in words
    ]


if __name__ == "__main__":
    sys.exit(run_cli(main))
