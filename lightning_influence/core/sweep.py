"""The backward sweep: from the gradient of the queries to a score for every (sample, step).

One walk serves post-hoc attribution (a whole run), look-ahead selection (a short roll-out) and the
SGD baseline (another update rule). Its cost is linear in the number of steps (docs/method.md, "The sweep").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from tqdm.auto import tqdm

from lightning_influence.core.adjoint import Adjoint, adjoint, gradient_adjoint, join_adjoints
from lightning_influence.core.clipping import clip_adjoint
from lightning_influence.core.curvature import CURVATURES, Curvature
from lightning_influence.core.fused import pays
from lightning_influence.core.joint import JointResponse
from lightning_influence.core.optimizers import UPDATES, Moments, ParameterStep, Update, effective_gradient, join
from lightning_influence.core.pieces import Pieces
from lightning_influence.core.removal import consumed_change, consumed_gradients, gradient_change
from lightning_influence.core.removal_sets import EVERY_SAMPLE, RemovalSets
from lightning_influence.core.response import finite_response
from lightning_influence.core.scores import RowScores
from lightning_influence.core.shares import sample_chunks
from lightning_influence.core.trajectory import Hyper, Shares, StepRecord, Trajectory, Vectors, extrapolation
from lightning_influence.core.window import Block, StepRemovals, Window, blocks_of
from lightning_influence.errors import ConfigurationError, check_choice

RESPONSES = ("finite", "tangent")

_CHUNK_ELEMENTS = 2**15  # of one dense block of per-sample gradients: what a processor's cache holds
_LARGE_ELEMENTS = 2**17  # of one that a single kernel reads, once, or that many queries are multiplied with


@dataclass(frozen=True)
class Method:
    """Which estimator a sweep evaluates (docs/method.md).

    Example:
        >>> Method(curvature="hessian", memory_window=4).response
        'finite'
        >>> Method(curvature="kfac")
        Traceback (most recent call last):
            ...
        lightning_influence.errors.ConfigurationError: curvature='kfac'; choose one of none, fisher, gauss_newton, hessian
    """

    curvature: Literal["none", "fisher", "gauss_newton", "hessian"] = "fisher"
    response: Literal["finite", "tangent"] = "finite"
    memory_window: int = 8
    counterfactual: Literal["drop", "zero"] = "drop"
    optimizer_assumption: Literal["sgd"] | None = None
    """None: the optimizer that trained; ``"sgd"``: the usual assumption of earlier methods, as a baseline."""

    def __post_init__(self) -> None:
        for name, value, known in (
            ("curvature", self.curvature, tuple(CURVATURES)),
            ("response", self.response, RESPONSES),
            ("optimizer_assumption", self.optimizer_assumption, (None, "sgd")),
        ):
            check_choice(name, value, known)
        if self.memory_window < 0:
            raise ConfigurationError(f"memory_window={self.memory_window}; it counts steps and cannot be negative")

    @property
    def hessian(self) -> Curvature:
        """What stands for the Hessian."""
        return CURVATURES[self.curvature]


Adjoints = dict[str, Adjoint]


def sweep(
    trajectory: Trajectory,
    queries: Vectors,
    method: Method = Method(),
    *,
    sets: RemovalSets = EVERY_SAMPLE,
    scored: range | None = None,
    window_in_files: bool = False,
    moves: Vectors | None = None,
    passed: Callable[[], None] | None = None,
    progress: bool = True,
) -> RowScores:
    """Walk a trajectory backwards and score every sample of every step, or other sets of samples.

    Args:
        trajectory: the run.
        queries: ``(q, d)`` each, gradients of the queries at the parameters after the last step, on
            the kept coordinates (`Trajectory.select`).
        sets: what is removed; a row is of one set and one step, and its sample id the set's number.
        scored: the steps to score; all by default. The walk ends at the first of them.
        window_in_files: keep the steps of the memory window in files, where there is no memory for them.
        moves: filled, where given, with how far the removal of each group moves the parameters by itself, ``(n_groups, d)`` each,
            where the response is finite.
        passed: called after each step.
        progress: show a bar where the walk takes longer than two seconds.

    Raises:
        ConfigurationError: groups, and not all steps to score.
    """
    scored = range(len(trajectory)) if scored is None else scored
    if sets.groups and scored != range(len(trajectory)):
        raise ConfigurationError("groups are removed from the whole run; score all of its steps.")
    pieces = Pieces(trajectory)
    length = window_length(pieces, method)
    window = Window(_update(pieces, method), length, in_files=window_in_files)
    walk = _Walk(pieces, method, pieces.cut(queries), window, sets, scored=len(scored))
    groups = _Groups(walk, moves, progress=progress) if sets.groups else None
    blocks, of_groups = [], list[RowScores]()
    last = min(scored, default=len(trajectory))
    for index in tqdm(
        range(len(trajectory) - 1, last - 1, -1),
        desc="backward sweep",
        unit="step",
        delay=2,
        disable=not progress,
    ):
        if groups is not None:
            groups.before()
        block = walk.back(index, score=index in scored, last=index == last)
        if block is not None:
            blocks.append(block)
        if groups is not None:
            of_groups += groups.passed(index)
        if passed is not None:
            passed()
    if moves is not None:
        whole = pieces.joined({piece: moves[piece] for piece in pieces.sizes if piece in moves})
        moves.clear()
        moves.update(whole)
    return RowScores.joined([*blocks[::-1], *of_groups[::-1]], walk.n_queries)


@dataclass(frozen=True)
class Passed:
    """What a walk without scores keeps of a step that it has passed.

    Attributes:
        after: adjoint of the optimizer state after the step.
        gradient: ``(q, d)`` each, adjoint of the batch gradient before clipping.
    """

    after: Adjoints
    gradient: Vectors


def walk_back(trajectory: Trajectory, queries: Vectors, method: Method) -> dict[int, Passed]:
    """The adjoints of every step, without scores; memory grows with the number of steps."""
    walk = _Walk(trajectory, method, queries)
    passed = {}
    for index in range(len(trajectory) - 1, -1, -1):
        after = dict(walk.adjoints)
        walk.back(index, score=False)
        passed[index] = Passed(after, walk.gradient)
    return passed


def _update(trajectory: Trajectory, method: Method) -> Update:
    return UPDATES[method.optimizer_assumption or trajectory.optimizer]


def window_length(trajectory: Trajectory, method: Method) -> int:
    """Steps that a finite response runs through, the step itself included; none for a tangent."""
    window = method.memory_window if _update(trajectory, method).moments else 0
    return min(window + 1, len(trajectory)) if method.response == "finite" else 0


def gradient_adjoints(
    trajectory: Trajectory, queries: Vectors, method: Method, *, first: int = 0, progress: bool = True
) -> Iterator[tuple[int, Vectors]]:
    """The adjoints ``(q, d)`` of the batch gradient before clipping, by parameter, from the last step back to ``first``."""
    walk = _Walk(trajectory, method, queries)
    steps = range(len(trajectory) - 1, first - 1, -1)
    for index in tqdm(steps, desc="backward sweep", unit="step", delay=2, disable=not progress):
        walk.back(index, score=False, last=index == first)
        yield index, walk.gradient


class _Walk:
    """The adjoint state of a sweep, moved back one step at a time.

    Attributes:
        adjoints: of the optimizer state after the steps that are still to come.
        gradient: ``(q, d)`` each, adjoint of the batch gradient before clipping of the newest step.
        together: first-order scores of its groups; None where there are no groups.
    """

    def __init__(
        self,
        trajectory: Trajectory,
        method: Method,
        queries: Vectors,
        window: Window | None = None,
        sets: RemovalSets = EVERY_SAMPLE,
        scored: int = 0,
    ) -> None:
        steps = scored * (window.length if window is not None else 0)
        self._evaluations = steps * sum(kept for kept, _ in trajectory.sizes.values())  # of a step, for each sample
        self.trajectory, self.method, self.window = trajectory, method, window
        self.alone, self.groups = sets.alone, sets.together
        self.together: RowScores | None = None
        self.update = _update(trajectory, method)
        self.scales = extrapolation(trajectory.sizes)
        self.n_queries = next(iter(queries.values())).shape[0]
        self.adjoints: Adjoints = {k: Adjoint(q) for k, q in queries.items()}
        self.gradient: Vectors = {}

    def back(self, index: int, *, score: bool, last: bool = False) -> RowScores | None:
        """Move from after step ``index`` to before it, unless it is the last; the step's scores where asked for."""
        record, shares = self.trajectory.record(index), self.trajectory.shares(index)
        # a mode of torch's that watches the module (`run.unchanged`) has nothing to see here
        with _disable_current_modes():
            products, rows = self._pass(record, shares, score=score, last=last)
        if not last:
            curved = self.method.hessian.product(self.trajectory, record, shares, self.gradient, products)
            for k, b in curved.items():
                self.adjoints[k].parameter.add_(b)  # a tensor that `_pull` has made
        return rows

    def _pass(
        self, record: StepRecord, shares: Mapping[str, Shares], *, score: bool, last: bool
    ) -> tuple[Tensor, RowScores | None]:
        """What of a step needs no module: inner products ``(q, n)`` of its gradient's adjoint with the shares, and scores."""
        # a parameter without a gradient was skipped by the optimizer: its adjoint stays as it is
        recorded = self.recorded(record)
        if self.window is not None and self.window.length:
            self.window.push(recorded, self.adjoints)
        pulled = self._pull_gradient(recorded) if last else self._pull(recorded)
        self.gradient = clip_adjoint(record.clip, record.gradients, pulled, self.scales)
        products = torch.zeros(self.n_queries, len(record.sample_ids))
        if score or self.method.hessian.of_shares:
            products = sum_inner(shares, self.gradient)
        rows = self._score(record, shares, products) if score else None
        if self.groups.groups:
            self.together = self._first_order(record, products)
        return products, rows

    def _pull(self, recorded: Mapping[str, ParameterStep]) -> Vectors:
        """Move the adjoints to before a step, its gradient held fixed; the adjoint of its consumed gradient."""
        gradients = Vectors()
        for block in _blocks(recorded):
            before, gradient = adjoint(*self._joined(recorded, block))
            sizes = [len(recorded[name].gradient) for name in block]
            parts = zip(before.parameter.split(sizes, 1), *(m.split(sizes, 1) for m in before.moments), strict=True)
            for name, (parameter, *moments) in zip(block, parts, strict=True):
                self.adjoints[name] = Adjoint(parameter, tuple(moments))
            gradients |= dict(zip(block, gradient.split(sizes, 1), strict=True))
        return gradients

    def _pull_gradient(self, recorded: Mapping[str, ParameterStep]) -> Vectors:
        """The adjoint of a step's consumed gradient alone, by parameter."""
        gradients = Vectors()
        for block in _blocks(recorded):
            sizes = [len(recorded[name].gradient) for name in block]
            parts = gradient_adjoint(*self._joined(recorded, block)).split(sizes, 1)
            gradients |= dict(zip(block, parts, strict=True))
        return gradients

    def _joined(self, recorded: Mapping[str, ParameterStep], block: Block) -> tuple[ParameterStep, Adjoint]:
        return join([recorded[name] for name in block]), join_adjoints([self.adjoints[name] for name in block])

    def _first_order(self, record: StepRecord, products: Tensor) -> RowScores:
        """Tangent scores of the groups of which a step holds something."""
        removed = gradient_change(record, self.method.counterfactual, self.groups)
        scores = removed.inner(products).T.cpu()
        return RowScores(removed.sample_ids, torch.full_like(removed.sample_ids, record.index), scores, scores)

    def recorded(self, record: StepRecord) -> dict[str, ParameterStep]:
        """The step as the optimizer took it, or is assumed to have, by parameter."""
        if self.method.optimizer_assumption == "sgd":  # theta' = theta - lr g, nothing else
            plain = {"weight_decay": 0.0, "decoupled": 1.0}
            hyper: dict[str, Hyper] = {k: {**h, **plain} for k, h in record.hyper.items()}
            moments: dict[str, Moments] = dict.fromkeys(record.gradients, ())
        else:
            hyper, moments = dict(record.hyper), record.moments
        consumed, parameters = consumed_gradients(record), record.parameters or {}
        return {
            k: ParameterStep(self.update, moments[k], effective_gradient(g, parameters.get(k), hyper[k]), hyper[k])
            for k, g in consumed.items()
        }

    def _score(self, record: StepRecord, shares: Mapping[str, Shares], products: Tensor) -> RowScores:
        removed = gradient_change(record, self.method.counterfactual, self.alone)
        if not len(removed):
            return RowScores.joined([], self.n_queries)
        tangent = removed.inner(products)
        scores, interaction = tangent, torch.zeros_like(tangent)
        if self.method.response == "finite":
            chunks = {k: sample_chunks(len(removed), s.n_coordinates, _CHUNK_ELEMENTS) for k, s in shares.items()}
            consumed = consumed_change(removed, record, shares, self.scales, chunks)
            own = StepRemovals(consumed, record.gradients, shares)
            scores = torch.zeros_like(tangent)
            again = self._again(removed.sample_ids)
            assert self.window is not None
            for block in self.window.blocks():
                scores += self._finite(own, block, scores)
                if len(again):
                    interaction[:, again] += self._together(own, block, again, scores)
            if self._earlier(record.index, removed.sample_ids):
                self.window.steps[0].removals = own
        steps = torch.full_like(removed.sample_ids, record.index)
        return RowScores(removed.sample_ids.cpu(), steps.cpu(), *(x.T.cpu() for x in (scores, tangent, interaction)))

    def _finite(self, own: StepRemovals, block: Block, like: Tensor) -> Tensor:
        """Finite response ``(q, u)`` of a block of parameters, over the window of the newest passed step; in the precision
        and on the device of ``like``.
        """
        removed = own.consumed.before_clipping
        scores = torch.zeros_like(like)
        names = [name for name in block if name in own.shares]
        if not names:
            return scores
        assert self.window is not None
        window, after, closing, _ = self.window.of(tuple(names))
        size = sum(own.shares[name].n_coordinates for name in names)
        totals = {k: removed.totals(own.shares[k], own.gradients[k]) for k in names}
        fuse = self.window.length if pays(self._evaluations * len(removed)) else None
        # many queries are multiplied with a block of several samples at once
        elements, least = (_LARGE_ELEMENTS, 2) if fuse is not None or self.n_queries > 1 else (_CHUNK_ELEMENTS, 1)
        for samples in sample_chunks(len(removed), size, elements, least=least):
            parts = [own.consumed.change(own.gradients[k], own.shares[k], samples, totals[k]) for k in names]
            scores[:, samples] = finite_response(window, after, closing, torch.cat(parts, 1), fuse=fuse).to(scores)
        return scores

    def _together(self, own: StepRemovals, block: Block, again: Tensor, like: Tensor) -> Tensor:
        """What the later removals of some samples, by position, add to the response ``(q, n)`` to their removal here."""
        added = like.new_zeros(len(like), len(again))
        names = [name for name in block if name in own.shares]
        if not names:
            return added
        assert self.window is not None
        window, after, closing, passed = self.window.of(tuple(names))
        size = sum(own.shares[name].n_coordinates for name in names)
        for part in sample_chunks(len(again), size, _CHUNK_ELEMENTS):
            ids = own.consumed.before_clipping.sample_ids[again[part]]
            change = own.of(names, ids)
            later = [None if p.removals is None else p.removals.of(names, ids) for p in passed]
            assert change is not None
            joint = finite_response(window, after, closing, change, later)
            added[:, part] = (joint - finite_response(window, after, closing, change)).to(added)
        return added

    def _again(self, sample_ids: Tensor) -> Tensor:
        """Positions of the samples that later steps of the window hold, too."""
        assert self.window is not None
        later = [
            p.removals.consumed.before_clipping.sample_ids
            for p in list(self.window.steps)[1:]
            if p.removals is not None
        ]
        return torch.isin(sample_ids, torch.cat(later)).nonzero()[:, 0] if later else torch.zeros(0, dtype=torch.int64)

    def _earlier(self, index: int, sample_ids: Tensor) -> bool:
        """Whether a step in whose window this one lies holds one of the samples."""
        assert self.window is not None
        reach = range(max(0, index + 1 - self.window.length), index)
        return any(bool(torch.isin(self.trajectory.sample_ids(t), sample_ids).any()) for t in reach)


