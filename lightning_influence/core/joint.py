"""What leaves together is answered together: the optimizer's response to the removal of a group from all of its steps.

A single sample leaves few steps, and what that changes in the optimizer's moments is followed through a window
(`response.finite_response`). A group leaves most of them, and its changes add up in the moments for as long as they remember,
which the second ones do for a thousand steps. So the changed moments of a group are carried along the whole run instead: once
forward, to know them at some steps, and from those again on the way back, where the adjoints are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lightning_influence.core.optimizers import Moments, ParameterStep
from lightning_influence.core.removal import consumed_change, gradient_change
from lightning_influence.core.removal_sets import RemovalSets
from lightning_influence.core.scores import RowScores
from lightning_influence.core.shares import sample_chunks
from lightning_influence.core.trajectory import StepRecord, Trajectory, Vectors, extrapolation

_CHUNK_ELEMENTS = 2**17  # of one dense block of changed gradients


class JointResponse:
    """The response to the removal of groups, step by step.

    Per step it is ``U . (u(m', v') - u(m, v))``: the adjoint after the step, and the update that the optimizer makes of the
    changed moments minus the one that it made. The moments being functions of the gradients alone, theirs are exact while
    the gradients of what is left are; what the changed parameters do to those is carried by the adjoint.

    Args:
        groups: sets of which the groups are removed.
        counterfactual: as of `removal.gradient_change`.
        recorded: the steps of a record, by parameter.
        moves: filled, where given, with the sum of these changes of the update, ``(n_groups, d)`` each: how far the removal of a
            group moves the parameters by itself.
        progress: show a bar where the walk forward takes longer than two seconds.
    """

    def __init__(
        self,
        trajectory: Trajectory,
        groups: RemovalSets,
        counterfactual: str,
        recorded: Callable[[StepRecord], dict[str, ParameterStep]],
        *,
        moves: Vectors | None = None,
        progress: bool = True,
    ) -> None:
        self._moves = moves
        if moves is not None:
            moves.clear()  # of a walk that went astray
        self._trajectory, self._groups, self._recorded = trajectory, groups, recorded
        self._counterfactual, self._scales = counterfactual, extrapolation(trajectory.sizes)
        self._n = len(groups.groups)
        self._moments: dict[int, dict[str, Moments]] = {}  # changed ones at the anchors
        self.anchors = _spread(trajectory.starts, len(trajectory))
        moments: dict[str, Moments] = {}
        steps = range(self.anchors[-1] if self.anchors else 0)
        for index in tqdm(steps, desc="groups, forward", unit="step", delay=2, disable=not progress):
            if index in self.anchors:
                self._moments[index] = moments
            moments = self._after(index, moments)
        for anchor in self.anchors[-1:]:
            self._moments[anchor] = moments

    def rows(self, anchor: int, after: Sequence[Vectors], tangents: Sequence[RowScores]) -> RowScores:
        """Scores of the steps from an anchor on.

        Args:
            after: ``(q, d)`` each, the adjoint of the parameters after every step.
            tangents: of every step, the first-order scores of the groups of which it holds something.
        """
        moments, blocks = self._moments.pop(anchor), []
        for index, (adjoints, tangent) in enumerate(zip(after, tangents, strict=True), anchor):
            response = torch.zeros(tangent.n_queries, self._n)
            moments = self._after(index, moments, adjoints, response)
            first = torch.zeros(self._n, tangent.n_queries)
            first[-1 - tangent.sample_ids] = tangent.tangent.to(first)
            steps = torch.full((self._n,), index)
            blocks.append(RowScores(-1 - torch.arange(self._n), steps, response.T.contiguous(), first))
        return RowScores.joined(blocks, blocks[0].n_queries)

    def _after(
        self,
        index: int,
        moments: dict[str, Moments],
        adjoints: Vectors | None = None,
        response: Tensor | None = None,
    ) -> dict[str, Moments]:
        """The changed moments ``(n_groups, d)`` after a step.

        Args:
            adjoints, response: where given, the adjoints' products with the changes of the parameters' updates are added to
                the response ``(q, n_groups)``.
        """
        record, shares = self._trajectory.record(index), self._trajectory.shares(index)
        removed = gradient_change(record, self._counterfactual, self._groups)  # type: ignore[arg-type]
        held = -1 - removed.sample_ids  # groups of which the step holds something, ascending
        whole = {k: sample_chunks(len(held), s.n_coordinates, _CHUNK_ELEMENTS) for k, s in shares.items()}
        consumed = consumed_change(removed, record, shares, self._scales, whole)
        new = dict(moments)
        for name, step in self._recorded(record).items():
            totals = removed.totals(shares[name], record.gradients[name])
            sign = -1.0 if step.hyper["maximize"] else 1.0
            parts: list[Moments] = []
            for part in sample_chunks(self._n, len(step.gradient), _CHUNK_ELEMENTS):
                a, b, _ = part.indices(self._n)
                gradient = step.gradient.repeat(b - a, 1)
                sets = slice(*torch.searchsorted(held, torch.tensor([a, b])).tolist())
                if sets.start < sets.stop:
                    removal = consumed.change(record.gradients[name], shares[name], sets, totals)
                    gradient[held[sets] - a] += sign * removal.to(gradient)
                before = self._before(moments.get(name), step, slice(a, b))
                delta, after = step.update.apply(before, gradient, step.hyper)
                parts.append(tuple(m.cpu() for m in after))
                if adjoints is not None and response is not None:
                    change = delta - step.taken[0]
                    response[:, a:b] += (adjoints[name].to(delta) @ change.T).to(response)
                    if self._moves is not None:
                        moved = self._moves.setdefault(name, torch.zeros(self._n, change.shape[1]))
                        moved[a:b] += change.to(moved)
            new[name] = tuple(torch.cat(column) for column in zip(*parts, strict=True))
        return new

    def _before(self, moments: Moments | None, step: ParameterStep, groups: slice) -> Moments:
        """Changed moments of some groups; the recorded ones where the parameter has not been stepped before."""
        if moments is None:
            return tuple(m.expand(groups.stop - groups.start, -1) for m in step.moments)
        return tuple(m[groups].to(step.gradient) for m in moments)


def _spread(starts: Sequence[int], n: int) -> list[int]:
    """Those of some steps that lie about the square root of their number apart, the first among them."""
    positions: list[int] = []
    for start in starts:
        if start < n and (not positions or start - positions[-1] >= math.isqrt(n)):
            positions.append(start)
    return positions
