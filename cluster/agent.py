"""Runs the ranks of one host, keeps their logs, and never outlives the one who started it: run_hosts.py, over SSH.

    python cluster/agent.py                  the order is one line of JSON on standard input; then `stop`, `kill`, `beat` or `logs PATH` a line
    python cluster/agent.py --end MARK       end what a killed agent left

It starts `python -m deepspeed.launcher.launch --node_rank=I`, the half of DeepSpeed's launcher that works on each machine, and
adds what that lacks. It says every few seconds that it is alive. When it hears nothing for `silence` seconds (a cut cable) or
its input ends (the other side died), it lets the ranks save, and ends them; a rank that somebody halted (SIGSTOP) for as long
counts as dead. Whatever the ranks started is ended too.
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
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
libc = ctypes.CDLL(None, use_errno=True)


class Supervisor:
    """The other side: lines come in through a thread, and go out through one, so that a cut connection blocks nobody."""

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
                sys.stdout.write(json.dumps(message) + "\n")
                sys.stdout.flush()
            except OSError:
                self.gone = True
            self.outgoing.task_done()

    def tell(self, **message):
        self.outgoing.put(message)

    def flush(self, seconds):
        """Give what was said some time to leave."""
        deadline = time.monotonic() + seconds
        while self.outgoing.unfinished_tasks and not self.gone and time.monotonic() < deadline:
            time.sleep(0.02)


class Ranks:
    """The launcher's process and the ranks it starts."""

    def __init__(self, order):
        self.mark = f"CLUSTER_JOB={order['job']}:{order['index']}"
        self.logs, self.slots = order["logs"], len(order["world"][order["index"]][1])
        self.first_rank = sum(len(devices) for _, devices in order["world"][: order["index"]])
        os.makedirs(self.logs, exist_ok=True)
        self.pids, self.gone, self.halted, self.destination, self.stopping = {}, [], {}, "", False
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what loses its parent becomes ours, to be found and ended
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
        """The order's variables over this host's own; the environment's programs first on PATH, for DeepSpeed looks for ninja there."""
        variables = {**os.environ, **order["environment"]}
        variables["PATH"] = os.path.dirname(order["command"][0]) + ":" + variables.get("PATH", "/usr/bin:/bin")
        name, _, value = self.mark.partition("=")
        variables.update({name: value, "LOCAL_WORLD_SIZE": str(self.slots)})
        if order["on_cpu"]:
            # Threads of the ranks must not fight for the cores: two ranks with a thread per core each were 40 times slower.
            variables["DS_ACCELERATOR"] = "cpu"
            variables.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // self.slots)))
        return variables

    def find(self):
        """Notice new ranks among the launcher's children. One that comes after the order to save gets it now."""
        for pid in children(self.launcher.pid) if len(self.pids) < self.slots else ():
            rank = re.search(rb"(?:^|\0)RANK=(\d+)\0", read(f"/proc/{pid}/environ"))
            if rank and self.mark.encode() in read(f"/proc/{pid}/environ") and int(rank[1]) not in self.pids:
                self.pids[int(rank[1])] = pid
                if self.stopping:
                    send(pid, signal.SIGTERM)

    def watch(self):
        """Notice new ranks, ranks that ended (in their order) and ranks that somebody halted. Returns the ranks that ended since."""
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
                self.halted.setdefault(rank, time.monotonic())
            else:
                self.halted.pop(rank, None)
        return ended

    def stop(self):
        """Ask the ranks to save, all at once; the launcher would ask one after the other, and kill each after 30 s."""
        self.find()
        self.stopping = True
        for rank, pid in self.pids.items():
            if rank not in self.gone:
                send(pid, signal.SIGTERM)
        if not self.pids:
            send(self.launcher.pid, signal.SIGTERM)

    def log_of(self, rank):
        """The path of a rank's log; the launcher names it after the time, and we after the rank alone."""
        path = os.path.join(self.logs, f"rank{rank}.log")
        if not os.path.exists(path):
            for found in glob.glob(os.path.join(glob.escape(self.logs), f"*_rank{rank}.log")):
                os.rename(found, path)
        return path

    def move_logs(self):
        """Into the run folder, once it is known and all logs are open; files that are being written to can be renamed."""
        path, self.destination = self.destination, ""
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.rename(self.logs, path)
        except OSError:  # another disk
            return
        old, self.logs = self.logs, path
        for folder in (os.path.dirname(old), os.path.dirname(os.path.dirname(old))):
            try:
                os.rmdir(folder)  # only when it is empty
            except OSError:
                break

    def report(self):
        """Of each rank: its last lines, and its first error."""
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
    """End every process that has this mark in its environment. Returns how many there were."""
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
            send(pid, signal.SIGKILL)
            ended.add(pid)
        if not left:
            break
        time.sleep(0.05)
    return len(ended)


