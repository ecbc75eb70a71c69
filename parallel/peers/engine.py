"""Strategy `local` over the internet: a whole DeepSpeed job that meets others like it after every `parallel.local_steps` steps.

Between two meetings it is the engine of `zero`, stage 0 to 3, on any number of processes. At a meeting its main process
has the whole fp32 weights, averages them with the other peers', makes the outer step of DiLoCo (arXiv 2311.08105), and
hands the result to its own processes. One process speaks for a peer, because peers differ in stage and number of
processes and have no shards in common; what goes over the slow link is the same, a copy of the weights a peer.

Progress is counted in outer steps: after the k-th all peers stand at step k * local_steps of the schedule, whatever a
single one has trained. So a late one takes over the count, and all end together.
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
from parallel.diloco import OuterStep, check_outer
from parallel.peers.heartbeat import background
from parallel.peers.link_cost import line_of_exchange
from parallel.peers.membership import ExchangeResult, Member, PeerState
from parallel.peers.rendezvous import PeerGroup
from parallel.peers.setup import agreement, data_seed, join_command

POLL_SECONDS = 0.5  # between looks at whether an exchange is over, and whether the person wants to leave

LOGGER = logging.getLogger("engine")


class Engine(zero.Engine):
    """One peer."""

    name = "local"
    used_settings = frozenset({"local_steps", "outer_lr", "outer_momentum", "patience_seconds"})
    ema_refusal = "peers that come and go would each average only what they saw themselves"
    own_average_refusal = "the peers exchange the weights that are trained, and not the average that would be evaluated"

    def __init__(
        self, build: Callable[[], nn.Module], settings: Settings, schedule: Schedule, seed: int, meeting: PeerGroup
    ):
        """As of `zero`; `meeting` is used by the main process only.

        Raises:
            SettingsError: a combination that would not train as asked.
        """
        check_outer(settings.parallel)
        super().__init__(build, settings, schedule, seed)
        self.meeting, self.local_steps = meeting, settings.parallel.local_steps
        self.data_seed = data_seed(seed, meeting.number)
        self.outer_steps = 0  # outer steps made
        self.alone = 0  # optimiser steps since the last one
        self.made = 0  # optimiser steps of this process
        self.began = time.monotonic()  # of these
        self.met: list[Member] = []
        self.facts: dict[str, float] = {}
        self.outer: OuterStep | None = None  # in the main process

    def random_stream(self) -> int:
        return self.data_shard[0] + 4096 * self.meeting.number

    def describe(self) -> str:
        chosen = self.settings.parallel
        return (
            f"a peer that takes {chosen.local_steps} steps alone, outer rate {chosen.outer_lr} and momentum {chosen.outer_momentum}, "
            f"{super().describe()}"
        )

    def epoch_facts(self) -> dict[str, float]:
        """`peers` of the last exchange, `outer_steps` made in all, and what that exchange took in waiting, seconds and bytes sent."""
        return self.facts

    def close(self, failed: bool = False) -> None:
        if self.is_main:
            self.meeting.close()
        super().close()

    # --- training -------------------------------------------------------------------------------------------------

    def begin(self, facts: dict[str, Any]) -> None:
        """Join the others, and go on from where they stand; the first peer begins alone."""
        problem = None
        if self.is_main:
            try:
                self.meeting.open(agreement(facts, self.num_parameters))
            except (RunError, SettingsError) as error:
                problem = str(error)
        self._raise(self.broadcast_object(problem))
        self._make_outer()
        if self.is_main:
            self.say(f"peers     this one listens at {self.meeting.place.text}; another joins with")
            self.say(f"          {join_command(facts, self.meeting.place.text)}")
            if self.meeting.join:
                self.say("peers     waiting for the others' next exchange")
        if self.meeting.join or self.alone >= self.local_steps:  # the latter: stopped while it waited for an exchange
            self._exchange(joining=self.meeting.join is not None)
        self.began = time.monotonic()

    def train_batch(self, batches: Iterator[Batch]) -> Tensor:
        self.meeting.touch(FIRST_STEPS_SECONDS if self.made < self.first_steps else 0.0)
        loss = super().train_batch(batches)
        self.made += 1
        self.alone += 1
        if self.step % self.local_steps == 0 or self.step == self.schedule.total:
            self._exchange()
        return loss

    def forward(self, images: Tensor) -> Tensor:
        self.meeting.touch()
        return super().forward(images)

    def _exchange(self, joining: bool = False) -> None:
        """Meet the others, make the outer step, and stand where they stand. Collective.

        Told to stop while it waits, the peer leaves without the exchange; resumed, it meets the others before anything else.
        """
        values, future = self._gather(), None
        worked_seconds = time.monotonic() - self.began
        if self.is_main:
            sound = bool(torch.isfinite(values).all())  # a peer whose weights are lost does not spoil the others'
            share = min(1.0, self.alone / self.local_steps) if sound else 0.0
            standing = PeerState(self.outer_steps, self.step, share, values, self._outer_vector())
            future = background(self.meeting.exchange, standing, joining)
        if not self._wait(future):
            if self.is_main:
                self.meeting.leave()
                self.say("peers     left without the exchange that it was waiting for")
            return
        outcome: ExchangeResult | None = future.result() if future else None
        if outcome is not None:
            values = self._outer_step(outcome)
            self._tell(outcome, worked_seconds)
        self._scatter(values)
        self.outer_steps, self.step, self.facts = self.broadcast_object((self.outer_steps, self.step, self.facts))
        self.alone, self.began = 0, time.monotonic()

    def _wait(self, future: Future | None) -> bool:
        """Until the main process has the outcome; False when told to leave. Collective."""
        while True:
            done, problem = False, None
            if future is not None:
                wait([future], timeout=POLL_SECONDS)
                done = future.done()
                problem = str(future.exception()) if done and isinstance(future.exception(), RunError) else None
            # The other processes wait here only, and never for longer than a moment: no time limit of theirs can strike.
            done, problem = self.broadcast_object((done, problem))
            self._raise(problem)
            if done:
                return True
            if self.any(self.stopping()):
                return False

    def _raise(self, problem: str | None) -> None:
        if problem:
            raise RunError(problem) if self.is_main else SystemExit(1)

    # --- the outer step, in the main process ----------------------------------------------------------------------

    def _make_outer(self) -> None:
        """From the weights as they are, unless a checkpoint brought one."""
        masters = self._masters(keep=self.is_main and self.outer is None)
        if self.is_main and self.outer is None:
            chosen = self.settings.parallel
            self.outer = OuterStep(masters, chosen.outer_lr, chosen.outer_momentum)
            self.outer_steps = self.step // self.local_steps

    def _outer_vector(self) -> Tensor:
        state = self.outer.state()
        anchor = [state[f"outer/anchor/{name}"] for name in self.outer.anchor]
        momentum = [
            state.get(f"outer/momentum/{name}", torch.zeros_like(value))
            for name, value in zip(self.outer.anchor, anchor, strict=True)
        ]
        return torch.cat([value.flatten() for value in (*anchor, *momentum)])

    def _set_outer_vector(self, vector: Tensor) -> None:
        parts = iter(vector.split([anchor.numel() for anchor in self.outer.anchor.values()] * 2))
        self.outer.set_state(
            {
                f"outer/{kind}/{name}": next(parts).view_as(anchor)
                for kind in ("anchor", "momentum")
                for name, anchor in self.outer.anchor.items()
            }
        )

    def _outer_step(self, outcome: ExchangeResult) -> Tensor:
        """The values that every peer goes on from."""
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

    def _tell(self, outcome: ExchangeResult, worked_seconds: float) -> None:
        """Facts for the epoch's line, and on the screen who came and who went."""
        self.facts = {
            "peers": len(outcome.members),
            "outer_steps": self.outer_steps,
            "exchange_wait_seconds": round(outcome.wait_seconds, 3),
            "exchange_seconds": round(outcome.seconds, 3),
            "exchange_bytes": outcome.num_bytes,
        }
        now, before = (
            {member.id: member.place for member in members}
            for members in (outcome.members, self.met or outcome.members[:0])
        )
        came = sorted(place for key, place in now.items() if key not in before and key != self.meeting.id)
        went = sorted(place for key, place in before.items() if key not in now)
        self.met = outcome.members
        if came or went or outcome.outer is not None:
            changes = [f"{', '.join(places)} {what}" for places, what in ((came, "here"), (went, "gone")) if places]
            if outcome.outer is not None:
                changes.append(f"this one has taken over their state after outer step {outcome.count}")
            self.say(
                f"peers     outer step {self.outer_steps}, step {self.step}: {len(now)} with this one; {'; '.join(changes)}"
            )
        if [member.number for member in outcome.members].count(self.meeting.number) > 1 and came:
            self.say(
                "peers     another peer sees the very images that this one sees: of two on one machine, each needs a --name of its own"
            )
        if came and self.alone:
            self.say(line_of_exchange(outcome.seconds, outcome.wait_seconds, worked_seconds, self.alone))

    # --- the weights, between the job's processes and one vector ----------------------------------------------------

    def _masters(self, keep: bool) -> dict[str, Tensor]:
        """The trained parameters in fp32, whole, on the CPU; empty unless this process is to keep them. Collective."""
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
        """Parameters, then floating-point buffers (N,), on the CPU of the main process. Collective."""
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

    # --- the state: that of zero, and the outer step's --------------------------------------------------------------

    def gather_state(self) -> dict[str, Tensor] | None:
        state = super().gather_state()
        if state is None:
            return None
        return {**state, **self.outer.state(), "outer/progress": torch.tensor([self.outer_steps, self.alone])}

    def scatter_state(self, state: dict[str, Tensor] | None) -> None:
        super().scatter_state(state)
        if (
            state is not None and "outer/progress" in state
        ):  # a state of zero has none: its weights are what peers agree on
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
