"""Run the ranks of one host, keep their logs, and end with the launcher: run_hosts.py starts this program over SSH.

    python cluster/agent.py                  reads an order (one line of JSON) from standard input, then the commands
                                             `stop`, `kill`, `beat` and `logs PATH`, one per line
    python cluster/agent.py --end MARK       ends the processes that a killed agent left behind

The agent starts `python -m deepspeed.launcher.launch --node_rank=I`, the per-machine half of DeepSpeed's launcher, and
adds supervision. It prints a heartbeat every few seconds. If its input ends (the launcher died) or it receives nothing
for `silence` seconds (cut cable), it lets the ranks save and then ends them. A rank that is suspended (SIGSTOP) for as
long counts as dead. Every process that the ranks started is ended as well.
"""

import ctypes
import glob
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time

TAIL_LINES = 15
MARK = "agent:"  # begins every message to the launcher; login scripts print to the same pipe
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
libc = ctypes.CDLL(None, use_errno=True)


class Supervisor:
    """The connection to the launcher. One thread reads and one writes, so a cut connection never blocks supervision."""

    def __init__(self):
        self.orders, self.outgoing = queue.Queue(), queue.Queue()
        self.heard, self.gone = time.monotonic(), False
        for work in (self._read, self._write):
            threading.Thread(target=work, daemon=True).start()

    def _read(self):
        for line in sys.stdin:
            self.heard = time.monotonic()
            if line.strip() != "beat":
                self.orders.put(line.strip())
        self.gone = True

    def _write(self):
        while True:
            message = self.outgoing.get()
            try:
                sys.stdout.write(MARK + json.dumps(message) + "\n")
                sys.stdout.flush()
            except OSError:
                self.gone = True
            self.outgoing.task_done()

    def send(self, **message):
        self.outgoing.put(message)

    def flush(self, seconds):
        """Wait until queued messages are sent, at most `seconds`."""
        deadline = time.monotonic() + seconds
        while self.outgoing.unfinished_tasks and not self.gone and time.monotonic() < deadline:
            time.sleep(0.02)


class Ranks:
    """DeepSpeed's launcher process on this host and the ranks it starts."""

    def __init__(self, order):
        self.mark = f"CLUSTER_JOB={order['job']}:{order['index']}"
        self.logs, self.slots = order["logs"], len(order["world"][order["index"]][1])
        self.first_rank = sum(len(devices) for _, devices in order["world"][: order["index"]])
        os.makedirs(self.logs, exist_ok=True)
        self.pids, self.gone, self.suspended, self.destination, self.stopping = {}, [], {}, "", False
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphaned descendants become our children, so we can end them
        with open(os.path.join(self.logs, "launcher.log"), "w") as log:
            self.launcher = subprocess.Popen(
                order["command"],
                cwd=order["cwd"],
                env=self.environment(order),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0),
            )

    def environment(self, order):
        """The order's variables on top of this host's own.

        The environment's programs come first on PATH, because DeepSpeed looks for ninja there.
        """
        variables = {**os.environ, **order["environment"]}
        variables["PATH"] = os.path.dirname(order["command"][0]) + ":" + variables.get("PATH", "/usr/bin:/bin")
        name, _, value = self.mark.partition("=")
        variables.update({name: value, "LOCAL_WORLD_SIZE": str(self.slots)})
        if order["on_cpu"]:
            # Ranks must not compete for cores: two ranks with one thread per core each were 40 times slower.
            variables["DS_ACCELERATOR"] = "cpu"
            variables.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // self.slots)))
            # Nor spin while they wait: with spinning threads two processes were five times slower.
            variables.setdefault("OMP_WAIT_POLICY", "passive")
        return variables

    def find(self):
        """Register new ranks among the launcher's children; one that starts after the stop command gets SIGTERM."""
        for pid in children(self.launcher.pid) if len(self.pids) < self.slots else ():
            rank = re.search(rb"(?:^|\0)RANK=(\d+)\0", read(f"/proc/{pid}/environ"))
            if rank and self.mark.encode() in read(f"/proc/{pid}/environ") and int(rank[1]) not in self.pids:
                self.pids[int(rank[1])] = pid
                if self.stopping:
                    send_signal(pid, signal.SIGTERM)

    def watch(self):
        """Register new, ended and suspended ranks. Return the ranks that ended since the last call, in their order."""
        self.find()
        if self.destination and len(self.pids) == self.slots:
            self.move_logs()
        ended = []
        for rank, pid in self.pids.items():
            state = state_of(pid)
            if rank not in self.gone and state in ("", "Z", "X"):
                self.gone.append(rank)
                ended.append(rank)
            if state == "T":
                self.suspended.setdefault(rank, time.monotonic())
            else:
                self.suspended.pop(rank, None)
        return ended

    def stop(self):
        """Send SIGTERM to all ranks at once, so that they save. The launcher would kill each after 30 s, one by one."""
        self.find()
        self.stopping = True
        for rank, pid in self.pids.items():
            if rank not in self.gone:
                send_signal(pid, signal.SIGTERM)
        if not self.pids:
            send_signal(self.launcher.pid, signal.SIGTERM)

    def log_of(self, rank):
        """The path of a rank's log. DeepSpeed's launcher puts the time into the name; here it is the rank alone."""
        path = os.path.join(self.logs, f"rank{rank}.log")
        if not os.path.exists(path):
            for found in glob.glob(os.path.join(glob.escape(self.logs), f"*_rank{rank}.log")):
                os.rename(found, path)
        return path

    def move_logs(self):
        """Move the logs into the run folder once all are open. A file that is being written can be renamed."""
        path, self.destination = self.destination, ""
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.rename(self.logs, path)
        except OSError:  # another disk
            return
        old, self.logs = self.logs, path
        for folder in (os.path.dirname(old), os.path.dirname(os.path.dirname(old))):
            try:
                os.rmdir(folder)  # only if it is empty
            except OSError:
                break

    def report(self):
        """The last lines and the first error of each rank."""
        ranks = range(self.first_rank, self.first_rank + self.slots)
        texts = {rank: read(self.log_of(rank)).decode(errors="replace") for rank in ranks}
        launcher = read(os.path.join(self.logs, "launcher.log")).decode(errors="replace")
        return {
            "ranks": {
                rank: {"error": first_error(text), "tail": text.splitlines()[-TAIL_LINES:]}
                for rank, text in texts.items()
            },
            "launcher": launcher.splitlines()[-TAIL_LINES:],
            "logs": self.logs,
        }


