"""The backward sweep: from the gradient of the queries to a score for every (sample, step).

One walk serves post-hoc attribution (a whole run), look-ahead selection (a short roll-out) and the
SGD baseline (another update rule). Its cost is linear in the number of steps (method.md section 3).
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lightning_influence.core.adjoint import Adjoint, adjoint, gradient_adjoint, join_adjoints
from lightning_influence.core.clipping import clip_adjoint
from lightning_influence.core.curvature import CURVATURES, fisher_product
from lightning_influence.core.fused import pays
from lightning_influence.core.optimizers import UPDATES, Moments, RecordedStep, effective_gradient, join
from lightning_influence.core.removal import ConsumedChange, consumed_change, consumed_gradients, removal
from lightning_influence.core.response import finite_response
from lightning_influence.core.scores import RowScores
from lightning_influence.core.trajectory import Hyper, Shares, StepRecord, Trajectory, Vectors, extrapolation
from lightning_influence.errors import ConfigurationError, CurvatureUnavailable

RESPONSES = ("finite", "tangent")

_CHUNK_ELEMENTS = 2**15  # of one dense block of per-sample gradients: what a processor's cache holds
_LARGE_ELEMENTS = 2**17  # of one that a single kernel reads, once, or that many queries are multiplied with
_JOINED_COORDINATES = 2**14  # of a parameter that is joined with others


@dataclass(frozen=True)
class Method:
    """Which estimator a sweep evaluates (method.md sections 3 to 6).

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
    optimizer: Literal["sgd"] | None = None
    """None: the optimizer that trained; ``"sgd"``: the assumption that the paper refutes."""

    def __post_init__(self) -> None:
        for name, value, known in (
            ("curvature", self.curvature, CURVATURES),
            ("response", self.response, RESPONSES),
            ("optimizer_assumption", self.optimizer, (None, "sgd")),
        ):
            if value not in known:
                raise ConfigurationError(f"{name}={value!r}; choose one of {', '.join(map(str, known))}")
        if self.memory_window < 0:
            raise ConfigurationError(f"memory_window={self.memory_window}; it counts steps and cannot be negative")


Adjoints = dict[str, Adjoint]
Block: TypeAlias = tuple[str, ...]


def sweep(
    trajectory: Trajectory,
    queries: Vectors,
    method: Method = Method(),
    *,
    scored: range | None = None,
    progress: bool = True,
) -> RowScores:
    """Walk a trajectory backwards and score every sample of every step.

    Args:
        trajectory: the run.
        queries: ``(q, d)`` each, gradients of the queries at the parameters after the last step, on
            the kept coordinates (`Trajectory.select`).
        scored: the steps to score; all by default. The walk ends at the first of them.
        progress: show a bar where the walk takes longer than two seconds.
    """
    scored = range(len(trajectory)) if scored is None else scored
    walk = _Walk(trajectory, method, queries, scored=len(scored))
    blocks = []
    last = min(scored, default=len(trajectory))
    for index in tqdm(
        range(len(trajectory) - 1, last - 1, -1),
        desc="backward sweep",
        unit="step",
        delay=2,
        disable=not progress,
    ):
        block = walk.back(index, score=index in scored, last=index == last)
        if block is not None:
            blocks.append(block)
    return RowScores.joined(blocks[::-1], walk.n_queries)


@dataclass(frozen=True)
class StepRemovals:
    """The changes of a step's consumed gradient by the removal of each of its samples."""

    consumed: ConsumedChange
    gradients: Vectors
    shares: Mapping[str, Shares]

    def of(self, names: Sequence[str], sample_ids: Tensor) -> Tensor | None:
        """Changes ``(n, d)`` of some parameters end to end; zero for samples that the step does not hold, None if all."""
        position = {z: i for i, z in enumerate(self.consumed.removal.sample_ids.tolist())}
        held = [i for i, z in enumerate(sample_ids.tolist()) if z in position]
        if not held:
            return None
        own = torch.tensor([position[int(sample_ids[i])] for i in held])
        parts = []
        for name in names:
            gradient, share = self.gradients[name], self.shares[name]
            totals = self.consumed.removal.totals(share, gradient)
            rows = self.consumed.change(gradient, share, own, totals)
            parts.append(
                rows.new_zeros(len(sample_ids), rows.shape[1]).index_copy_(0, torch.tensor(held).to(rows.device), rows)
            )
        return torch.cat(parts, 1)