def first_error(text):
    """The first traceback or error line; what follows in a log is mostly its echo. Empty when there is none."""
    lines = text.splitlines()
    for i, line in enumerate(lines):
        if re.match(r"(error\b|\S+\.py: error: |\S*Error: |terminate called|Fatal Python error)", line):
            return lines[i : i + 3]
        if line.startswith("Traceback (most recent call last)"):
            end = next((j for j in range(i + 1, len(lines)) if lines[j] and not lines[j][0].isspace()), len(lines) - 1)
            return (lines[i : end + 1] if end - i < TAIL_LINES else ["..."] + lines[end - TAIL_LINES : end + 1])[
                : TAIL_LINES + 2
            ]
    return []


def children(pid):
    return [int(child) for child in read(f"/proc/{pid}/task/{pid}/children").split()]


def state_of(pid):
    """R, S, D, T (halted), Z (ended, not yet collected), or nothing when there is no such process."""
    return read(f"/proc/{pid}/stat").rpartition(b")")[2].decode()[1:2]


def read(path):
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


def send(pid, number):
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def watch(ranks, supervisor, order):
    """Until the launcher ends or somebody ends it. Returns why it was ended, or an empty text."""
    limit, reason, deadline, beat, position = order["silence"], "", None, 0.0, 0
    while ranks.launcher.poll() is None:
        now = time.monotonic()
        for rank in ranks.watch():
            supervisor.tell(event="gone", rank=rank)
        if now - beat > order["beat"]:
            beat = now
            supervisor.tell(event="beat")
        if order["index"] == 0:
            position = follow(ranks.log_of(0), position, supervisor)
        halted = [rank for rank, since in ranks.halted.items() if now - since > limit]
        if halted:
            return f"rank {halted[0]} was halted (SIGSTOP) for {limit:g} s"
        while not supervisor.orders.empty():
            words = supervisor.orders.get().split(" ", 1)
            if words[0] == "kill":
                return "told to"
            if words[0] == "stop":
                ranks.stop()
            if words[0] == "logs":
                ranks.destination = words[1]
        if deadline is None and (supervisor.gone or now - supervisor.heard > limit):
            reason = "lost the one who started it" if supervisor.gone else f"heard nothing for {limit:g} s"
            deadline = now + order["grace"]
            ranks.stop()
        if deadline is not None and now > deadline:
            return reason
        time.sleep(0.1)
    if order["index"] == 0:
        follow(ranks.log_of(0), position, supervisor)
    for rank in ranks.watch():
        supervisor.tell(event="gone", rank=rank)
    return reason


def follow(path, position, supervisor):
    """Pass on the lines that were added to a log since `position`. Returns the new position."""
    try:
        with open(path, "rb") as file:
            file.seek(position)
            text = file.read()
    except OSError:
        return position
    whole = text[: text.rfind(b"\n") + 1]
    for line in whole.decode(errors="replace").splitlines():
        supervisor.tell(event="line", text=line)
    return position + len(whole)


def main():
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(
            number, lambda *_: None
        )  # only orders, silence and the end of the input count; the ranks inherit nothing
    if sys.argv[1:2] == ["--end"]:
        print(end(sys.argv[2]))
        return
    order = json.loads(sys.stdin.readline())
    try:
        ranks = Ranks(order)
    except OSError as error:
        print(
            json.dumps(
                {"event": "end", "code": 1, "reason": str(error), "ranks": {}, "launcher": [str(error)], "logs": ""}
            ),
            flush=True,
        )
        return
    supervisor = Supervisor()
    try:
        reason = watch(ranks, supervisor, order)
    finally:
        end(ranks.mark)
        code = ranks.launcher.wait()
    if ranks.destination:
        ranks.move_logs()
    report = ranks.report()
    supervisor.tell(event="end", code=code, reason=reason, **report)
    supervisor.flush(5)
    os._exit(0)  # the threads may hang in a connection that is cut


if __name__ == "__main__":
    main()
