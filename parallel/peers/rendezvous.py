"""Choose the peers of an exchange (by torchft's lighthouse) and average with them (in a Gloo group).

torchft's `Manager` is not used: it listens on every network of the machine, lets any client end the process, and
unpickles what it receives. Its lighthouse and client are enough, because no exchange needs anything from
the one before:

1. The peer asks the lighthouse for a quorum: all peers whose heartbeats it receives, once they have asked too.
2. Peers that do not fit (membership.py) are left out and named. Each member connects to every other member once. A pair
   without a path is announced with the next quorum, and all leave out the same member of it.
3. The members make a Gloo group for this one exchange. Idle connections do not survive minutes on the internet.
4. Each member has announced its number of outer steps and a hash of its outer state. The furthest one leads, and
   members with another state take the leader's. This one rule covers late joiners, restarted peers and those whose
   last exchange failed halfway; after every exchange all members are equal.
5. They average the weights, then confirm. If a member dies before that, the others begin again at 1. A mean that is not
   finite is replaced by the mean of the finite contributions.
"""

from __future__ import annotations

import json
import logging
import math
import time
import uuid
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import replace
from datetime import timedelta
from hashlib import blake2b
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import RunError, SettingsError
from common.text import first_line
from config.differences import leaves
from parallel.peers import failures, heartbeat
from parallel.peers.averaging import Averaging
from parallel.peers.endpoint import Endpoint, code_fingerprint, coordination, lighthouse_of, open_store
from parallel.peers.failures import FAILURES, MemberFailures
from parallel.peers.heartbeat import Heartbeat, background
from parallel.peers.membership import (
    ENDPOINT,
    PROTOCOL,
    ExchangeResult,
    Member,
    PeerState,
    choose_leader,
    misfit,
    parse_member,
    ring_bytes,
    without_unreachable,
)

LOGGER = logging.getLogger("engine")  # train.py shows its lines on the console


