"""Train on every machine of the hostfile; ./launch_distributed_train.sh runs this. Other arguments go to train.py.

    ./launch_distributed_train.sh --preset spt-lsa --name big --restarts 3

Exit codes: 0 trained to the end; 75 stopped and saved (the same command resumes); 2 wrong hostfile or variable; 3 the
preflight found a problem; 69 a host was lost; otherwise that of the rank that failed first (128 + the signal number).
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cluster import preflight, remote  # noqa: E402
from cluster.failure_cause import EXIT_STOPPED  # noqa: E402
from cluster.job import Job, Limits, Outcome, Plan  # noqa: E402
from cluster.preflight import EXIT_PREFLIGHT, EXIT_USAGE, Rendezvous, Report, hosts_of, master_port  # noqa: E402
from cluster.remote import Host, say  # noqa: E402
from cluster.screen import run_unblocked  # noqa: E402
from common.paths import DATA, PROJECT, RUNS, near_path
from config.command_line import Parser, above_zero, at_least_zero  # noqa: E402

SENT = (
    "NCCL_",
    "GLOO_",
    "TP_SOCKET",
    "TORCH",
    "PYTORCH_",
    "DS_",
    "DEEPSPEED_",
    "OMP_",
    "MKL_",
    "CUDA_LAUNCH",
    "CUDA_DEVICE",
    "HF_",
    "UCX_",
    "FI_",
    "OFI_",
    "MLFLOW",
    "WANDB_",
    "TOKENIZERS_",
    "DALI_",
    "LD_LIBRARY_PATH",
    "PYTHONPATH",
    "PYTHONHASHSEED",
    "PYTHONWARNINGS",
    "PYTHONFAULT",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
)
INEXACT = "--allow-inexact-resume"  # of train.py
# A rank that is stopped before it handles signals, and one that has not saved in time.
ENDED_BY_STOP = (128 + signal.SIGTERM, 128 + signal.SIGKILL)


class Stop:
    """Record signals: the first asks ranks to save; a second one more than 2 s later ends them without saving."""

    def __init__(self) -> None:
        self.requested, self.now, self.number, self.since = False, False, 0, 0.0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._handle)
        # A suspended launcher sends no heartbeats, so the hosts would end their ranks after 20 s.
        signal.signal(
            signal.SIGTSTP, lambda *_: say("Ctrl-Z is ignored: it would end training. Ctrl-C saves and stops.")
        )
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # `stty tostop` suspends a background program that prints

    def _handle(self, number: int, frame: Any) -> None:
        if self.requested and time.monotonic() - self.since > 2:  # the first 2 s may hold the echo of the same key
            self.now = True
        if not self.requested:
            self.requested, self.number, self.since = True, number, time.monotonic()


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(
        "./launch_distributed_train.sh",
        "Train on every machine of the hostfile over SSH. All other arguments go to train.py.",
        example="./launch_distributed_train.sh --preset spt-lsa --restarts 3",
        notes="exit codes: docs/cluster.md; arguments of train.py: python train.py --help",
    )
    parser.add_argument("--hostfile", default=str(PROJECT / "hostfile"), help=argparse.SUPPRESS)
    before = parser.add_argument_group("before the start")
    before.add_argument("--check", action="store_true", help="check all hosts and start nothing")
    before.add_argument(
        "--sync",
        action="store_true",
        help="copy code and dataset to hosts that lack them first, and create the Python environment there",
    )
    before.add_argument("--measure", action="store_true", help="measure bandwidth and latency between the hosts")
    failures = parser.add_argument_group("failures")
    failures.add_argument(
        "--restarts",
        type=at_least_zero,
        default=0,
        metavar="N",
        help="number of restarts from the last checkpoint after a failure, without hosts that stay away (default: 0)",
    )
    failures.add_argument(
        "--hang-seconds",
        type=above_zero,
        metavar="S",
        help="seconds that a rank waits for the others before the job fails; increase it if a step, or gathering a "
        "checkpoint, takes longer (default: the variable HANG_SECONDS, else 50)",
    )
    return parser.parse_known_args()


def main() -> int:
    args, arguments = parse()
    hosts = hosts_of(args.hostfile)
    try:
        limits = Limits.of(os.environ)
        master_port()
    except ValueError as error:
        say(f"error: {error}")
        return EXIT_USAGE
    train = paths_of(arguments)
    environment = {
        **sent(os.environ),
        **deepspeed_env(),
        "HANG_SECONDS": str(args.hang_seconds or os.environ.get("HANG_SECONDS") or 50),
    }
    if os.environ.get("DRY_RUN"):
        show_commands(hosts, arguments, environment, train.runs_dir)
        return 0
    what = preflight.request(sys.executable, train.data_dir, train.runs_dir, arguments)
    try:
        report = preflight.look(hosts, what, args.sync, args.measure)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    if not report.can_start or args.check:
        return 0 if report.can_start else EXIT_PREFLIGHT
    stop, folder, batch = Stop(), "", None
    for left in range(args.restarts, -1, -1):
        if stop.requested:
            return 128 + stop.number
        outcome = Job(plan(report, arguments, environment, train.runs_dir, limits), stop).run()
        show_failure(outcome, stop.requested)
        folder = outcome.folder = outcome.folder or folder  # a start that failed early has learned neither
        batch = outcome.batch = outcome.batch or batch
        if outcome.code in (0, EXIT_STOPPED) or stop.requested or outcome.refused or not left:
            break
        regrouped = regroup(outcome, what, hosts, stop, limits.rejoin, train.micro_batch)
        if regrouped is None:
            break
        report = regrouped
        if folder:  # it is fresh now
            arguments = [word for word in arguments if word != "--fresh"]
        if ranks_of(report.hosts) != ranks_of(outcome.hosts) and INEXACT not in arguments:
            say(f"The number of ranks changes, so batch statistics (BatchNorm) differ from before: adding {INEXACT}.")
            arguments = [*arguments, INEXACT]
        say(f"Restarting from the last checkpoint ({left - 1} more restart{'' if left == 2 else 's'} after this one).")
    if stop.requested and outcome.code not in (0, EXIT_STOPPED):
        return 128 + stop.number
    return outcome.code


def paths_of(arguments: list[str]) -> argparse.Namespace:
    """The data and runs folders and the micro-batch size that train.py will use, from its own flags."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--dataset", default="cifar100")
    parser.add_argument("--runs-dir", type=Path, default=RUNS)
    parser.add_argument("--micro-batch")
    found = parser.parse_known_args(arguments)[0]
    # Shells leave the ~ of --data-dir=~/data alone.
    found.data_dir = Path(os.path.expanduser(found.data_dir or DATA / found.dataset))
    found.runs_dir = Path(os.path.expanduser(found.runs_dir))
    return found