class _Groups:
    """The rows of groups, as the walk passes their steps."""

    def __init__(self, walk: _Walk, moves: Vectors | None, *, progress: bool) -> None:
        self._walk, method = walk, walk.method
        self._joint = None
        if method.response == "finite":
            self._joint = JointResponse(
                walk.trajectory, walk.groups, method.counterfactual, walk.recorded, moves=moves, progress=progress
            )
        self._after: list[Vectors] = []  # adjoints of the parameters after each step, newest first, as the tangents
        self._tangents: list[RowScores] = []

    def before(self) -> None:
        """The walk is about to pass a step: what it then forgets of the time after it."""
        if self._joint is not None:
            self._after.insert(0, {k: a.parameter for k, a in self._walk.adjoints.items()})

    def passed(self, index: int) -> list[RowScores]:
        """The walk has passed a step; the rows that can be told now."""
        assert self._walk.together is not None
        if self._joint is None:
            return [self._walk.together]
        self._tangents.insert(0, self._walk.together)
        if index not in self._joint.anchors:
            return []
        rows = self._joint.rows(index, self._after, self._tangents)
        self._after, self._tangents = [], []
        return [rows]


def sum_inner(shares: Mapping[str, Shares], vectors: Vectors) -> Tensor:
    """Inner products ``(q, n)`` of vectors and per-sample shares over all parameters."""
    return torch.stack([share.inner(vectors[name]) for name, share in shares.items()]).sum(0)


def _blocks(recorded: Mapping[str, ParameterStep]) -> list[Block]:
    return blocks_of([{k: r.hyper for k, r in recorded.items()}], {k: len(r.gradient) for k, r in recorded.items()})
