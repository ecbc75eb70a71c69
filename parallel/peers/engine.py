"""Strategy `local` over the internet: a DeepSpeed job that regularly exchanges weights with others like it.

An exchange follows every `parallel.local_steps` steps.

Between two exchanges it is the engine of `zero`, stage 0 to 3, on any number of processes. In an exchange its main
process gathers the full fp32 weights, averages them with those of the other peers, makes the outer step of DiLoCo
(arXiv 2311.08105) and sends the result to its own processes. Only one process per peer communicates, because peers
differ in stage and number of processes and have no shards in common. The slow link carries the same either way: one
copy of the weights per peer.

Progress is counted in outer steps: after the k-th, all peers are at step k * local_steps of the schedule, however much
each has trained. So a late peer takes over the count, and all end together.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.errors import RunError, SettingsError
from config.settings import Settings
from optim.lr_schedule import Schedule
from parallel import zero
from parallel.batch_sizes import Batch
from parallel.buffers import persistent_buffers
from parallel.compile import FIRST_STEPS_SECONDS
from parallel.diloco import OuterStep
from parallel.peers.heartbeat import background
from parallel.peers.link_cost import line_of_exchange
from parallel.peers.membership import ExchangeResult, Member, PeerState
from parallel.peers.rendezvous import PeerGroup
from parallel.peers.setup import agreement, data_seed, join_command

POLL_SECONDS = 0.5  # between checks whether an exchange is over and whether the user stops the run

LOGGER = logging.getLogger("engine")


class Engine(zero.Engine):
    """One peer."""

    name = "local"
    used_settings = frozenset({"local_steps", "outer_lr", "outer_momentum", "patience_seconds"})
    ema_refusal = "peers join and leave, and each would average only the steps that it made itself"
    own_average_refusal = "the peers exchange the trained weights, not the average that would be evaluated"

    def __init__(
        self, build: Callable[[], nn.Module], settings: Settings, schedule: Schedule, seed: int, meeting: PeerGroup
    ):
        """As for `zero`; only the main process connects to others by `meeting`, and all take its number.

        Raises:
            SettingsError: a combination of settings that would not train as requested.
        """
        super().__init__(build, settings, schedule, seed)
        self.meeting, self.local_steps = meeting, settings.parallel.local_steps
        meeting.number = self.broadcast_object(meeting.number)  # the hosts of a peer train on one data order
        self.data_seed = data_seed(seed, meeting.number)
        self.outer_steps = 0
        self.alone = 0  # optimizer steps since the last outer step
        self.made = 0  # optimizer steps of this process
        self.began = time.monotonic()  # when the steps since the last outer step began
        self.met: list[Member] = []  # of the last exchange
        self.facts: dict[str, float] = {}
        self.outer: OuterStep | None = None  # in the main process

    def random_stream(self) -> int:
        return self.data_shard[0] + 4096 * self.meeting.number

    def describe(self) -> str:
        chosen = self.settings.parallel
        return (
            f"peer, {chosen.local_steps} local steps, outer learning rate {chosen.outer_lr} and momentum "
            f"{chosen.outer_momentum}, {super().describe()}"
        )

    def epoch_facts(self) -> dict[str, float]:
        """`peers` of the last exchange, total `outer_steps`, and that exchange's wait, seconds and bytes sent."""
        return self.facts

    def close(self, failed: bool = False) -> None:
        if self.is_main:
            self.meeting.close()
        super().close(failed)

    # --- training --------------------------------------------------------------------------------------------------

    def begin(self, facts: dict[str, Any]) -> None:
        """Join the others and take over their state; the first peer begins alone."""
        problem = None
        if self.is_main:
            self.meeting.most_steps = self.schedule.total
            self.meeting.most_outer_steps = -(-self.schedule.total // self.local_steps)
            try:
                self.meeting.open(agreement(facts, self.num_parameters), resumed=self.step > 0)
            except (RunError, SettingsError) as error:
                problem = str(error)
        self._raise(self.broadcast_object(problem))
        self._make_outer()
        if self.is_main:
            assert self.meeting.endpoint is not None
            self.say(f"peers     listening at {self.meeting.endpoint.text}; another peer joins with")
            self.say(f"          {join_command(facts, self.meeting.endpoint.text)}")
            if self.meeting.join:
                self.say("peers     waiting for the others' next exchange")
        if self.meeting.join or self.is_exchange_pending():
            self._exchange(joining=self.meeting.join is not None)
        self.began = time.monotonic()

    def is_exchange_pending(self) -> bool:
        return self.alone > 0 and (self.step % self.local_steps == 0 or self.step == self.schedule.total)

    def train_batch(self, batches: Iterator[Batch]) -> Tensor:
        self.meeting.touch(FIRST_STEPS_SECONDS if self.made < self.first_steps else 0.0)
        loss = super().train_batch(batches)
        self.made += 1
        self.alone += 1
        if self.is_exchange_pending():
            self._exchange()
        return loss

    def forward(self, images: Tensor) -> Tensor:
        self.meeting.touch()
        return super().forward(images)

    def _exchange(self, joining: bool = False) -> None:
        """Average with the others, make the outer step, and take over their progress. Collective.

        If the run is stopped during the wait, the peer leaves without the exchange. After a resume it exchanges first.
        """
        if self.step == self.schedule.total:
            self.say("peers     all steps are made; the last exchange follows")
        values, future = self._gather(), None
        worked_seconds = time.monotonic() - self.began
        if self.is_main:
            assert values is not None
            share = min(1.0, self.alone / self.local_steps)
            state = PeerState(self.outer_steps, self.step, share, values, self._outer_vector())
            future = background(self.meeting.exchange, state, joining)
        if not self._wait(future):
            if self.is_main:
                self.meeting.leave()
                self.say("peers     stopped while waiting for an exchange; it follows after a resume")
            return
        outcome: ExchangeResult | None = future.result() if future else None
        if outcome is not None:
            values = self._outer_step(outcome)
            self._report(outcome, worked_seconds)
        self._scatter(values)
        self.outer_steps, self.step, self.facts = self.broadcast_object((self.outer_steps, self.step, self.facts))
        self.alone, self.began = 0, time.monotonic()

    def _wait(self, future: Future | None) -> bool:
        """Wait until the main process has the result; False if the run is stopped first. Collective."""
        while True:
            done, problem = False, None
            if future is not None:
                wait([future], timeout=POLL_SECONDS)
                done = future.done()
                problem = str(future.exception()) if done and isinstance(future.exception(), RunError) else None
            # The other processes wait only here, for short intervals, so none of their time limits expires.
            done, problem = self.broadcast_object((done, problem))
            self._raise(problem)
            if done:
                return True
            if self.any(self.stopping()):
                return False

    def _raise(self, problem: str | None) -> None:
        if problem:
            raise RunError(problem) if self.is_main else SystemExit(1)

    # --- the outer step, in the main process -----------------------------------------------------------------------

    def _make_outer(self) -> None:
        """Create the outer optimizer from the current weights, unless a checkpoint restored it."""
        masters = self._masters(keep=self.is_main and self.outer is None)
        if self.is_main and self.outer is None:
            chosen = self.settings.parallel
            self.outer = OuterStep(masters, chosen.outer_lr, chosen.outer_momentum)
            self.outer_steps = self.step // self.local_steps

    def _outer_vector(self) -> Tensor:
        assert self.outer is not None
        return torch.cat([value.flatten() for value in self.outer.state().values()])

    def _set_outer_vector(self, vector: Tensor) -> None:
        assert self.outer is not None
        parts = iter(vector.split([anchor.numel() for anchor in self.outer.anchor.values()] * 2))
        self.outer.set_state(
            {
                f"outer/{kind}/{name}": next(parts).view_as(anchor)
                for kind in ("anchor", "momentum")
                for name, anchor in self.outer.anchor.items()
            }
        )

    def _outer_step(self, outcome: ExchangeResult) -> Tensor:
        """The values with which every peer continues."""
        assert self.outer is not None
        if outcome.outer is not None:
            self._set_outer_vector(outcome.outer)
        self.outer_steps, self.step = outcome.count, outcome.step
        if not outcome.worked:
            return outcome.mean
        sizes = [anchor.numel() for anchor in self.outer.anchor.values()]
        *means, buffers = outcome.mean.split([*sizes, len(outcome.mean) - sum(sizes)])
        shaped = [mean.view_as(anchor) for mean, anchor in zip(means, self.outer.anchor.values(), strict=True)]
        values = [value.flatten() for value in self.outer.step(shaped)]
        self.outer_steps += 1
        self.step = min(self.outer_steps * self.local_steps, self.schedule.total)
        return torch.cat([*values, buffers])

    def _report(self, outcome: ExchangeResult, worked_seconds: float) -> None:
        """Record facts for the epoch's line, and print which peers joined and left."""
        self.facts = {
            "peers": len(outcome.members),
            "outer_steps": self.outer_steps,
            "exchange_wait_seconds": round(outcome.wait_seconds, 3),
            "exchange_seconds": round(outcome.seconds, 3),
            "exchange_bytes": outcome.num_bytes,
        }
        now, before = (
            {member.id: member.endpoint for member in members}
            for members in (outcome.members, self.met or outcome.members[:0])
        )
        joined = sorted(endpoint for key, endpoint in now.items() if key not in before and key != self.meeting.id)
        left = sorted(endpoint for key, endpoint in before.items() if key not in now)
        self.met = outcome.members
        if joined or left or outcome.outer is not None:
            changes = [f"{', '.join(names)} {what}" for names, what in ((joined, "joined"), (left, "left")) if names]
            if outcome.outer is not None:
                changes.append(f"took over the state of the others after outer step {outcome.count}")
            self.say(
                f"peers     outer step {self.outer_steps}, step {self.step}: {len(now)} including this one; "
                f"{'; '.join(changes)}"
            )
        if [member.number for member in outcome.members].count(self.meeting.number) > 1 and joined:
            self.say(
                "warning: another peer trains on the same images in the same order as this one. "
                "Give each peer on a machine its own --name"
            )
        if joined and self.alone:
            self.say(line_of_exchange(outcome.seconds, outcome.wait_seconds, worked_seconds, self.alone))

    # --- the weights, between the job's processes and one vector ---------------------------------------------------

    def _masters(self, keep: bool) -> dict[str, Tensor]:
        """The full fp32 trained parameters on the CPU; empty unless this process keeps them. Collective."""
        parts, masters = self.parts, {}
        for name, parameter in self.engine.module.named_parameters():
            if parameter.requires_grad:
                value = parts.master(parameter)
                if keep:
                    masters[name] = value.detach().to("cpu", torch.float32, copy=True)
        return masters

    def _buffers(self) -> list[Tensor]:
        return [buffer for buffer in persistent_buffers(self.engine.module).values() if buffer.is_floating_point()]

    def _gather(self) -> Tensor | None:
        """Parameters, then floating-point buffers, as one vector (N,) on the CPU of the main process. Collective."""
        masters = self._masters(keep=self.is_main)
        if not self.is_main:
            return None
        return torch.cat([value.flatten().to("cpu", torch.float32) for value in (*masters.values(), *self._buffers())])

    @torch.no_grad()
    def _scatter(self, values: Tensor | None) -> None:
        """The inverse of `_gather`. Collective."""
        parts, buffers = self.parts, self._buffers()
        trained = [parameter for parameter in self.engine.module.parameters() if parameter.requires_grad]
        shapes = [getattr(parameter, "ds_shape", parameter.shape) for parameter in trained] + [
            buffer.shape for buffer in buffers
        ]
        sizes = [shape.numel() for shape in shapes]
        values = torch.empty(sum(sizes), device=self.device) if values is None else values.to(self.device)
        if dist.get_world_size() > 1:
            dist.broadcast(values, src=0)
        pieces = [piece.view(shape) for piece, shape in zip(values.split(sizes), shapes, strict=True)]
        for parameter, piece in zip(trained, pieces, strict=False):
            parts.set_master(parameter, piece)
        for buffer, piece in zip(buffers, pieces[len(trained) :], strict=True):
            buffer.copy_(piece)

    # --- the state: that of zero and of the outer step -------------------------------------------------------------

    def gather_state(self) -> dict[str, Tensor] | None:
        state = super().gather_state()
        if state is None:
            return None
        assert self.outer is not None
        return {**state, **self.outer.state(), "outer/progress": torch.tensor([self.outer_steps, self.alone])}

    def scatter_state(self, state: dict[str, Tensor] | None) -> None:
        super().scatter_state(state)
        # A checkpoint of zero has no outer state; then its weights are the common starting point.
        if state is not None and "outer/progress" in state:
            chosen = self.settings.parallel
            trained = [name for name, parameter in self.engine.module.named_parameters() if parameter.requires_grad]
            self.outer = OuterStep(
                {name: state[f"outer/anchor/{name}"] for name in trained}, chosen.outer_lr, chosen.outer_momentum
            )
            self.outer.set_state(state)
            self.outer_steps, self.alone = state["outer/progress"].tolist()
        self.outer_steps, self.alone = self.broadcast_object((self.outer_steps, self.alone))

    def say(self, text: str) -> None:
        if self.is_main:
            LOGGER.info(text)
