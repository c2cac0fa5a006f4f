"""What one party computes in a round: from the round's state to an update, a validation loss, or test scores.

A party keeps nothing between rounds: everything that decides a round is in the state that the server's enclave sends.
So a party that crashed begins its round again and delivers the same bytes, and with one party the rounds together are
local training, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor

from cloister.adapters.add import add_adapter
from cloister.adapters.state import load_adapter_weights
from cloister.data.prepare import PartyData
from cloister.errors import DataError
from cloister.evaluation.scores import Scores, score
from cloister.federation.aggregate import keeps_no_moments
from cloister.federation.names import is_frozen
from cloister.federation.update import PartyUpdate
from cloister.job import FederationSection, Job
from cloister.model.cut import Whole
from cloister.training.loop import PackList, Stepper, snapshot
from cloister.training.schedule import learning_rate, plan_steps

Moments = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class LocalResult:
    """What local training has made of a round's state. Tensors are secret, float32, on the CPU."""

    weights: Mapping[str, Tensor]
    moments: Moments
    steps: int
    tokens: int
    loss: float
    """Mean over the round's steps, nats per target."""
    grad_norm: float
    """The same, before clipping."""

    def as_update(self, party: str, after: int, federation: FederationSection) -> PartyUpdate:
        """What `party` sends of it; `after`: number of the round that it began from."""
        return PartyUpdate(
            party=party,
            round=after + 1,
            tokens=self.tokens,
            loss=self.loss,
            weights=self.weights,
            moments={} if keeps_no_moments(federation) else self.moments,
        )


class SiloWork:
    """One party's model and data.

    Args:
        half: the whole model, masked or plain. It is changed: an adapter is put into it.
        in_flight, verify: see `Stepper`.

    Raises:
        DataError: the party has fewer steps than the job has rounds.
    """

    def __init__(
        self,
        half: Whole,
        data: PartyData,
        job: Job,
        party: str,
        *,
        in_flight: int = 1,
        verify: Callable[[], None] = lambda: None,
    ) -> None:
        self._half, self._data, self._job, self._party = half, data, job, party
        self._in_flight, self._verify = in_flight, verify
        rank = next(p.rank for p in job.party if p.name == party)
        self.adapted: PeftModel = add_adapter(half, job.adapter, first_layer=0, seed=job.job.seed, rank=rank)
        for name, parameter in self.adapted.named_parameters():
            if is_frozen(name, job.federation.aggregation):
                parameter.requires_grad = False
        self._train = PackList(data.parts["train"].packs)
        self._steps = plan_steps(self._train.tokens, job.training, job.job.seed)
        if len(self._steps) < job.federation.rounds:
            raise DataError(
                f"its {len(self._steps)} steps cannot be spread over {job.federation.rounds} rounds",
                where=party,
                hint="lower [federation] rounds, or [training] batch_tokens",
            )

    def steps_of(self, number: int) -> range:
        """Which of the party's steps belong to round `number` (from 0): all rounds have the same share of them."""
        rounds = self._job.federation.rounds
        return range(len(self._steps) * number // rounds, len(self._steps) * (number + 1) // rounds)

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the whole job."""
        return len(self._steps)

    @property
    def round_tokens(self) -> int:
        """Most tokens that one round trains on."""
        return max(self._tokens(self.steps_of(number)) for number in range(self._job.federation.rounds))

    def _tokens(self, span: range) -> int:
        return sum(self._train.tokens[i] for step in span for i in self._steps[step])

    def train(
        self,
        number: int,
        weights: Mapping[str, Tensor],
        moments: Moments,
        on_step: Callable[[int, int, float], None] = lambda done, total, loss: None,
    ) -> LocalResult:
        """One round. Raises: RunError where training diverges; VerificationError("product")."""
        job, span = self._job, self.steps_of(number)
        load_adapter_weights(self.adapted, weights)
        stepper = Stepper(self._half, self.adapted, job.training, in_flight=self._in_flight, verify=self._verify)
        stepper.set_moments(moments)
        torch.manual_seed(job.job.seed + number)
        losses, norms = [], []
        for done, step in enumerate(span, 1):
            rate = learning_rate(step, len(self._steps), job.training)
            where = f"{self._party}, training step {step + 1}"
            loss, norm = stepper.step(self._train, self._steps[step], rate, where=where)
            losses.append(loss)
            norms.append(norm)
            on_step(done, len(span), loss)
        return LocalResult(
            weights=snapshot(self.adapted),
            moments=stepper.moments(),
            steps=len(span),
            tokens=self._tokens(span),
            loss=sum(losses) / len(losses),
            grad_norm=sum(norms) / len(norms),
        )

    def validate(self, weights: Mapping[str, Tensor]) -> tuple[float, int]:
        """Bits and bytes of the party's validation responses under a state."""
        part = self._data.parts["validation"]
        with self.tuned(weights):
            scores = score(self._half, PackList(part.packs), part.examples, where=self._party)
        self._verify()
        return float(scores.bits.sum()), int(scores.response_bytes.sum())

    def score(self, weights: Mapping[str, Tensor], on_pack: Callable[[int], None]) -> dict[str, Scores]:
        """Test scores of the state, and of the base model where the job asks for them."""
        part = self._data.parts["test"]
        found = {}
        for system in ("base", "cloister") if "base" in self._job.evaluation.baselines else ("cloister",):
            with self.tuned(weights), self.adapted.disable_adapter() if system == "base" else nullcontext():
                found[system] = score(
                    self._half, PackList(part.packs), part.examples, where=self._party, on_pack=on_pack
                )
            self._verify()
        return found

    @property
    def test_tokens(self) -> int:
        """Tokens of all passes that `score` makes."""
        passes = 2 if "base" in self._job.evaluation.baselines else 1
        return passes * sum(map(len, self._data.parts["test"].packs))

    @contextmanager
    def tuned(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """The adapter as in a state, in evaluation mode."""
        load_adapter_weights(self.adapted, weights)
        self.adapted.eval()
        yield