@dataclass
class Passed:
    """What is kept of a step that the walk has passed.

    Attributes:
        recorded: the step itself, by parameter.
        after: adjoint of the optimizer state after the step.
        gradient: ``(q, d)`` each, adjoint of the batch gradient before clipping; empty where only scores are asked for.
        removals: of its samples, where an earlier step of the window holds one of them, too.
    """

    recorded: dict[str, RecordedStep]
    after: Adjoints
    gradient: Vectors
    removals: StepRemovals | None = None
    _joined: dict[Block, tuple[RecordedStep, Adjoint]] = field(default_factory=dict)

    def of(self, block: Block) -> tuple[RecordedStep, Adjoint]:
        """Step and adjoint of a block of parameters, end to end."""
        if block not in self._joined:
            step = join([self.recorded[name] for name in block])
            joined = join_adjoints([self.after[name] for name in block])
            self._joined[block] = step, joined
            start = 0
            for name in block:  # parts of the whole from here on, so that nothing is held twice
                size = len(self.recorded[name].gradient)
                self.after[name] = joined.at(slice(start, start + size))
                start += size
        return self._joined[block]


def blocks_of(steps: Sequence[Mapping[str, RecordedStep]]) -> list[Block]:
    """Parameters that can go through the elementwise algebra end to end: they took the same steps with the
    same hyperparameters. Only small ones are joined; large ones would be copied for nothing.
    """
    alike: dict[Any, list[str]] = {}
    blocks: list[Block] = []
    for name, recorded in steps[0].items():
        if len(recorded.gradient) > _JOINED_COORDINATES:
            blocks.append((name,))
        else:
            key = tuple(tuple(s[name].hyper.items()) if name in s else None for s in steps)
            alike.setdefault(key, []).append(name)
    return blocks + [tuple(names) for names in alike.values()]


def walk_back(trajectory: Trajectory, queries: Vectors, method: Method) -> dict[int, Passed]:
    """The adjoints of every step, without scores; memory grows with the number of steps."""
    walk = _Walk(trajectory, method, queries, memory=len(trajectory))
    for index in range(len(trajectory) - 1, -1, -1):
        walk.back(index, score=False)
    return dict(enumerate(walk.passed))


