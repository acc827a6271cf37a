"""Removals measured: a step is evaluated again without a sample, to verify its shares or to stand in for them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lightning_influence.core.removal import gradient_change
from lightning_influence.core.removal_sets import EVERY_SAMPLE, RemovalSets
from lightning_influence.core.shares import Dense, Form
from lightning_influence.core.trajectory import StepRecord, Vectors
from lightning_influence.errors import ConfigurationError, InfluenceError
from lightning_influence.replay.passes import Passes, leaves_of
from lightning_influence.replay.plan import Plan, PlannedMicroBatch, PlannedStep
from lightning_influence.replay.removals import RemovalCheck, not_the_sum
from lightning_influence.run.batches import without
from lightning_influence.run.kept_random import KeptRandom
from lightning_influence.run.ranks import Ranks

_LONG = 10  # seconds of measuring that are announced
_EVERY = 64  # steps, and every epoch, in which removals are verified


class _TakesNoFewerSamples(ConfigurationError):
    """A training step that fails without one of its samples, and not with all of them."""


@dataclass(frozen=True)
class WholeMicroBatch:
    """A micro-batch as it was evaluated as a whole.

    Attributes:
        buffers: before.
        gradients: its own.
        drew: whether it drew random numbers.
    """

    buffers: Mapping[str, Tensor]
    gradients: Vectors
    drew: bool


class MeasuredRemovals:
    """The removals of a run's samples, by evaluating its steps without them.

    Args:
        plan: of the run.
        check: what is known of the run's removals, and is added to.
        counterfactual: of the removals.
        sets: what is removed.
        announce: warn where measuring will take long.

    Attributes:
        check: what is known of the run's removals.
    """

    def __init__(
        self,
        passes: Passes,
        plan: Plan,
        check: RemovalCheck,
        *,
        counterfactual: Literal["drop", "zero"] = "drop",
        sets: RemovalSets = EVERY_SAMPLE,
        announce: bool = True,
    ) -> None:
        self._passes, self._plan, self.check, self._counterfactual = passes, plan, check, counterfactual
        self._sets = sets
        self._to_announce = announce

    def asked(self, sample_ids: Tensor) -> Tensor:
        """The sets, by number, whose removal from a step of these samples is asked for."""
        return self._sets.within(sample_ids).sets

    def is_due(self, planned: PlannedStep) -> bool:
        """Whether removals of some samples of a step are to be verified."""
        return self.check.unverifiable is None and self.check.is_due(*_part_of(planned))

    def adopt(self, ranks: Ranks) -> None:
        """What one process has to measure, they all do."""
        for reason in ranks.gather(self.check.reason):
            if reason is not None:
                self.check.measure(reason)

    def agree(
        self,
        planned: PlannedStep,
        parameters: Mapping[str, Tensor],
        parts: Sequence[WholeMicroBatch],
        gradients: Vectors,
        shares: Mapping[str, Form],
    ) -> bool:
        """Whether the shares give the change of the gradient when a sample leaves: their sum at every step, removals of a
        few samples at the first, and of one from time to time.

        Args:
            parts: the micro-batches, evaluated.
        """
        if self.check.measuring:
            return False
        if any(micro_batch.less is not None for micro_batch in planned.micro_batches):
            self.check.measure("the collate function makes another batch of the other samples where one leaves")
            return False
        wrong = not_the_sum(shares, gradients)
        if wrong is not None:
            self.check.not_summed = wrong
            self.check.measure(f"the per-sample gradients of {wrong} do not sum to its gradient")
            return False
        if self.is_due(planned):
            self.check.passed(*_part_of(planned))
            self._verify(planned, parameters, parts, gradients, shares)
        return not self.check.measuring

    def form(
        self,
        planned: PlannedStep,
        parameters: Mapping[str, Tensor],
        parts: Sequence[WholeMicroBatch],
        gradients: Vectors,
    ) -> dict[str, Form]:
        """The change of the gradient by every removal that is asked for, in place of shares."""
        sets = self.asked(planned.sample_ids)
        started = time.perf_counter()
        try:
            changes, _ = self._changes(planned, parameters, parts, gradients, sets)
        except _TakesNoFewerSamples as error:
            raise ConfigurationError(
                f"{error}, and removals have to be measured, because {self.check.reason}. Let training_step take batches of any "
                "size."
            ) from error
        self._announce((time.perf_counter() - started) / max(len(sets), 1))
        return {k: Dense(rows) for k, rows in changes.items()}

    def _verify(
        self,
        planned: PlannedStep,
        parameters: Mapping[str, Tensor],
        parts: Sequence[WholeMicroBatch],
        gradients: Vectors,
        shares: Mapping[str, Form],
    ) -> None:
        """Hold what shares say of a few samples against evaluations without them."""
        record = StepRecord(
            0, planned.sample_ids, planned.loss_weights, planned.micro_batch_numbers, {}, {}, {}, planned.averaged
        )
        removed = gradient_change(record, self._counterfactual)
        chosen = self.check.choose(len(removed))
        try:
            changes, lost = self._changes(planned, parameters, parts, gradients, removed.sample_ids[chosen])
        except _TakesNoFewerSamples as error:
            self.check.unverifiable = str(error)
            return
        if lost is not None:
            self.check.unverifiable = (
                f"the training step draws random numbers that cannot be kept where a sample leaves ({lost})"
            )
            return
        totals = {
            k: torch.stack([part.gradients.get(k, torch.zeros_like(gradients[k])).flatten() for part in parts])
            for k in shares
        }
        for row, position in enumerate(chosen):
            at = slice(position, position + 1)
            predicted = {k: removed.change(s, at, totals[k])[0] for k, s in shares.items()}
            measured = {k: changes[k][row] for k in predicted}
            self.check.compare(predicted, measured, gradients, autocast=self._passes.half)

    def _changes(
        self,
        planned: PlannedStep,
        parameters: Mapping[str, Tensor],
        parts: Sequence[WholeMicroBatch],
        gradients: Vectors,
        sets: Tensor,
    ) -> tuple[Vectors, str | None]:
        """``e_z = grad L(B without z) - grad L(B)`` ``(len(sets), d)`` each, of sets by number, and of random numbers that could not be kept what
        drew them.
        """
        leaves, lost = leaves_of(parameters), set[str]()
        noted = [
            self._passes.noted_random(parameters, part.buffers, micro_batch) if part.drew else None
            for part, micro_batch in zip(parts, planned.micro_batches, strict=True)
        ]
        changes = {k: g.new_zeros(len(sets), g.numel()) for k, g in gradients.items()}
        for row, gone in enumerate(map(self._sets.members, sets.tolist())):
            left = set[str]()  # parameters with a gradient
            for number, (part, micro_batch) in enumerate(zip(parts, planned.micro_batches, strict=True)):
                in_micro_batch = planned.sample_ids[planned.micro_batch_numbers == number]
                own = torch.isin(in_micro_batch, torch.tensor(sorted(gone))).nonzero()[:, 0]
                if len(own) == 0:
                    left |= part.gradients.keys()
                    continue
                drawn = noted[number]
                random = None if drawn is None else KeptRandom(drawn, own, micro_batch.n_samples)
                less = self._without(planned, number, micro_batch, gone, own)
                rest = {} if less is None else self._rest(leaves, part, less, random)
                left |= rest.keys()
                lost |= {random.lost} if less is not None and random is not None and random.lost else set()
                for k, change in changes.items():
                    for sign, gradient in ((1, rest.get(k)), (-1, part.gradients.get(k))):
                        if gradient is not None:
                            change[row].add_(gradient.flatten(), alpha=sign)
            if left and left < gradients.keys():
                moment = planned.micro_batches[0].moment
                self.check.without_gradient.add((moment.global_step, moment.batch_idx, sets[row].item()))
        return changes, min(lost, default=None)

    def _rest(
        self, leaves: dict[str, Tensor], part: WholeMicroBatch, less: PlannedMicroBatch, random: KeptRandom | None
    ) -> Vectors:
        """Gradients of a micro-batch without a sample; with random numbers of its own, if they cannot be kept."""
        try:
            if random is not None:
                gradients = self._passes.run(leaves, part.buffers, less, drawing=random).gradients
                if random.lost is None:
                    return gradients
            return self._passes.run(leaves, part.buffers, less).gradients
        except (InfluenceError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the whole batch went through
            raise _TakesNoFewerSamples(
                f"the training step does not take a batch without one of its samples ({error})"
            ) from error

    def _without(
        self, planned: PlannedStep, number: int, micro_batch: PlannedMicroBatch, gone: frozenset[int], own: Tensor
    ) -> PlannedMicroBatch | None:
        """A micro-batch without some samples, whose rows are its ``own``; None where nothing is left of it."""
        if len(own) == micro_batch.n_samples:
            return None
        factor = micro_batch.factor
        if self._counterfactual == "zero" and planned.averaged:
            weights = planned.loss_weights[planned.micro_batch_numbers == number]
            factor *= float(1 - weights[own].sum() / weights.sum())
        if micro_batch.less is None:
            batch = without(micro_batch.batch, own, micro_batch.n_samples)
        else:
            batch = micro_batch.less(gone)
        return replace(micro_batch, batch=batch, n_samples=micro_batch.n_samples - len(own), factor=factor)

    def _announce(self, seconds: float) -> None:
        """Say once that removals are measured, and what it will take at ``seconds`` for each."""
        if not self._to_announce:
            return
        self._to_announce = False
        n = sum(len(self.asked(self._plan.sample_ids(t))) for t in range(len(self._plan)))
        if n * seconds > _LONG:
            warnings.warn(
                f"every removal is measured by running its step without the sample, because {self.check.reason}: {n} "
                f"removals, about {n * seconds:.0f} s for one pass over the run. samples= restricts it to the ones of interest.",
                stacklevel=2,
            )


def _part_of(planned: PlannedStep) -> tuple[int, int]:
    """The part of the run in which a step lies, of which one removal is verified."""
    moment = planned.micro_batches[0].moment
    return moment.epoch, moment.global_step // _EVERY