def sent(environment: Any) -> dict[str, str]:
    """The environment variables that are sent to every host."""
    return {name: value for name, value in environment.items() if name.startswith(SENT)}


def deepspeed_env() -> dict[str, str]:
    """Variables from DeepSpeed's file .deepspeed_env (NAME=VALUE per line), in the home or current folder."""
    found = {}
    for path in (Path(os.path.expanduser("~/.deepspeed_env")), Path(".deepspeed_env")):
        for line in path.read_text().splitlines() if path.is_file() else []:
            name, equals, value = line.strip().partition("=")
            if equals and not name.startswith("#"):
                found[name.strip()] = value.strip()
    return found


def plan(report: Report, arguments: list[str], environment: dict[str, str], runs: Path, limits: Limits) -> Plan:
    assert report.rendezvous is not None
    return Plan(
        report.hosts,
        report.rendezvous,
        sys.executable,
        str(PROJECT / "train.py"),
        arguments,
        environment,
        report.on_cpu,
        runs,
        limits,
    )


def show_commands(hosts: list[Host], arguments: list[str], environment: dict[str, str], runs: Path) -> None:
    """Print the command of each host, one line per host."""
    python = os.environ.get("PYTHON") or sys.executable  # the .venv of the launcher may not be there yet
    rendezvous = Rendezvous(os.environ.get("MASTER_ADDR") or hosts[0].machine, master_port() or 29500, {})
    would = Plan(hosts, rendezvous, python, str(PROJECT / "train.py"), arguments, environment, False, runs)
    for i, host in enumerate(hosts):
        print(f"{host.name}: {shlex.join([*would.command(i), would.script, *arguments])}")


