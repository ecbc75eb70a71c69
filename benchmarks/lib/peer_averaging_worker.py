"""One peer of benchmarks/peer_averaging.py: trains a little, averages, notes; until it is killed. It runs in hivemind's Python as well.

    peers_worker.py SYSTEM FOLDER NAME PARAMETERS STEP_SECONDS GROUP MATCHMAKING_SECONDS REQUEST_SECONDS

The first peer of a folder writes `meeting` there, where the others join. A line of NAME.jsonl for every exchange: when it was
over, its seconds, the hash and some 64 of the weights after it, and the loss before it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

WIDTH = 256  # of the network's input


class Network:
    """A linear network on data of this peer's own, with all weights in one vector."""

    def __init__(self, num_parameters: int, seed: int):
        hidden = num_parameters // (WIDTH + 1)
        torch.manual_seed(0)  # the same for all peers
        self.teacher = torch.randn(WIDTH, 1)
        model = nn.Sequential(nn.Linear(WIDTH, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, 1, bias=False))
        self.flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        for parameter, part in zip(model.parameters(), self.flat.split([parameter.numel() for parameter in model.parameters()]), strict=True):
            parameter.data = part.view_as(parameter)
        self.model, self.generator = model, torch.Generator().manual_seed(seed)
        self.rate = min(0.01, 3e3 / num_parameters)  # a wide network diverges at the rate of a narrow one

    def train(self, seconds: float) -> float:
        """SGD steps for so long; the mean loss."""
        losses, end = [], time.monotonic() + seconds
        while time.monotonic() < end or not losses:
            x = torch.randn(32, WIDTH, generator=self.generator)
            loss = nn.functional.mse_loss(self.model(x), (x @ self.teacher).tanh())
            self.model.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter -= self.rate * parameter.grad
            losses.append(loss.item())
        return sum(losses) / len(losses)


def meet_torchft(meeting: Path, network: Network, group: int, matchmaking: float, request: float) -> Callable[[], None]:
    """Our exchange; there is no outer step, so the outer state is empty."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from parallel.peers.membership import PeerState
    from parallel.peers.rendezvous import PeerGroup

    join = meeting.read_text() if meeting.exists() else None
    peer = PeerGroup("127.0.0.1", 0 if join else free_pair(), join, os.getpid(), say=lambda text: None)
    peer.open({})
    if not join:
        meeting.write_text(peer.place.text)
    rounds = 0

    def exchange(share: float = 1.0) -> None:
        nonlocal rounds
        outcome = peer.exchange(PeerState(rounds, rounds, share, network.flat, torch.zeros(2 * len(network.flat))), joining=share == 0)
        network.flat.copy_(outcome.mean)
        rounds = outcome.count + 1

    if join:
        exchange(0.0)
    return exchange


def meet_hivemind(meeting: Path, network: Network, group: int, matchmaking: float, request: float) -> Callable[[], None]:
    """hivemind's averager, which the weights are copied into and out of."""
    import hivemind

    join = json.loads(meeting.read_text()) if meeting.exists() else []
    dht = hivemind.DHT(initial_peers=join, start=True, host_maddrs=["/ip4/127.0.0.1/tcp/0"])
    if not join:
        meeting.write_text(json.dumps([str(address) for address in dht.get_visible_maddrs()]))
    averaged = network.flat.clone()
    averager = hivemind.averaging.DecentralizedAverager([averaged], dht, prefix="weights", start=True, target_group_size=group,
                                                        min_matchmaking_time=matchmaking, request_timeout=request, next_chunk_timeout=5.0,
                                                        allreduce_timeout=30.0)

    def read(tensors: list[Tensor]) -> None:
        network.flat.copy_(tensors[0])

    if join:
        state = averager.load_state_from_peers(timeout=30)
        if state is not None:
            read(state[1])

    def exchange() -> None:
        with averager.get_tensors() as tensors:
            tensors[0].copy_(network.flat)
        try:
            averager.step(timeout=max(10.0, 3 * matchmaking))
        except Exception as error:  # no group in time, or it broke apart: the peer goes on with its own weights
            print(f"no exchange: {error!r}", file=sys.stderr)
        with averager.get_tensors() as tensors:
            read(tensors)

    return exchange


def free_pair() -> int:
    """A port that is free, and the one after it too."""
    import socket

    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            try:
                two.bind(("127.0.0.1", one.getsockname()[1] + 1))
                return one.getsockname()[1]
            except OSError:
                continue


SYSTEMS = {"torchft": meet_torchft, "hivemind": meet_hivemind}


def main() -> None:
    system, folder, name, num_parameters, step_seconds, group, matchmaking, request = sys.argv[1:]
    torch.set_num_threads(1)
    network = Network(int(num_parameters), seed=1 + int(name.rpartition("-")[2]))
    exchange = SYSTEMS[system](Path(folder, "meeting"), network, int(group), float(matchmaking), float(request))
    with Path(folder, f"{name}.jsonl").open("a") as log:
        while True:
            loss = network.train(float(step_seconds))
            began = time.time()
            exchange()
            ended = time.time()
            mark = hashlib.blake2b(network.flat.numpy(), digest_size=8).hexdigest()
            probe = network.flat[:: max(1, len(network.flat) // 64)].tolist()
            line = {"at": ended, "seconds": ended - began, "hash": mark, "probe": probe, "loss": loss}
            log.write(json.dumps(line) + "\n")
            log.flush()


if __name__ == "__main__":
    main()