def end(mark):
    """Kill every process that has this mark in its environment. Return how many there were."""
    ended, deadline = set(), time.monotonic() + 5
    while time.monotonic() < deadline:
        left = [
            pid
            for pid in map(int, filter(str.isdigit, os.listdir("/proc")))
            if pid != os.getpid()
            and mark.encode() in read(f"/proc/{pid}/environ").split(b"\0")
            and state_of(pid) not in ("", "Z")
        ]
        for pid in left:
            send_signal(pid, signal.SIGKILL)
            ended.add(pid)
        if not left:
            break
        time.sleep(0.05)
    return len(ended)


def first_error(text):
    """The first traceback or error line of a log; later errors mostly follow from it. Empty if there is none."""
    lines = text.splitlines()
    for i, line in enumerate(lines):
        if re.match(r"(error\b|\S+\.py: error: |\S*Error: |terminate called|Fatal Python error)", line):
            return lines[i : i + 3]
        if line.startswith("Traceback (most recent call last)"):
            last = next((j for j in range(i + 1, len(lines)) if lines[j] and not lines[j][0].isspace()), len(lines) - 1)
            found = lines[i : last + 1] if last - i < TAIL_LINES else ["..."] + lines[last - TAIL_LINES : last + 1]
            return found[: TAIL_LINES + 2]
    return []


def children(pid):
    return [int(child) for child in read(f"/proc/{pid}/task/{pid}/children").split()]


def state_of(pid):
    """R, S, D, T (suspended), Z (ended, not yet collected), or an empty text if there is no such process."""
    return read(f"/proc/{pid}/stat").rpartition(b")")[2].decode()[1:2]


def read(path):
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


def send_signal(pid, number):
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def watch(ranks, supervisor, order):
    """Supervise until the launcher process ends or has to be ended. Return why it was ended, or an empty text."""
    limit, reason, deadline, beat, position = order["silence"], "", None, 0.0, 0
    while ranks.launcher.poll() is None:
        now = time.monotonic()
        for rank in ranks.watch():
            supervisor.send(event="gone", rank=rank)
        if now - beat > order["beat"]:
            beat = now
            supervisor.send(event="beat")
        if order["index"] == 0:
            position = follow(ranks.log_of(0), position, supervisor)
        suspended = [rank for rank, since in ranks.suspended.items() if now - since > limit]
        if suspended:
            return f"rank {suspended[0]} was suspended (SIGSTOP) for {limit:g} s"
        while not supervisor.orders.empty():
            words = supervisor.orders.get().split(" ", 1)
            if words[0] == "kill":
                return "told to"
            if words[0] == "stop":
                ranks.stop()
            if words[0] == "logs":
                ranks.destination = words[1]
        if deadline is None and (supervisor.gone or now - supervisor.heard > limit):
            reason = "lost the launcher" if supervisor.gone else f"received nothing for {limit:g} s"
            deadline = now + order["grace"]
            ranks.stop()
        if deadline is not None and now > deadline:
            return reason
        time.sleep(0.1)
    if order["index"] == 0:
        follow(ranks.log_of(0), position, supervisor)
    for rank in ranks.watch():
        supervisor.send(event="gone", rank=rank)
    return reason


def follow(path, position, supervisor):
    """Forward the complete lines added to a log since `position`. Return the new position."""
    try:
        with open(path, "rb") as file:
            file.seek(position)
            text = file.read()
    except OSError:
        return position
    complete = text[: text.rfind(b"\n") + 1]
    for line in complete.decode(errors="replace").splitlines():
        supervisor.send(event="line", text=line)
    return position + len(complete)


def main():
    # Only commands, silence and the end of the input count; ranks inherit none of these handlers.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    if sys.argv[1:2] == ["--end"]:
        print(end(sys.argv[2]))
        return
    order = json.loads(sys.stdin.readline())
    supervisor = Supervisor()
    try:
        ranks = Ranks(order)
    except OSError as error:
        text = str(error)
        supervisor.send(event="end", code=1, reason=text, ranks={}, launcher=[text], logs="")
        supervisor.flush(5)
        os._exit(0)
    try:
        reason = watch(ranks, supervisor, order)
    finally:
        end(ranks.mark)
        code = ranks.launcher.wait()
    if ranks.destination:
        ranks.move_logs()
    supervisor.send(event="end", code=code, reason=reason, **ranks.report())
    supervisor.flush(5)
    os._exit(0)  # the threads may hang in a connection that is cut


if __name__ == "__main__":
    main()
