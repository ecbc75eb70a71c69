"""The cost of an exchange over a link, in bytes and seconds, and the number of local steps that makes it small."""

from __future__ import annotations

import math

from parallel.peers.membership import ring_bytes

NUM_PEERS = (2, 3, 4, 8)
SHARE = 0.05  # largest share of time that exchanges should take, for the advice


def seconds_over(num_bytes: int, gbps: float) -> float:
    """Seconds of a transfer. A peer sends and receives at once, so the slower direction of its link counts."""
    return 8 * num_bytes / (gbps * 1e9)


def enough_steps(exchange_seconds: float, step_seconds: float) -> int:
    """Number of local steps at which exchanges take SHARE of the time."""
    return max(1, math.ceil(exchange_seconds * (1 - SHARE) / (SHARE * step_seconds)))


def lines_of_cost(num_values: int, local_steps: int, gbps: float, step_seconds: float | None) -> list[str]:
    """Lines for the screen: the cost for several numbers of peers, from bytes alone (no latency, no other traffic)."""
    lines = [
        f"link      {4 * num_values / 1e6:,.1f} MB of weights at {gbps:g} Gbit/s, {local_steps} local steps"
        + (
            f" of {step_seconds:g} s"
            if step_seconds
            else " (add --step-seconds S for the share of time and the number of steps needed)"
        )
    ]
    for num_peers in NUM_PEERS:
        num_bytes = ring_bytes(num_values, num_peers)
        seconds = seconds_over(num_bytes, gbps)
        line = f"          {num_peers} peers: each sends {num_bytes / 1e6:,.1f} MB per outer step, {seconds:,.3g} s"
        if step_seconds:
            share = seconds / (seconds + local_steps * step_seconds)
            line += f", {100 * share:.1f}% of the time"
            if share > SHARE:
                line += f"; parallel.local_steps={enough_steps(seconds, step_seconds)} would make it {100 * SHARE:g}%"
        lines.append(line)
    return lines


def line_of_exchange(exchange_seconds: float, wait_seconds: float, worked_seconds: float, num_steps: int) -> str:
    """Line for the screen: the measured cost of an exchange."""
    step_seconds = worked_seconds / num_steps
    share = exchange_seconds / (exchange_seconds + worked_seconds)
    advice = (
        f"; parallel.local_steps={enough_steps(exchange_seconds, step_seconds)} would make it {100 * SHARE:g}%"
        if share > SHARE
        else ""
    )
    return (
        f"peers     exchange took {exchange_seconds:.2f} s after {num_steps} steps in {worked_seconds:.2f} s and a "
        f"wait of {wait_seconds:.2f} s: {100 * share:.1f}% of the time without the wait{advice}"
    )
