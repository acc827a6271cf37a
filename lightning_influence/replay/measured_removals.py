"""Removals measured: a step is evaluated again without a sample, to verify its shares or to stand in for them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lightning_influence.core.removal import gradient_change
from lightning_influence.core.removal_sets import EVERY_SAMPLE, RemovalSets
from lightning_influence.core.shares import Dense, Form
from lightning_influence.core.trajectory import StepRecord, Vectors
from lightning_influence.replay.passes import Passes, leaves_of
from lightning_influence.replay.plan import Plan, PlannedMicroBatch, PlannedStep
from lightning_influence.replay.removals import RemovalCheck, not_the_sum
from lightning_influence.run.batches import without

_LONG = 10  # seconds of measuring that are announced


class MeasuredRemovals:
    """The removals of a run's samples, by evaluating its steps without them.

    Args:
        plan: of the run.
        found: what is known of the run's removals, and is added to.
        counterfactual: of the removals.
        sets: what is removed.
        announce: warn where measuring will take long.

    Attributes:
        found: what is known of the run's removals.
    """

    def __init__(
        self,
        passes: Passes,
        plan: Plan,
        found: RemovalCheck,
        *,
        counterfactual: Literal["drop", "zero"] = "drop",
        sets: RemovalSets = EVERY_SAMPLE,
        announce: bool = True,
    ) -> None:
        self._passes, self._plan, self.found, self._counterfactual = passes, plan, found, counterfactual
        self._sets = sets
        self._to_announce = announce

    def asked(self, sample_ids: Tensor) -> Tensor:
        """The sets, by number, whose removal from a step of these samples is asked for."""
        return self._sets.within(sample_ids).sets

    def agree(
        self,
        planned: PlannedStep,
        parameters: Mapping[str, Tensor],
        buffers: Sequence[Mapping[str, Tensor]],
        gradients: Vectors,
        shares: Mapping[str, Form],
    ) -> bool:
        """Whether the shares give the change of the gradient when a sample leaves: their sum at every step, removals of a
        few samples at the first.

        Args:
            buffers: before each micro-batch, and after the last.
        """
        if self.found.measuring:
            return False
        wrong = not_the_sum(shares, gradients)
        if wrong is not None:
            self.found.not_summed = wrong
            self.found.measure(f"the per-sample gradients of {wrong} do not sum to its gradient")
            return False
        if self.found.verified or self.found.unverifiable:
            return True
        if self._passes.draw(planned, parameters, buffers):
            self.found.unverifiable = (
                "the training step draws random numbers, so a step without a sample is another one"
            )
            return True
        self._verify(planned, parameters, buffers, gradients, shares)
        return not self.found.measuring

    def form(
        self,
        planned: PlannedStep,
        parameters: Mapping[str, Tensor],
        buffers: Sequence[Mapping[str, Tensor]],
        gradients: Vectors,
    ) -> dict[str, Form]:
        """The change of the gradient by every removal that is asked for, in place of shares."""
        sets = self.asked(planned.sample_ids)
        started = time.perf_counter()
        changes = self._changes(planned, parameters, buffers, gradients, sets)
        self._announce((time.perf_counter() - started) / max(len(sets), 1))
        return {k: Dense(rows) for k, rows in changes.items()}

    def _verify(
        self,
        planned: PlannedStep,
        parameters: Mapping[str, Tensor],
        buffers: Sequence[Mapping[str, Tensor]],
        gradients: Vectors,
        shares: Mapping[str, Form],
    ) -> None:
        """Hold what shares say of the first, the middle and the last sample against evaluations without them."""
        record = StepRecord(
            0, planned.sample_ids, planned.loss_weights, planned.micro_batch_numbers, {}, {}, {}, planned.averaged
        )
        removed = gradient_change(record, self._counterfactual)
        chosen = sorted({0, len(removed) // 2, len(removed) - 1})
        measured = self._changes(planned, parameters, buffers, gradients, removed.sample_ids[chosen])
        totals = {k: removed.totals(s, gradients[k].flatten()) for k, s in shares.items()}
        for row, position in enumerate(chosen):
            at = slice(position, position + 1)
            predicted = {k: removed.change(s, at, totals[k])[0] for k, s in shares.items()}
            self.found.compare(
                predicted, {k: measured[k][row] for k in predicted}, gradients, autocast=self._passes.half
            )

    def _changes(
        self,
        planned: PlannedStep,
        parameters: Mapping[str, Tensor],
        buffers: Sequence[Mapping[str, Tensor]],
        gradients: Vectors,
        sets: Tensor,
    ) -> Vectors:
        """``e_z = grad L(B without z) - grad L(B)`` ``(len(sets), d)`` each, of sets by number."""
        leaves = leaves_of(parameters)
        rows: list[Vectors] = []
        for gone in map(self._sets.members, sets.tolist()):
            change = {k: torch.zeros_like(g) for k, g in gradients.items()}
            for number, micro_batch in enumerate(planned.micro_batches):
                if gone.isdisjoint(planned.sample_ids[planned.micro_batch_numbers == number].tolist()):
                    continue
                evaluate = partial(self._passes.run, leaves, buffers[number])
                whole = evaluate(micro_batch).gradients
                less = self._without(planned, number, micro_batch, gone)
                rest = {} if less is None else evaluate(less).gradients
                for k, total in change.items():
                    total += rest.get(k, 0.0) - whole.get(k, 0.0)  # type: ignore[operator]
            rows.append({k: c.flatten() for k, c in change.items()})
        if not rows:
            return {k: g.new_zeros(0, g.numel()) for k, g in gradients.items()}
        return {k: torch.stack([row[k] for row in rows]) for k in gradients}

    def _without(
        self, planned: PlannedStep, number: int, micro_batch: PlannedMicroBatch, gone: frozenset[int]
    ) -> PlannedMicroBatch | None:
        """A micro-batch without some samples; None where nothing is left of it."""
        here = planned.micro_batch_numbers == number
        own = torch.isin(planned.sample_ids[here], torch.tensor(sorted(gone))).nonzero()[:, 0]
        if len(own) == micro_batch.n_samples:
            return None
        factor = micro_batch.factor
        if self._counterfactual == "zero" and planned.averaged:
            weights = planned.loss_weights[here]
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
                f"every removal is measured by running its step without the sample, because {self.found.reason}: {n} "
                f"removals, about {n * seconds:.0f} s for one pass over the run. samples= restricts it to the ones of interest.",
                stacklevel=2,
            )
