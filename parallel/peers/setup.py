"""Set up a peer before its first exchange: address and number from the flags, facts that peers must share."""

from __future__ import annotations

import os
import shlex
import socket
from hashlib import blake2b
from pathlib import Path
from typing import Any

from common.errors import SettingsError
from config.differences import leaves
from parallel.peers.endpoint import check_own, coordination, own_address, split_address
from parallel.peers.rendezvous import PeerGroup
from records.own_part_files import with_digests

# Settings that may differ between peers: parallelism and precision, because memory and GPUs differ.
FREE = (
    "strategy",
    "engine.zero_optimization",
    "engine.bf16",
    "engine.gradient_accumulation_steps",
    "parallel.patience_seconds",
)
# Flags of train.py that are specific to one peer, with the number of words that follow. The others go into the join
# command.
OWN_FLAGS = {
    "--host-peers": 1,
    "--join": 1,
    "--peer-address": 1,
    "--preset": 1,
    "--name": 1,
    "--runs-dir": 1,
    "--stop-at": 1,
    "--stage-to": 1,
    "--fresh": 0,
    "--link-gbps": 1,
    "--step-seconds": 1,
    "--local_rank": 1,
    "--strategy": 1,
}


def meeting_of(
    host_peers: str | None,
    join: str | None,
    peer_address: str | None,
    runs_dir: Path,
    name: str | None,
    patience_seconds: float,
) -> PeerGroup | None:
    """The PeerGroup for the flags of these names; None without any of them.

    Only the main process of a peer connects to others. Its host alone needs an address for that: in the other processes
    the PeerGroup has neither an address nor a number.

    Raises:
        SettingsError: flags that exclude one another, an address of another machine, or torchft is missing.
    """
    if not (host_peers or join):
        if peer_address:
            raise SettingsError("--peer-address sets where a peer listens: add --host-peers or --join")
        return None
    if host_peers and join:
        raise SettingsError("--host-peers starts a run of peers and --join enters one: give only one of them")
    coordination()
    if os.environ.get("RANK", "0") != "0":
        return PeerGroup("", 0, join, number=0, patience_seconds=patience_seconds)
    if host_peers:
        address, port = split_address(host_peers, "--host-peers")
        return PeerGroup(check_own(address, "--host-peers"), port, None, number=0, patience_seconds=patience_seconds)
    assert join is not None
    there, port = split_address(join, "--join")
    address = (
        own_address(there)
        if not peer_address
        else check_own(split_address(peer_address, "--peer-address")[0], "--peer-address")
    )
    number = peer_number(socket.gethostname(), f"{runs_dir}/{name}")
    return PeerGroup(address, port, f"{there}:{port}", number, patience_seconds)


def peer_number(host: str, name: str) -> int:
    """A number from 1 to 2^20 - 1 that stays the same when this peer restarts; the first peer has 0."""
    return 1 + int.from_bytes(blake2b(f"{host} {name}".encode(), digest_size=4).digest(), "big") % (2**20 - 1)


def data_seed(seed: int, number: int) -> int:
    """The seed of a peer's data order and augmentation; the first peer uses the seed of the run."""
    return seed if number == 0 else int.from_bytes(blake2b(f"{seed} {number}".encode(), digest_size=4).digest(), "big")


def agreement(facts: dict[str, Any], num_parameters: int) -> dict[str, Any]:
    """The facts of `run.json` that must be equal for all peers."""
    settings = {path: value for path, value in leaves(with_digests(facts["settings"])) if not path.startswith(FREE)}
    return {
        **settings,
        "the dataset's fingerprint": facts["dataset"]["fingerprint"],
        "the number of parameters": num_parameters,
        **{
            f"--{key.replace('_', '-')}": facts[key]
            for key in ("seed", "max_steps", "hold_out", "init_weights", "synthetic")
        },
        "steps an epoch": facts["steps_per_epoch"],
        "steps in all": facts["total_steps"],
    }


def join_command(facts: dict[str, Any], endpoint: str) -> str:
    """The join command. It names the preset, because a machine without a GPU would choose another one."""
    words, kept = iter(facts["command"][1:]), []
    for word in words:
        flag, _, value = word.partition("=")
        if flag not in OWN_FLAGS:
            kept.append(word)
        elif not value:
            for _ in range(OWN_FLAGS[flag]):
                next(words, None)
    return shlex.join(
        ["./launch_local_train.sh", "--strategy", "local", "--join", endpoint, "--preset", facts["preset"], *kept]
    )
