"""A run that is run again: segment by segment from its snapshots, with exact curvature at every step.

`ReplayTrajectory` is a `Trajectory` on all coordinates. It needs the module and a `Plan`: what the run
consumed at each step, and its state at some of them. The plan comes from a log (`replay_log`) or, for
look-ahead, from the batches to come.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning import LightningModule
from torch import Tensor
from tqdm.auto import tqdm

from lightning_influence.capture import freeze_batch_norm, refuse_compiled
from lightning_influence.core.curvature import GradientGraph, gauss_newton_product, hessian_product, third_derivative
from lightning_influence.core.optimizers import UPDATES, coupling, step
from lightning_influence.core.removal import consumed_gradients
from lightning_influence.core.trajectory import Clip, Shares, StepRecord, Vectors
from lightning_influence.errors import CurvatureUnavailable, ReplayDrift
from lightning_influence.replay.evaluation import Evaluation, StepEvaluator, StoppedPaths, distance
from lightning_influence.replay.measured_removals import MeasuredRemovals
from lightning_influence.replay.passes import Passes, copies
from lightning_influence.replay.plan import Plan, ReplayStep, State
from lightning_influence.replay.removals import Removals
from lightning_influence.run.random_state import random_state
from lightning_influence.run.training_step import placed, quiet

_TOLERANCE = 1e-2  # of a segment's movement
_NORM_TOLERANCE = 1e-3  # of a gradient's norm
_CACHE_BYTES = 2**30  # of the evaluations of one segment
_AT_ONCE = 32  # vectors carried through the network together
_AT_ONCE_BYTES = 2**26  # that they may save on their way
_MANY = 16  # vectors for which it pays to run a step once more
_SAME = 1e-4  # relative difference of two products that say the same


@dataclass
class _Segment:
    """The steps from one snapshot to the next, replayed, with the state they end in; evaluations are kept while they
    fit.
    """

    start: int
    states: list[State]
    records: list[StepRecord]
    evaluations: dict[int, Evaluation]


class ReplayTrajectory:
    """A run replayed on its module, a `Trajectory`.

    Use it as a context manager: while it is open the module's parameters move; afterwards everything about
    the module is as it was.

    Args:
        module: as it was trained; its parameters are overwritten while the trajectory is open.
        plan: what the run consumed.
        exclude: patterns of parameters that train but are not scored.
        frozen_batch_norm: as during the run.
        autocast: makes the context of the run's mixed precision.
        exact: whether exact Hessian products will be asked for.
        at_once: vectors carried through the network together in an exact curvature product; None for as many as a
            processor's cache holds.
        counterfactual: of the removals, where they have to be measured.
        samples: the only ones whose removals are measured; None for all.
        verify: hold the removals that shares give against evaluations without the sample.
        progress: show a bar where replaying a segment takes longer than two seconds.
        removals: what was verified of an earlier part of the same run, with which this one goes on.

    Attributes:
        removals: how the changes of the gradient by the removal of a sample are found, and what was verified of it.
        differenced: whether Hessian products are differences of gradients, since the step cannot be differentiated twice.
        drift: relative distance to each snapshot on arrival, by step (the system error, method.md section 9).
    """

    def __init__(
        self,
        module: LightningModule,
        plan: Plan,
        *,
        exclude: Sequence[str] = (),
        frozen_batch_norm: bool = False,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        exact: bool = True,
        at_once: int | None = None,
        counterfactual: Literal["drop", "zero"] = "drop",
        samples: Collection[int] | None = None,
        verify: bool = True,
        progress: bool = True,
        removals: Removals | None = None,
    ) -> None:
        self.module, self.plan, self.optimizer = module, plan, plan.optimizer
        self._progress = progress
        self.drift: dict[int, float] = {}
        names = plan.snapshot(0).parameters.keys()
        self._trained = {k: p for k, p in module.named_parameters() if k in names}
        self.sizes = {k: (p.numel(), p.numel()) for k, p in self._trained.items()}
        refuse_compiled(module)
        self.removals = removals or Removals(unverifiable=None if verify else "verify=False")
        self._passes = Passes(module, autocast)
        self._measured = MeasuredRemovals(
            self._passes, plan, self.removals, counterfactual=counterfactual, samples=samples, announce=progress
        )
        self._evaluator = StepEvaluator(self._passes, self._measured, list(self._trained), exclude, exact=exact)
        self.differenced = False
        self._frozen_batch_norm, self._at_once_asked = frozen_batch_norm, at_once
        convolves = any(isinstance(layer, torch.nn.modules.conv._ConvNd) for layer in module.modules())
        self._forward: bool | None = (
            None if convolves else False
        )  # whether Hessian products go forward; None: to be seen
        self._segment: _Segment | None = None
        self._size: int | None = None

    def __enter__(self) -> ReplayTrajectory:
        self._open = ExitStack()
        self._open.enter_context(_as_it_was(self.module))
        self._open.enter_context(random_state(None))
        if self._frozen_batch_norm:
            for handle in freeze_batch_norm(self.module):
                self._open.callback(handle.remove)
        return self

    def __exit__(self, *error: Any) -> None:
        self._segment = None
        self._open.close()

    def __len__(self) -> int:
        return len(self.plan)

    def witness(self) -> Removals:
        """Verify the removals of the first step, and nothing else."""
        self._evaluator.evaluate(self.plan.step(0), self.plan.snapshot(0))
        return self.removals

    def gradient(self, index: int) -> Vectors:
        """The gradient of a step of `Plan.snapshots`, by parameter and in its shape."""
        return self._passes.gradient(self.plan.step(index), self.plan.snapshot(index))

    @property
    def stopped_paths(self) -> StoppedPaths | None:
        """Whether the gradient depends on the parameters along paths that the loss stops, and whether the curvature follows
        them; None before the first step.
        """
        return self._evaluator.stopped_paths

    @property
    def half(self) -> bool:
        """Whether steps are evaluated in half precision."""
        return self._passes.half

    def place(self, index: int) -> None:
        """Put the module where the run was before a step, or after its last one."""
        segment = self._at(min(index, len(self) - 1))
        state = segment.states[index - segment.start]
        with torch.no_grad():
            for k, p in self._trained.items():
                p.copy_(state.parameters[k])
            for k, b in self.module.named_buffers():
                b.copy_(state.buffers[k])

    def record(self, index: int) -> StepRecord:
        segment = self._at(index)
        return segment.records[index - segment.start]

    def sample_ids(self, index: int) -> Tensor:
        return self.plan.sample_ids(index)

    def shares(self, index: int) -> Mapping[str, Shares]:
        kept = self.record(index).gradients
        return {k: form for k, form in self._evaluation(index).shares.items() if k in kept}

    def select(self, name: str, values: Tensor) -> Tensor:
        return values.flatten(values.dim() - self._trained[name].dim())

    def curvature_product(self, index: int, kind: str, vectors: Vectors) -> Vectors:
        if kind == "gauss_newton":
            return self._product(gauss_newton_product, index, vectors)
        self._evaluator.exact = True
        graph = self._evaluation(index).graph
        assert graph is not None
        here = {k: v.to(graph.parameters[k]) for k, v in vectors.items()}
        if self._forward is not False and self.stopped_paths == "none" and len(next(iter(here.values()))) >= _MANY:
            products = self._forwards(index, graph, here)
        else:
            products = self._backwards(index, graph, here)
        return {k: products[k].to(v) for k, v in vectors.items()}

    def _backwards(self, index: int, graph: GradientGraph, vectors: Vectors) -> Vectors:
        """Hessian products by differentiating the gradient's own graph."""
        if not self.differenced:
            # under the same parameters, because a checkpointed module runs forward once more
            with placed(self.module, graph.parameters | copies(self._state(index).buffers)):
                try:
                    return graph.hessian_product(vectors, at_once=self._at_once)
                except CurvatureUnavailable:
                    if self.stopped_paths == "followed":
                        raise
                    self.differenced = True
        return self._differenced(index, vectors)

    def _forwards(self, index: int, graph: GradientGraph, vectors: Vectors) -> Vectors:
        """Hessian products by differentiating forwards; the first are held against the graph, which stays in use where they
        differ or cannot be had.
        """
        try:
            products = self._product(hessian_product, index, vectors)
        except (RuntimeError, NotImplementedError):  # an operation without a derivative forwards
            self._forward = False
            return self._backwards(index, graph, vectors)
        if self._forward is None:
            first = self._backwards(index, graph, {k: v[:1] for k, v in vectors.items()})
            size = distance(first, {k: torch.zeros_like(p) for k, p in first.items()})
            self._forward = distance({k: products[k][:1] for k in first}, first) <= _SAME * size
        return products if self._forward else self._backwards(index, graph, vectors)

    @property
    def _at_once(self) -> int:
        if self._at_once_asked is not None:
            return self._at_once_asked
        return min(max(_AT_ONCE_BYTES // max(self._size or _AT_ONCE_BYTES, 1), 1), _AT_ONCE)

    def _differenced(self, index: int, vectors: Vectors) -> Vectors:
        """Hessian products by differences of gradients, where the training step cannot be differentiated twice."""
        planned, state = self.plan.step(index), self._state(index)
        rows = []
        for i in range(len(next(iter(vectors.values())))):
            moved = self._passes.slope(
                planned, state, {k: v[i].view_as(state.parameters[k]) for k, v in vectors.items()}
            )
            rows.append({k: moved[k].flatten() if k in moved else torch.zeros_like(v[i]) for k, v in vectors.items()})
        return {k: torch.stack([row[k] for row in rows]) for k in vectors}

    def third_derivative(self, index: int, vectors: Vectors) -> Vectors:
        """``D3L[u, u]`` of the step's batch loss along each direction ``u``, ``(k, d)``."""
        return self._product(third_derivative, index, vectors)

    def _product(self, product: Callable[..., Vectors], index: int, vectors: Vectors) -> Vectors:
        state = self._state(index)
        parameters = {k: state.parameters[k] for k in vectors}
        here = {k: v.to(parameters[k]) for k, v in vectors.items()}
        total = {k: torch.zeros_like(v) for k, v in here.items()}
        for micro_batch in self.plan.step(index).micro_batches:
            loss = self._passes.loss_at(micro_batch, state)
            for k, part in product(loss, parameters, here, at_once=self._at_once).items():
                total[k] += part
        return {k: total[k].to(vectors[k]) for k in vectors}

    def _state(self, index: int) -> State:
        segment = self._at(index)
        return segment.states[index - segment.start]

    def _at(self, index: int) -> _Segment:
        """The segment that holds a step, replayed if it is not the present one."""
        if not 0 <= index < len(self):
            raise IndexError(f"step {index} of a run of {len(self)} steps")
        start = max(s for s in self.plan.snapshots if s <= index)
        if self._segment is None or self._segment.start != start:
            self._segment = None  # before the next is built, so that two are never held
            self._segment = self._replay(start)
        return self._segment

    def _replay(self, start: int) -> _Segment:
        stop = min((s for s in self.plan.snapshots if s > start), default=len(self))
        segment, state = _Segment(start, [], [], {}), self.plan.snapshot(start)
        steps = range(start, min(stop, len(self)))
        for index in tqdm(steps, desc="replay", unit="step", delay=2, leave=False, disable=not self._progress):
            planned = self.plan.step(index)
            if self._size is None:
                self._size = self._evaluator.nbytes(planned, state)
            evaluation = self._evaluator.evaluate(planned, state)
            record = self._record(index, planned, state, evaluation)
            if len(segment.evaluations) * self._size <= _CACHE_BYTES:
                segment.evaluations[index] = evaluation
            segment.states.append(state)
            segment.records.append(record)
            state = self._next(record, state, evaluation.buffers)
        segment.states.append(state)
        if stop in self.plan.snapshots:
            self._check_arrival(start, stop, segment.states[0], state)
        return segment

    def _evaluation(self, index: int) -> Evaluation:
        """The evaluation of a step; made again where it was not kept."""
        segment = self._at(index)
        found = segment.evaluations.get(index)
        if found is None or (found.graph is None and self._evaluator.exact):
            found = self._evaluator.evaluate(self.plan.step(index), segment.states[index - segment.start])
            segment.evaluations = {index: found}
        return found

    def _record(self, index: int, planned: ReplayStep, state: State, evaluation: Evaluation) -> StepRecord:
        gradients = evaluation.gradients
        norm = float(torch.linalg.vector_norm(torch.stack([g.float().norm() for g in gradients.values()])))
        recorded = planned.clip.raw_norm
        if recorded and abs(norm - recorded) > _NORM_TOLERANCE * recorded:
            raise ReplayDrift(
                f"step {index}: the replayed gradient has norm {norm:.6g}, the recorded one had {recorded:.6g}. {_CAUSES}"
            )
        own = [k for k in gradients if k in planned.hyper]
        columns = (planned.sample_ids, planned.loss_weights, planned.numbers)
        if evaluation.measured:  # one row a sample, whatever it consists of
            ids = self._measured.asked(planned.sample_ids)
            columns = (ids, torch.ones(len(ids), dtype=torch.float64), torch.zeros_like(ids))
        return StepRecord(
            index=index,
            sample_ids=columns[0],
            loss_weights=columns[1],
            micro_batches=columns[2],
            measured=evaluation.measured,
            gradients={k: gradients[k].flatten() for k in own},
            moments={k: tuple(m.flatten() for m in state.moments[k]) for k in own},
            hyper=planned.hyper,
            averaged=planned.averaged,
            clip=Clip(planned.clip.rule, planned.clip.bound, norm),
            parameters={k: state.parameters[k].flatten() for k in own if coupling(planned.hyper[k])} or None,
        )

    def _next(self, record: StepRecord, state: State, buffers: dict[str, Tensor]) -> State:
        """The state after a step, by the pure update in the run's own precision."""
        parameters, moments = dict(state.parameters), dict(state.moments)
        for k, gradient in consumed_gradients(record).items():
            shape = parameters[k].shape
            parameters[k], moments[k] = step(
                UPDATES[self.optimizer], parameters[k], moments[k], gradient.view(shape), record.hyper[k]
            )
        return State(parameters, moments, buffers)

    def _check_arrival(self, start: int, stop: int, first: State, arrived: State) -> None:
        expected = self.plan.snapshot(stop).parameters
        missed = distance(arrived.parameters, expected)
        moved = distance(first.parameters, expected)
        self.drift[stop] = missed / max(moved, 1e-30)
        if self.drift[stop] > _TOLERANCE:
            raise ReplayDrift(
                f"steps {start} to {stop - 1}: the replay misses the snapshot before step {stop} by {self.drift[stop]:.2g} of "
                f"the way it went. {_CAUSES}"
            )


_CAUSES = (
    "Likely causes: other data or another collate function than in the run, random augmentation in loader workers (record "
    "with store_batches=True), a module or library that changed since, or an operation that is not deterministic."
)


@contextmanager
def _as_it_was(module: LightningModule) -> Iterator[None]:
    """Quiet, and restored afterwards: parameters, buffers, gradients and modes."""
    values = {k: t.detach().clone() for k, t in [*module.named_parameters(), *module.named_buffers()]}
    gradients = {k: p.grad for k, p in module.named_parameters()}
    modes = {m: m.training for m in module.modules()}
    try:
        with quiet(module), torch.enable_grad():
            yield
    finally:
        with torch.no_grad():
            for k, t in [*module.named_parameters(), *module.named_buffers()]:
                t.copy_(values[k])
        for k, p in module.named_parameters():
            p.grad = gradients[k]
        for m, mode in modes.items():
            m.training = mode
