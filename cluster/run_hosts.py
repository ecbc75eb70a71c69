"""Trains on every machine of the hostfile; what ./launch_distributed_train.sh runs. What it does not know goes to train.py.

    ./launch_distributed_train.sh --preset spt-lsa --name big --restarts 3

Exit codes: 0 trained to the end; 75 stopped and saved (the same command goes on); 2 a wrong hostfile or variable; 3 the
preflight found something to mend; 69 a host was lost; else that of the rank that failed first (128 + the number of a signal).
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

from cluster import preflight, remote, sync  # noqa: E402
from cluster.failure_cause import EXIT_STOPPED  # noqa: E402
from cluster.job import Job, Limits, Outcome, Plan  # noqa: E402
from cluster.preflight import EXIT_PREFLIGHT, EXIT_USAGE, Meeting, Report, hosts_of  # noqa: E402
from cluster.remote import Host, say  # noqa: E402
from common.paths import PROJECT
from config.command_line import Parser  # noqa: E402

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
    "HANG_SECONDS",
)
INEXACT = "--allow-inexact-resume"  # of train.py


class Stop:
    """Remembers signals: the first asks for saving, a second Ctrl-C two seconds later (not the same key's echo) for an end at once."""

    def __init__(self) -> None:
        self.requested, self.now, self.number, self.since = False, False, 0, 0.0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        if self.requested and time.monotonic() - self.since > 2:
            self.now = True
        if not self.requested:
            self.requested, self.number, self.since = True, number, time.monotonic()


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(
        "./launch_distributed_train.sh",
        "Train on every machine of the hostfile, over SSH. All other arguments go to train.py.",
        example="./launch_distributed_train.sh --preset spt-lsa --restarts 3",
        notes="exit code: docs/cluster.md; what train.py takes: python train.py --help",
    )
    parser.add_argument("--hostfile", default=str(PROJECT / "hostfile"), help=argparse.SUPPRESS)
    before = parser.add_argument_group("before the start")
    before.add_argument("--check", action="store_true", help="look at all hosts and start nothing")
    before.add_argument(
        "--sync",
        action="store_true",
        help="first copy code and dataset to the hosts that lack them, and make the environment there",
    )
    before.add_argument("--measure", action="store_true", help="bandwidth and latency between the hosts")
    failures = parser.add_argument_group("failures")
    failures.add_argument(
        "--restarts",
        type=int,
        default=0,
        metavar="N",
        help="after a failure start again from the last checkpoint, N times at most; without a host that stays away (default: 0)",
    )
    failures.add_argument(
        "--hang-seconds",
        type=float,
        default=50,
        metavar="S",
        help="give up when a rank waits this many seconds for the others; "
        "raise it where a step, or gathering a checkpoint, takes longer (default: 50)",
    )
    return parser.parse_known_args()


def main() -> int:
    args, arguments = parse()
    hosts = hosts_of(args.hostfile)
    try:
        limits = Limits.of(os.environ)
    except ValueError as error:
        say(str(error))
        return EXIT_USAGE
    train = paths_of(arguments)
    environment = {
        **sent(os.environ),
        **deepspeed_env(),
        "HANG_SECONDS": os.environ.get("HANG_SECONDS", f"{args.hang_seconds:g}"),
    }
    if os.environ.get("DRY_RUN"):
        show_commands(hosts, arguments, environment, train.runs_dir)
        return 0
    what = preflight.request(sys.executable, train.data_dir, train.runs_dir, arguments)
    try:
        report = look(hosts, what, args)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    if not report.can_start or args.check:
        return 0 if report.can_start else EXIT_PREFLIGHT
    stop = Stop()
    for left in range(args.restarts, -1, -1):
        if stop.requested:
            return 128 + stop.number
        outcome = Job(plan(report, arguments, environment, train.runs_dir, limits), stop).run()
        tell(outcome)
        if outcome.code in (0, EXIT_STOPPED) or stop.requested or outcome.refused or not left:
            break
        regrouped = regroup(outcome, what, hosts, stop, limits.rejoin)
        if regrouped is None:
            break
        report = regrouped
        arguments = [word for word in arguments if word != "--fresh"]
        if ranks_of(report.hosts) != ranks_of(outcome.hosts) and INEXACT not in arguments:
            say(
                f"Each rank takes another part of the batch than before, which shows where statistics are taken of it (BatchNorm): {INEXACT}."
            )
            arguments = [*arguments, INEXACT]
        say(
            f"Starting again from the last checkpoint ({left - 1} more restart{'' if left == 2 else 's'} after this one)."
        )
    if stop.requested and outcome.code not in (0, EXIT_STOPPED):
        return 128 + stop.number
    return outcome.code


def look(hosts: list[Host], what: dict[str, Any], args: argparse.Namespace) -> Report:
    """The preflight, with what was asked for besides."""
    report = preflight.inspect(hosts, what)
    if args.sync and not report.can_start:
        report = sync.mend(report, what, preflight.inspect)
    report.show()
    if args.measure and report.meeting:
        say("\n".join(preflight.measure(hosts, report.answers)))
    return report


def paths_of(arguments: list[str]) -> argparse.Namespace:
    """The folders that train.py will use, of its own flags."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--dataset", default="cifar100")
    parser.add_argument("--runs-dir", type=Path, default=PROJECT / "runs")
    found = parser.parse_known_args(arguments)[0]
    found.data_dir = found.data_dir or PROJECT / "data" / found.dataset
    return found


def sent(environment: Any) -> dict[str, str]:
    """The variables that matter to training, for every host."""
    return {name: value for name, value in environment.items() if name.startswith(SENT)}


def deepspeed_env() -> dict[str, str]:
    """DeepSpeed's own file of variables for all hosts (NAME=VALUE a line), at home or where you stand."""
    found = {}
    for path in (Path.home() / ".deepspeed_env", Path(".deepspeed_env")):
        for line in path.read_text().splitlines() if path.is_file() else []:
            name, equals, value = line.strip().partition("=")
            if equals and not name.startswith("#"):
                found[name.strip()] = value.strip()
    return found


def plan(report: Report, arguments: list[str], environment: dict[str, str], runs: Path, limits: Limits) -> Plan:
    return Plan(
        report.hosts,
        report.meeting,
        sys.executable,
        str(PROJECT / "train.py"),
        arguments,
        environment,
        report.on_cpu,
        runs,
        limits,
    )


def show_commands(hosts: list[Host], arguments: list[str], environment: dict[str, str], runs: Path) -> None:
    """What would be started on each host, one line a host."""
    meeting = Meeting(os.environ.get("MASTER_ADDR") or hosts[0].machine, int(os.environ.get("MASTER_PORT", 29500)), {})
    would = Plan(hosts, meeting, sys.executable, str(PROJECT / "train.py"), arguments, environment, False, runs)
    for i, host in enumerate(hosts):
        print(f"{host.name}: {shlex.join([*would.command(i), would.script, *arguments])}")


def tell(outcome: Outcome) -> None:
    """The first error, at the end of all output; the rest is in the logs."""
    if outcome.code not in (0, EXIT_STOPPED):
        say(f"\nTraining failed: {outcome.cause}" + (":" if outcome.lines else "."))
        for line in outcome.lines:
            say(f"    {line}")
    if outcome.code not in (0, EXIT_STOPPED) and not outcome.refused:
        say(f"Every rank's output: {os.path.relpath(outcome.logs)}, on each host.")


# --- starting again ---------------------------------------------------------------------------------------------------


def ranks_of(hosts: list[Host]) -> int:
    return sum(host.slots for host in hosts)


def regroup(outcome: Outcome, what: dict[str, Any], all_hosts: list[Host], stop: Stop, seconds: float) -> Report | None:
    """The hosts to go on with: all of the hostfile when they are well again in time, else those that are. None: it cannot go on."""
    deadline = time.monotonic() + seconds
    report = preflight.inspect(all_hosts, what)
    while not report.can_start and not stop.requested and time.monotonic() < deadline:
        time.sleep(2)
        report = preflight.inspect(all_hosts, what)
    bad = {problem.host for problem in report.problems if not problem.warning}
    hosts = [host for host in all_hosts if host.name not in bad]
    for problem in report.problems:
        if problem.host in bad and not problem.warning:
            say(f"Leaving out: {problem.host} {problem.what}.")
    if not hosts:
        say("No host is left to go on with.")
        return None
    ranks = ranks_of(hosts)
    if outcome.batch:
        hosts = fit(hosts, *outcome.batch, ranks_of(outcome.hosts))
        total = outcome.batch[0]
        if not hosts:
            say(f"The global batch of {total} cannot be cut for the {ranks} ranks that are left.")
            return None
        ranks = ranks_of(hosts)
        if ranks != ranks_of(outcome.hosts):
            say(
                f"Going on with {ranks} ranks on {', '.join(host.name for host in hosts)}; the global batch stays {total}."
            )
    if outcome.folder and hosts[0] != outcome.hosts[0] and not exists(hosts[0], f"{outcome.folder}/run.json"):
        say(
            f"The run folder was on {outcome.hosts[0].name} alone, and {hosts[0].name} does not have {outcome.folder}: "
            "put run folders on a shared disk (--runs-dir) to go on without the first host."
        )
        return None
    report = preflight.inspect(hosts, what) if hosts != report.hosts else report
    return report if report.can_start else None


def fit(hosts: list[Host], total: int, accumulation: int, shards: int, ranks_before: int) -> list[Host]:
    """As many ranks as can share the global batch evenly, taken from the first hosts on."""
    ranks_a_shard = max(1, ranks_before // shards)
    ranks = sum(host.slots for host in hosts)
    while ranks and (ranks % ranks_a_shard or total % (accumulation * (ranks // ranks_a_shard))):
        ranks -= 1
    kept = []
    for host in hosts:
        slots = min(host.slots, ranks)
        ranks -= slots
        if slots:
            kept.append(Host(host.name, slots))
    return kept


def exists(host: Host, path: str) -> bool:
    """Whether a host sees a file."""
    process = remote.start(host.name, ["test", "-e", path])
    process.communicate()
    return process.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