class _Walk:
    """The adjoint state of a sweep, moved back one step at a time."""

    def __init__(
        self, trajectory: Trajectory, method: Method, queries: Vectors, memory: int | None = None, scored: int = 0
    ) -> None:
        self.trajectory, self.method = trajectory, method
        self.update = UPDATES[method.optimizer or trajectory.optimizer]
        self.scales = extrapolation(trajectory.sizes)
        self.n_queries = next(iter(queries.values())).shape[0]
        self.adjoints: Adjoints = {k: Adjoint(q) for k, q in queries.items()}
        self.keeps = memory is not None
        if memory is None:
            window = method.memory_window if self.update.moments else 0
            memory = window + 1 if method.response == "finite" else 0
        self.passed: deque[Passed] = deque(maxlen=memory)  # newest first: steps t, t+1, ...
        self.per_sample = scored * memory * sum(kept for kept, _ in trajectory.sizes.values())  # evaluations of a step

    def back(self, index: int, *, score: bool, last: bool = False) -> RowScores | None:
        """Move from after step ``index`` to before it, unless it is the last; the step's scores where asked for."""
        record, shares = self.trajectory.record(index), self.trajectory.shares(index)
        # a parameter without a gradient was skipped by the optimizer: its adjoint stays as it is
        passed = Passed(self._recorded(record), dict(self.adjoints), {})
        before, pulled = ({}, _pull_gradient(passed)) if last else _pull(passed)
        gradient = clip_adjoint(record.clip, record.gradients, pulled, self.scales)
        if self.keeps:
            passed.gradient = gradient
        self.passed.appendleft(passed)
        products = torch.zeros(self.n_queries, len(record.sample_ids))
        if score or self.method.curvature == "fisher":
            products = sum_inner(shares, gradient)
        rows = self._score(record, shares, products) if score else None
        if last:
            return rows
        bent = self._curvature(record, shares, gradient, products)
        self.adjoints = {
            **self.adjoints,
            **{k: replace(a, parameter=a.parameter + bent[k]) if k in bent else a for k, a in before.items()},
        }
        return rows

    def _recorded(self, record: StepRecord) -> dict[str, RecordedStep]:
        if self.method.optimizer == "sgd":  # theta' = theta - lr g, nothing else
            plain = {"weight_decay": 0.0, "decoupled": 1.0}
            hyper: dict[str, Hyper] = {k: {**h, **plain} for k, h in record.hyper.items()}
            moments: dict[str, Moments] = dict.fromkeys(record.gradients, ())
        else:
            hyper, moments = dict(record.hyper), record.moments
        consumed, parameters = consumed_gradients(record), record.parameters or {}
        return {
            k: RecordedStep(self.update, moments[k], effective_gradient(g, parameters.get(k), hyper[k]), hyper[k])
            for k, g in consumed.items()
        }

    def _score(self, record: StepRecord, shares: Mapping[str, Shares], products: Tensor) -> RowScores:
        removed = removal(record, self.method.counterfactual)
        tangent = removed.inner(products)
        scores, interaction = tangent, torch.zeros_like(tangent)
        if self.method.response == "finite":
            chunks = {k: sample_chunks(len(removed), s.n_coordinates) for k, s in shares.items()}
            consumed = consumed_change(removed, record, shares, self.scales, chunks)
            own = StepRemovals(consumed, record.gradients, shares)
            scores = torch.zeros_like(tangent)
            again = self._again(removed.sample_ids)
            for block in blocks_of([p.recorded for p in self.passed]):
                scores += self._finite(own, block, scores)
                if len(again):
                    interaction[:, again] += self._together(own, block, again, scores)
            if self._earlier(record.index, removed.sample_ids):
                self.passed[0].removals = own
        steps = torch.full_like(removed.sample_ids, record.index)
        return RowScores(removed.sample_ids.cpu(), steps.cpu(), *(x.T.cpu() for x in (scores, tangent, interaction)))

    def _finite(self, own: StepRemovals, block: Block, like: Tensor) -> Tensor:
        """Finite response ``(q, u)`` of a block of parameters, over the window of the newest passed step; in the precision
        and on the device of ``like``.
        """
        removed = own.consumed.removal
        scores = torch.zeros_like(like)
        names = [name for name in block if name in own.shares]
        if not names:
            return scores
        window, after, closing, _ = self._window(names)
        size = sum(own.shares[name].n_coordinates for name in names)
        totals = {k: removed.totals(own.shares[k], own.gradients[k]) for k in names}
        length = self.passed.maxlen if pays(self.per_sample * len(removed)) else None
        large = length is not None or self.n_queries > 1
        for samples in sample_chunks(len(removed), size, large=large):
            parts = [own.consumed.change(own.gradients[k], own.shares[k], samples, totals[k]) for k in names]
            scores[:, samples] = finite_response(window, after, closing, torch.cat(parts, 1), fuse=length).to(scores)
        return scores

    def _together(self, own: StepRemovals, block: Block, again: Tensor, like: Tensor) -> Tensor:
        """What the later removals of some samples, by position, add to the response ``(q, n)`` to their removal here."""
        added = like.new_zeros(len(like), len(again))
        names = [name for name in block if name in own.shares]
        if not names:
            return added
        window, after, closing, passed = self._window(names)
        size = sum(own.shares[name].n_coordinates for name in names)
        for part in sample_chunks(len(again), size):
            ids = own.consumed.removal.sample_ids[again[part]]
            change = own.of(names, ids)
            later = [None if p.removals is None else p.removals.of(names, ids) for p in passed]
            assert change is not None
            joint = finite_response(window, after, closing, change, later)
            added[:, part] = (joint - finite_response(window, after, closing, change)).to(added)
        return added

    def _window(self, names: Sequence[str]) -> tuple[list[RecordedStep], list[Tensor], Moments, list[Passed]]:
        """Steps, adjoints of the parameters and closing adjoint of the moments of some parameters, joined."""
        passed = [p for p in self.passed if names[0] in p.recorded]
        joined = [p.of(tuple(names)) for p in passed]
        return [step for step, _ in joined], [a.parameter for _, a in joined], joined[-1][1].moments, passed

    def _again(self, sample_ids: Tensor) -> Tensor:
        """Positions of the samples that later steps of the window hold, too."""
        later = [p.removals.consumed.removal.sample_ids for p in list(self.passed)[1:] if p.removals is not None]
        return torch.isin(sample_ids, torch.cat(later)).nonzero()[:, 0] if later else torch.zeros(0, dtype=torch.int64)

    def _earlier(self, index: int, sample_ids: Tensor) -> bool:
        """Whether a step in whose window this one lies holds one of the samples."""
        reach = range(max(0, index + 1 - (self.passed.maxlen or 0)), index)
        return any(bool(torch.isin(self.trajectory.sample_ids(t), sample_ids).any()) for t in reach)

    def _curvature(
        self, record: StepRecord, shares: Mapping[str, Shares], vectors: Vectors, products: Tensor
    ) -> Vectors:
        """Curvature of the batch loss times the gradient adjoints, ``(q, d)`` each (method.md section 4)."""
        if self.method.curvature == "none":
            return {}
        if self.method.curvature == "fisher":
            if record.measured:
                raise CurvatureUnavailable(
                    "curvature='fisher' needs per-sample gradients, and in this module the effect of a removal was measured "
                    "instead, because no rule gives them; use curvature='hessian' or 'none'."
                )
            return fisher_product(record, shares, products)
        return self.trajectory.curvature_product(record.index, self.method.curvature, vectors)