def show_failure(outcome: Outcome, is_stopped: bool) -> None:
    """Print the first error at the end of all output; the rest is in the logs."""
    if outcome.code in (0, EXIT_STOPPED):
        return
    if is_stopped and outcome.code in ENDED_BY_STOP:
        not_begun = "Stopped before training began; there was nothing to save."
        say("Ended before the ranks had saved." if outcome.folder else not_begun)
        return
    say(f"\nerror: training failed: {outcome.cause}" + (":" if outcome.lines else "."))
    for line in outcome.lines:
        say(f"    {line}")
    if not outcome.refused:
        say(f"The output of every rank is in {near_path(outcome.logs)} on its host.")


# --- restarting ---------------------------------------------------------------------------------------------------


def ranks_of(hosts: list[Host]) -> int:
    return sum(host.slots for host in hosts)


def regroup(
    outcome: Outcome,
    what: dict[str, Any],
    all_hosts: list[Host],
    stop: Stop,
    seconds: float,
    micro_batch: str | None = None,
) -> Report | None:
    """Choose hosts of the hostfile that pass the preflight in time. None if no restart is possible."""
    report = inspect_in_time(all_hosts, what, stop, seconds)
    bad = {problem.host for problem in report.problems if not problem.warning}
    hosts = [host for host in all_hosts if host.name not in bad]
    for problem in report.problems:
        if problem.host in bad and not problem.warning:
            say(f"warning: restarting without {problem.host}: it {problem.what}.")
    if not hosts:
        say("error: no host is left to resume on.")
        return None
    ranks = ranks_of(hosts)
    if outcome.batch:
        total, accumulation, ranks_per_shard = outcome.batch
        # With --micro-batch, train.py chooses the accumulation steps itself.
        divisor = accumulation if micro_batch is None else 1 if micro_batch == "auto" else int(micro_batch)
        hosts = fit(hosts, total, divisor, ranks_per_shard)
        if not hosts:
            say(f"error: the global batch of {total} cannot be divided among the {ranks} remaining ranks.")
            return None
        ranks = ranks_of(hosts)
        if ranks != ranks_of(outcome.hosts):
            names = ", ".join(host.name for host in hosts)
            say(f"Resuming with {ranks} rank{'' if ranks == 1 else 's'} on {names}; the global batch stays {total}.")
    first = outcome.hosts[0].name
    if hosts[0].name != first and not outcome.folder:
        say(
            f"error: the run folder may be on {first} alone, because the start failed before training began. "
            "If the run is new, or its folder is on a shared disk, start again without that host."
        )
        return None
    if hosts[0].name != first and not exists(hosts[0], f"{outcome.folder}/run.json"):
        say(
            f"error: only {first} had the run folder; {hosts[0].name} does not have {outcome.folder}. "
            "Put run folders on a shared disk (--runs-dir) to resume without the first host."
        )
        return None
    report = inspect_in_time(hosts, what, stop, seconds) if hosts != report.hosts else report
    if report.can_start:
        return report
    for problem in report.problems:
        if not problem.warning:
            say(f"error: {problem}")
    return None


def inspect_in_time(hosts: list[Host], what: dict[str, Any], stop: Stop, seconds: float) -> Report:
    """Repeat the preflight until the hosts pass it, the time is over, or the user stops the launcher."""
    deadline = time.monotonic() + seconds
    while True:
        report = preflight.inspect(hosts, what)
        if report.can_start or stop.requested or time.monotonic() > deadline:
            return report
        time.sleep(2)


def fit(hosts: list[Host], total: int, divisor: int, ranks_per_shard: int) -> list[Host]:
    """Keep as many ranks as can divide the global batch evenly, starting with the first hosts.

    Args:
        divisor: of a shard's part of the batch: accumulation steps, or images per micro-batch.
    """
    ranks = ranks_of(hosts)
    while ranks and (ranks % ranks_per_shard or total % (divisor * (ranks // ranks_per_shard))):
        ranks -= 1
    kept = []
    for host in hosts:
        slots = min(host.slots, ranks)
        ranks -= slots
        if slots:
            kept.append(Host(host.name, slots))
    return kept


def exists(host: Host, path: str) -> bool:
    """Whether a file exists on a host."""
    process = remote.start(host.name, ["test", "-e", path])
    process.communicate()
    return process.returncode == 0


if __name__ == "__main__":
    sys.exit(run_unblocked(main))