class PeerGroup:
    """This peer's connection to the others. Only one thread at a time may call `exchange`.

    Args:
        address, port: where this peer listens.
        join: `address:port` of a peer of the run; None for the first peer.
        number: this peer's number, which gives it a data order of its own.
        patience_seconds: longest wait for a peer that is alive but late, or that stalls within an exchange.
        say: prints a line for the user.
    """

    most_outer_steps = most_steps = math.inf  # of the whole run; a peer that announces more is left out

    def __init__(
        self,
        address: str,
        port: int,
        join: str | None,
        number: int,
        patience_seconds: float = 120.0,
        say: Callable[[str], None] = LOGGER.info,
    ):
        self.address, self.port, self.join, self.number = address, port, join, number
        self.patience_seconds, self.say = patience_seconds, say
        self.id = uuid.uuid4().hex
        self.code = code_fingerprint()
        self.beats: dict[str, Heartbeat] = {}
        self.endpoint: Endpoint | None = None
        self.failures = MemberFailures(self.id)
        self._reported: set[str] = set()
        self._touched = time.monotonic()
        self._exchanging = False
        self._heard_at = 0.0  # when this peer's own lighthouse has the heartbeats of all others

    # --- joining and leaving ---------------------------------------------------------------------------------------

    def open(self, facts: dict[str, Any], resumed: bool = False) -> None:
        """Listen, and check that this peer's facts equal those of the run that it joins.

        Args:
            resumed: whether this peer has trained before, so that others may send heartbeats to its lighthouse.

        Raises:
            RunError: nobody answers, or the port is in use.
            SettingsError: this peer's facts differ from the run's.
        """
        facts = {**facts, "the protocol of peers": PROTOCOL, "the fingerprint of the code": self.code}
        endpoints = self._handshake(facts) if self.join else []
        self.endpoint = Endpoint(
            self.address, self.port, fixed=self.join is None, patience_seconds=self.patience_seconds
        )
        if resumed and self.join is None:
            self._heard_at = time.monotonic() + heartbeat.BEAT_SECONDS + heartbeat.SILENT_SECONDS
        self.since = time.time()
        self.device = dist.ProcessGroupGloo.create_device(hostname=self.address)
        self.preferred_endpoint = endpoints[0] if endpoints else self.endpoint.text
        self.endpoint.store.set("facts", json.dumps(facts))
        self._update_endpoints(endpoints)
        deadline = time.monotonic() + 2 * heartbeat.SILENT_SECONDS
        # Once the lighthouse has this peer's heartbeat, the others wait for it.
        while not self.beats[self.preferred_endpoint].answers and time.monotonic() < deadline:
            time.sleep(0.02)

    def _handshake(self, facts: dict[str, Any]) -> list[str]:
        """The endpoints at which the run meets. Raises as `open` does."""
        assert self.join is not None
        try:
            store = open_store(self.join, 10.0)
            theirs, endpoints = json.loads(store.get("facts")), json.loads(store.get("places"))
        except (OSError, RuntimeError) as error:
            raise RunError(
                f"no peer answers at {self.join}. Check that it is running and that no firewall blocks the port; "
                "the first peer prints the address to join"
            ) from error
        except ValueError:
            theirs = endpoints = None
        if not (isinstance(theirs, dict) and isinstance(endpoints, list) and all(map(is_endpoint, endpoints))):
            raise RunError(f"the program at {self.join} is not a peer. Use the address that the first peer prints")
        theirs, own = dict(leaves(theirs)), dict(leaves(json.loads(json.dumps(facts))))
        differences = [
            f"{key} is {theirs.get(key)} there and {own.get(key)} here"
            for key in sorted(theirs.keys() | own.keys())
            if theirs.get(key) != own.get(key)
        ]
        if differences:
            more = f"; and {len(differences) - 5} more" if len(differences) > 5 else ""
            raise SettingsError(f"this peer does not fit the run at {self.join}: {'; '.join(differences[:5])}{more}")
        return endpoints

    def _update_endpoints(self, endpoints: list[str]) -> None:
        """Meet at the first of these endpoints that answers: the preferred one first, this peer's own last."""
        assert self.endpoint is not None
        self.endpoints = list(dict.fromkeys([self.preferred_endpoint, *endpoints, self.endpoint.text]))
        self.endpoint.store.set("places", json.dumps(self.endpoints))
        for endpoint in self.beats.keys() - set(self.endpoints):
            self.beats.pop(endpoint).ended.set()
        for endpoint in self.endpoints:
            # To all of them: if the meeting moves to another lighthouse, it already knows whom to wait for.
            if endpoint not in self.beats:
                self.beats[endpoint] = Heartbeat(endpoint, self.id, self._is_alive)
                self.beats[endpoint].start()

    def touch(self, seconds: float = 0.0) -> None:
        """Report that training makes progress; the next report may take `seconds` longer than usual.

        A peer whose training hangs must count as gone for the others, even though its process lives.
        """
        self._touched = time.monotonic() + seconds

    def _is_alive(self) -> bool:
        return self._exchanging or time.monotonic() - self._touched < self.patience_seconds

    def leave(self) -> None:
        """Let the others continue without this peer; it listens until `close`."""
        for beat in self.beats.values():
            beat.ended.set()
        for beat in self.beats.values():  # a call of torchft that returns while Python shuts down would abort
            beat.join(heartbeat.SILENT_SECONDS)

    def close(self) -> None:
        self.leave()
        if self.endpoint is not None:
            self.endpoint.close()

    # --- an exchange -----------------------------------------------------------------------------------------------

    def exchange(self, state: PeerState, joining: bool = False) -> ExchangeResult:
        """Average with all peers that are there, with as many attempts as it takes; alone, return what was brought.

        Raises:
            RunError: this peer joins a run and finds no other peer.
        """
        began = time.monotonic()
        self._exchanging = True
        own = self._announce(state)
        state = replace(state, share=own.share)
        # Before that, a restarted first peer would exchange alone, lead by its count, and discard the others' steps.
        time.sleep(max(0.0, self._heard_at - time.monotonic()))
        try:
            while True:
                own = replace(own, unreachable=self.failures.still_unreachable())
                members, name = self._assemble(own)
                if joining and len(members) == 1:
                    if time.monotonic() - began > self.patience_seconds:
                        raise RunError(
                            f"no other peer of the run at {self.join} can be reached any more. "
                            "Start this one with --host-peers to train alone"
                        )
                    time.sleep(heartbeat.BEAT_SECONDS)
                    continue
                assembled = time.monotonic()
                try:
                    mean, worked, outer = self._average(state, members, name)
                except (OSError, RuntimeError) as error:
                    reason = first_line(error)[:150]
                    self.say(f"peers     an exchange of {len(members)} failed ({reason}); trying again")
                    continue
                self.failures.clear()
                leader = choose_leader(members)
                members_by_age = sorted(members, key=lambda member: (member.since, member.id))
                self._update_endpoints([member.endpoint for member in members_by_age])
                return ExchangeResult(
                    mean,
                    worked,
                    leader.count,
                    leader.step,
                    outer,
                    members,
                    assembled - began,
                    time.monotonic() - assembled,
                    ring_bytes(len(mean), len(members)),
                )
        finally:
            self._exchanging = False
            self.touch()

    def _announce(self, state: PeerState) -> Member:
        """This peer's own announcement. If its values are not finite, they do not count in the mean."""
        assert self.endpoint is not None
        finite = state.is_finite()
        return Member(
            id=self.id,
            endpoint=self.endpoint.text,
            number=self.number,
            since=self.since,
            count=state.count,
            step=state.step,
            share=state.share if finite else 0.0,
            state_hash=state.state_hash(),
            finite=finite,
            sizes=(len(state.values), len(state.outer)),
            code=self.code,
            probe_port=self.endpoint.probe_port,
        )

    def _assemble(self, own: Member) -> tuple[list[Member], str]:
        """The members of the next exchange, in an order that all know, and a name that no other exchange has."""
        while True:
            endpoint = self._meeting_endpoint()
            asked = background(self._ask, endpoint, own)
            while self._meeting_endpoint() == endpoint and not asked.done():
                wait([asked], timeout=0.2)  # the others are still training
            if asked.done() and not asked.exception():
                quorum = asked.result()
                self.failures.forget_others({participant.replica_id for participant in quorum.participants})
                members = self._select(quorum.participants, own)
                ids = blake2b("".join(member.id for member in members).encode(), digest_size=6).hexdigest()
                return members, f"{quorum.created.seconds}.{quorum.created.nanos}.{ids}"
            if asked.done():  # nobody listens there any more, or the others take very long
                self.beats[endpoint].reconnect()
                time.sleep(heartbeat.BEAT_SECONDS)

    def _select(self, participants: list[Any], own: Member) -> list[Member]:
        """The participants that can exchange with this peer; only this peer if it is the one to be left out."""
        members = []
        for participant in participants:
            member: Member | None
            try:
                member = own if participant.replica_id == self.id else parse_member(participant)
                reason = misfit(member, own, self.most_outer_steps, self.most_steps)
            except (ValueError, TypeError, AttributeError, RuntimeError) as error:
                member, reason = None, str(error) or f"fails with {type(error).__name__}"
            if member is not None and not reason:
                members.append(member)
            else:
                self._report(f"{str(participant.store_address)[:40]} is left out: it {reason}")
        kept, left_out = without_unreachable(members)
        for member in left_out:
            if member.id != self.id:
                self._report(
                    f"{member.endpoint} is left out: not all peers can connect to it, or it failed {FAILURES} times"
                )
        if own in kept:
            return kept
        self._report("this one is left out, because it cannot connect to all others: it trains alone for now")
        return [own]

    def _report(self, text: str) -> None:
        """Say something once."""
        if text not in self._reported:
            self._reported.add(text)
            self.say(f"peers     {text}")

    def _meeting_endpoint(self) -> str:
        """The first endpoint whose lighthouse answers. Each gets the time for a first attempt over a connection."""
        for endpoint in self.endpoints:
            beat = self.beats[endpoint]
            while not (beat.tried or beat.ended.is_set()):
                time.sleep(0.02)
            if beat.answers:
                return endpoint
        assert self.endpoint is not None
        return self.endpoint.text

    def _ask(self, endpoint: str, own: Member) -> Any:
        """The quorum of this lighthouse.

        Raises:
            RuntimeError, TimeoutError: it cannot be reached, or had no quorum for so long that it should be asked once
                more over a new connection. A lighthouse that was shut down keeps its old connections: over them it
                answers heartbeats, but never has a quorum.
        """
        client = coordination().LighthouseClient(
            lighthouse_of(endpoint), connect_timeout=timedelta(seconds=heartbeat.SILENT_SECONDS)
        )
        return client.quorum(
            self.id,
            timeout=timedelta(seconds=2 * self.patience_seconds + heartbeat.SILENT_SECONDS),
            address="",
            store_address=own.endpoint,
            step=own.count,
            world_size=1,
            shrink_only=False,
            data=own.announcement(),
        )

    # --- the mean --------------------------------------------------------------------------------------------------

    def _average(self, state: PeerState, members: list[Member], name: str) -> tuple[Tensor, bool, Tensor | None]:
        """The mean, whether anybody had trained, and the leader's outer state if this peer needs it.

        Raises:
            OSError, RuntimeError: a member is gone, or stalls.
        """
        leader = choose_leader(members)
        shares = [member.share if member.state == leader.state else 0.0 for member in members]
        worked = sum(shares) > 0
        if not worked:  # all have just joined: they take the leader's weights
            shares[members.index(leader)] = 1.0
        rank = [member.id for member in members].index(self.id)
        own = state.values * shares[rank] if shares[rank] else torch.zeros_like(state.values)
        if len(members) == 1:
            return own / sum(shares), worked, None
        store = self.failures.gather_members(members, leader, name)
        group = Averaging(store, rank, members, self.device, failures.CONNECT_SECONDS, self.patience_seconds)
        outer = group.sync_outer_state(state.outer, leader)
        if outer is not None and leader.finite and not torch.isfinite(outer).all():
            self.failures.count(leader)
            raise RuntimeError(f"{leader.endpoint} sent an outer state that is not finite")
        total = group.sum(own.clone())
        if not torch.isfinite(total).all():  # the same bits for all members, so all come here
            total, shares, faulty = group.sum_of_finite(own, shares)
            for member in faulty:
                self._report(f"{member.endpoint} sent weights that are not finite: the others average without it")
                self.failures.exclude(member)
        group.sum(torch.ones(1))  # everyone has the mean: nobody keeps what another could not get
        return total / sum(shares), worked, outer


def is_endpoint(value: Any) -> bool:
    return isinstance(value, str) and bool(ENDPOINT.fullmatch(value))