def sum_inner(shares: Mapping[str, Shares], vectors: Vectors) -> Tensor:
    """Inner products ``(q, n)`` of vectors and per-sample shares over all parameters."""
    return torch.stack([share.inner(vectors[name]) for name, share in shares.items()]).sum(0)


def _pull(passed: Passed) -> tuple[Adjoints, Vectors]:
    """The adjoint before a step, and that of its consumed gradient, by parameter."""
    before, gradients = Adjoints(), Vectors()
    for block in blocks_of([passed.recorded]):
        adjoints, gradient = adjoint(*passed.of(block))
        sizes = [len(passed.recorded[name].gradient) for name in block]
        parts = zip(adjoints.parameter.split(sizes, 1), *(m.split(sizes, 1) for m in adjoints.moments), strict=True)
        before |= {name: Adjoint(parameter, tuple(rest)) for name, (parameter, *rest) in zip(block, parts, strict=True)}
        gradients |= dict(zip(block, gradient.split(sizes, 1), strict=True))
    return before, gradients


def _pull_gradient(passed: Passed) -> Vectors:
    """The adjoint of a step's consumed gradient alone, by parameter."""
    gradients: Vectors = {}
    for block in blocks_of([passed.recorded]):
        sizes = [len(passed.recorded[name].gradient) for name in block]
        gradients |= dict(zip(block, gradient_adjoint(*passed.of(block)).split(sizes, 1), strict=True))
    return gradients


def sample_chunks(n_samples: int, n_coordinates: int, *, large: bool = False) -> list[slice]:
    """Slices of the samples whose dense shares stay within a bounded block, about as long as one another.

    Args:
        large: blocks of `_LARGE_ELEMENTS`, none of a single sample where there are several.

    Example:
        >>> sample_chunks(5, n_coordinates=16_000)
        [slice(0, 1, None), slice(1, 3, None), slice(3, 5, None)]
        >>> sample_chunks(5, n_coordinates=2**20, large=True)
        [slice(0, 2, None), slice(2, 5, None)]
    """
    elements = _LARGE_ELEMENTS if large else _CHUNK_ELEMENTS
    size = max(2 if large else 1, elements // max(n_coordinates, 1))
    count = max(1, n_samples // size if large else -(-n_samples // size))
    bounds = [n_samples * i // count for i in range(count + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
