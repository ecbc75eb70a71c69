"""Peers on simulated hosts: a pair without a network path does not stop the others.

    ./run_tests.sh tests/cluster/test_peers_on_hosts.py

The hosts are network namespaces of this machine (cluster/simulated_hosts.py), with the default time limits of peers.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch

from cluster import simulated_hosts
from cluster.simulated_hosts import Hosts
from common.paths import PROJECT

pytestmark = pytest.mark.cluster
if sys.version_info >= (3, 14) or tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7):
    pytest.skip("torchft is not available for this Python or this PyTorch", allow_module_level=True)

# A peer that exchanges whenever it reads a line, and prints the size of the exchange and its seconds.
PEER = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
import torch
from parallel.peers.membership import PeerState
from parallel.peers.rendezvous import PeerGroup
address, join, number = sys.argv[2], sys.argv[3] or None, int(sys.argv[4])
peer = PeerGroup(address, 29600, join, number, patience_seconds=60.0, say=lambda text: print("say", text, flush=True))
peer.open({"seed": 0})
print("open", flush=True)
for line in sys.stdin:
    began = time.monotonic()
    count = int(line)
    values = torch.full((5,), float(number))
    result = peer.exchange(PeerState(count, 4 * count, 1.0, values, torch.full((10,), float(count))))
    print(json.dumps([len(result.members), result.mean[0].item(), time.monotonic() - began]), flush=True)
"""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    if reason := simulated_hosts.missing():
        pytest.skip(reason)
    with Hosts(tmp_path_factory.mktemp("peers") / "hosts", 3) as hosts:
        yield hosts


def start_peer(hosts, number):
    address, join = f"10.177.0.{number}", "" if number == 1 else "10.177.0.1:29600"
    words = [sys.executable, "-c", PEER, PROJECT, address, join, number]
    return subprocess.Popen(
        hosts.command(f"box{number}", words), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )


def read_until(peer, wanted):
    """Lines of a peer up to the first that begins with `wanted`."""
    lines = []
    for line in peer.stdout:
        lines.append(line.strip())
        if line.startswith(wanted):
            return lines
    raise AssertionError(f"the peer ended: {lines}")


def exchange(peers, count):
    """One exchange of all peers: ([members, mean, seconds] of each, lines of the first)."""
    for peer in peers:
        peer.stdin.write(f"{count}\n")
    said = [read_until(peer, "[") for peer in peers]
    return [json.loads(lines[-1]) for lines in said], said[0]


def test_a_pair_without_a_path_does_not_stop_the_third_peer(hosts):
    peers = []
    try:
        for number in (1, 2, 3):
            peers.append(start_peer(hosts, number))
            read_until(peers[-1], "open")
        results, _ = exchange(peers, 0)
        assert [members for members, *_ in results] == [3, 3, 3]
        for one, other in ((2, 3), (3, 2)):
            simulated_hosts.ip("-n", hosts.space(f"box{one}"), "route", "add", f"10.177.0.{other}/32", "dev", "dead0")
        began = time.monotonic()
        results, said = exchange(peers, 1)
        seconds = time.monotonic() - began
        print(f"a pair without a path: the others continued after {results[0][2]:.1f} s")
        assert seconds < 30, results
        assert [members for members, *_ in results] == [2, 2, 1] and results[0][1] == results[1][1] == 1.5
        assert any("10.177.0.3:29600 is left out" in line for line in said), said
        results, _ = exchange(peers, 2)  # now all know it
        print(f"the next exchange without a path took {results[0][2]:.1f} s")
        for one, other in ((2, 3), (3, 2)):
            simulated_hosts.ip("-n", hosts.space(f"box{one}"), "route", "del", f"10.177.0.{other}/32")
        results, _ = exchange(peers, 3)
        assert [members for members, *_ in results] == [3, 3, 3]
    finally:
        for peer in peers:
            peer.kill()
            peer.wait()
