"""Find which rank or host failed first when several ended: most errors only follow from another process's end.

Order of blame: a rank with an error of its own, a lost host, a rank that ended without an error message, and last a
rank whose error refers to another rank.
"""

from __future__ import annotations

import re
from typing import Any

EXIT_FAILED, EXIT_LOST_HOST, EXIT_STOPPED = 1, 69, 75
# In the traceback of a rank that lost the connection to another one.
ECHO = re.compile(
    r"connection (closed|reset|refused)|timed? ?out|broken pipe|gloo|nccl|tcpstore|Dist(Network|Backend|Store)|"
    r"no route|unreachable",
    re.IGNORECASE,
)
SENTENCE = re.compile(r"error\b|\S+\.py: error: ")  # of train.py, for what the user can fix
NOT_JOINED = "could not join the others"  # train.py's sentence of a rank that waited for another one in vain
# Sentences before training that another start may not meet; the others are errors in the command line.
TRANSIENT = re.compile(f"{NOT_JOINED}|cannot listen on|is in use|can be reached any more")


def cause(agents: list[Any], gone: list[tuple[int, int]]) -> tuple[int, str, list[str]]:
    """Return (exit code, what failed first, lines to show) of a start that failed.

    Args:
        agents: `job.Agent` of every host.
        gone: (index of the host, rank) in the order in which ranks were seen to end.
    """
    reports = {
        (i, int(rank)): facts
        for i, agent in enumerate(agents)
        if agent.end
        for rank, facts in agent.end["ranks"].items()
    }
    order = [*(key for key in gone if key in reports), *(key for key in reports if key not in gone)]
    failed = [key for key in order if agents[key[0]].end["code"] not in (0, EXIT_STOPPED)]

    def blame(key: tuple[int, int], words: str = "") -> tuple[int, str, list[str]]:
        agent, facts = agents[key[0]], reports[key]
        lines = facts["error"] or facts["tail"] or agent.end["launcher"]
        return shell_code(agent.end["code"]), f"rank {key[1]} on {agent.host.name} failed first{words}", lines

    for key in failed:
        if reports[key]["error"] and not is_echo(reports[key]["error"]):
            return blame(key)
    for agent in agents:
        if agent.lost:
            return EXIT_LOST_HOST, f"{agent.host.name} was lost: it {agent.lost}", last_words(agent)
    for agent in agents:
        if agent.end["reason"] not in ("", "told to"):
            return EXIT_FAILED, f"{agent.host.name}: {agent.end['reason']}", []
    for key in failed:
        # The rank was seen to end; or it ended before it was seen, on a host that was not ordered to end its ranks.
        if not reports[key]["error"] and (key in gone or not agents[key[0]].end["reason"]):
            killed = " (killed? out of memory? see dmesg there)" if shell_code(agents[key[0]].end["code"]) > 128 else ""
            return blame(key, f" without an error message{killed}; its last lines")
    if failed:
        return blame(failed[0])
    agent = next(agent for agent in agents if agent.end["code"] not in (0, EXIT_STOPPED))
    return EXIT_FAILED, f"{agent.host.name} failed", agent.end["launcher"]


def is_refusal(lines: list[str], has_begun: bool) -> bool:
    """Whether another start would end the same way: training did not begin, because train.py rejected the command."""
    return not has_begun and bool(lines) and bool(SENTENCE.match(lines[0])) and not TRANSIENT.search(lines[0])


def is_echo(error: list[str]) -> bool:
    """Whether a rank's error only follows from the end of another rank."""
    if SENTENCE.match(error[0]):
        return NOT_JOINED in error[0]
    return bool(ECHO.search("\n".join(error)))


def shell_code(code: int) -> int:
    """A rank's exit code as a shell shows it. DeepSpeed's launcher turns signal 9 into 247."""
    code = code - 256 if code > 192 else code
    return 128 - code if code < 0 else code or EXIT_FAILED


def last_words(agent: Any) -> list[str]:
    """The last lines that SSH, or the agent's Python, wrote to standard error."""
    try:
        return (agent.process.stderr.read() or "").strip().splitlines()[-5:]
    except (OSError, ValueError):
        return []
