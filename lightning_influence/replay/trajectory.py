"""A run that is run again: segment by segment from its snapshots, with exact curvature at every step.

`ReplayTrajectory` is a `Trajectory` on all coordinates. It needs the module and a `Plan`: what the run
consumed at each step, and its state at some of them. The plan comes from a log (`replay_log`) or, for
look-ahead, from the batches to come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from lightning_influence.capture import freeze_batch_norm, refuse_compiled
from lightning_influence.core.curvature import GradientGraph, curvature_of, hessian_product, third_derivative
from lightning_influence.core.optimizers import coupling
from lightning_influence.core.removal_sets import EVERY_SAMPLE, RemovalSets
from lightning_influence.core.trajectory import Shares, StepRecord, Vectors
from lightning_influence.errors import CurvatureUnavailable
from lightning_influence.replay.evaluation import StepEvaluator, StoppedPaths, distance
from lightning_influence.replay.measured_removals import MeasuredRemovals
from lightning_influence.replay.passes import Passes, copies
from lightning_influence.replay.plan import Plan, PlannedStep
from lightning_influence.replay.removals import RemovalCheck
from lightning_influence.replay.spread import Spread
from lightning_influence.replay.states import States, WalkedAstray
from lightning_influence.replay.token_products import TokenProducts, token_products
from lightning_influence.run.parameters import placed
from lightning_influence.run.random_state import random_state
from lightning_influence.run.ranks import ALONE, Ranks
from lightning_influence.run.task import Task, as_task

_T = TypeVar("_T")

_AT_ONCE = 32  # vectors carried through the network together
_AT_ONCE_BYTES = 2**26  # that they may save on their way
_MANY = 16  # vectors for which it pays to run a step once more
_SAME = 1e-4  # relative difference of two products that say the same


class ReplayTrajectory:
    """A run replayed on its module, a `Trajectory`.

    Use it as a context manager: while it is open the module's parameters move; afterwards everything about
    the module is as it was.

    Args:
        model: a `Task`, or the `LightningModule` that was trained; its parameters are overwritten while the trajectory is open.
        plan: what the run consumed.
        exclude: patterns of parameters that train but are not scored.
        frozen_batch_norm: as during the run.
        autocast: makes the context of the run's mixed precision.
        exact: whether exact Hessian products will be asked for.
        at_once: vectors carried through the network together in an exact curvature product; None for as many as a
            processor's cache holds.
        counterfactual: of the removals, where they have to be measured.
        sets: what is removed, where removals have to be measured.
        verify: hold the removals that shares give against evaluations without the sample.
        progress: show a bar where replaying a segment takes longer than two seconds.
        removals: what was verified in an earlier part of the same run, so that it is not verified again.
        memory: bytes that may be held besides the module and one evaluation of a step.
        ranks: processes over which the steps are spread; they all have to ask for the same, in the same order, and each measures
            the removals of its own ``sets``.

    Attributes:
        states: of the run, within the memory that there is.
        removals: how the changes of the gradient by the removal of a sample are found, and what was verified of it.
        differenced: whether Hessian products are differences of gradients, since the step cannot be differentiated twice.
    """

    def __init__(
        self,
        model: Any,
        plan: Plan,
        *,
        exclude: Sequence[str] = (),
        frozen_batch_norm: bool = False,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        exact: bool = True,
        at_once: int | None = None,
        counterfactual: Literal["drop", "zero"] = "drop",
        sets: RemovalSets = EVERY_SAMPLE,
        verify: bool = True,
        progress: bool = True,
        removals: RemovalCheck | None = None,
        memory: int = 2**32,
        ranks: Ranks = ALONE,
    ) -> None:
        self.task, self.plan, self.optimizer = as_task(model), plan, plan.optimizer
        self.module = module = self.task.module
        names = plan.parameters(0).keys()
        self._trained = {k: p for k, p in module.named_parameters() if k in names}
        self.sizes = {k: (p.numel(), p.numel()) for k, p in self._trained.items()}
        refuse_compiled(module)
        self.removals = removals or RemovalCheck(unverifiable=None if verify else "verify=False")
        self._passes = Passes(self.task, autocast)
        self._measured = MeasuredRemovals(
            self._passes, plan, self.removals, counterfactual=counterfactual, sets=sets, announce=progress
        )
        self._ranks = ranks
        self._evaluator = StepEvaluator(
            self._passes, self._measured, list(self._trained), exclude, exact=exact, spread=Spread(ranks)
        )
        self.states = States(plan, self._evaluator, self._trained, memory=memory, progress=progress)
        self.differenced = False
        self._frozen_batch_norm, self._at_once_asked = frozen_batch_norm, at_once
        convolves = any(isinstance(layer, torch.nn.modules.conv._ConvNd) for layer in module.modules())
        # whether Hessian products go forward; None: to be seen
        self._forward: bool | None = None if convolves else False

    def __enter__(self) -> ReplayTrajectory:
        self._open = ExitStack()
        self._open.enter_context(_tried(self.task))
        self._open.enter_context(random_state(None))
        if self._frozen_batch_norm:
            for handle in freeze_batch_norm(self.module):
                self._open.callback(handle.remove)
        return self

    def __exit__(self, *error: Any) -> None:
        self.states.clear()
        self._open.close()

    def __len__(self) -> int:
        return len(self.plan)

    @property
    def starts(self) -> Sequence[int]:
        return self.plan.snapshots

    def prepare(self) -> None:
        """Where the steps are spread over processes, see from the first how they can be."""
        if self._ranks.size > 1:
            _ = self.states.evaluation_bytes  # measured on an evaluation of the first step, by every process as a whole

    def witness(self) -> Vectors:
        """Verify the removals of the first step, and nothing else; its gradient, by parameter and in its shape."""
        return self._evaluator.evaluate(self.plan.step(0), self.plan.snapshot(0)).gradients

    def gradient(self, index: int) -> Vectors:
        """The gradient of a step of `Plan.snapshots`, by parameter and in its shape."""
        return self._passes.whole(self.plan.step(index), self.plan.snapshot(index)).gradients

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

    @property
    def drift(self) -> dict[int, float]:
        """Relative distance to each snapshot on arrival, by step (the system error; docs/method.md, "How far to trust a score")."""
        return self.states.drift

    def place(self, index: int) -> None:
        """Put the module where the run was before a step, or after its last one."""
        state = self.states.state(index)
        with torch.no_grad():
            for k, p in self._trained.items():
                p.copy_(state.parameters[k])
            for k, b in self.module.named_buffers():
                b.copy_(state.buffers[k])

    def record(self, index: int) -> StepRecord:
        measured = self.states.evaluation(index).measured
        record, state = self.states.record(index), self.states.state(index)
        if measured:  # one row a sample, whatever it consists of
            ids = self._measured.asked(record.sample_ids)
            weights, numbers = torch.ones(len(ids), dtype=torch.float64), torch.zeros_like(ids)
            record = replace(record, sample_ids=ids, loss_weights=weights, micro_batch_numbers=numbers, measured=True)
        hyper = record.hyper
        return replace(
            record,
            moments={k: tuple(m.flatten() for m in state.moments[k]) for k in record.gradients},
            parameters={k: state.parameters[k].flatten() for k in record.gradients if coupling(hyper[k])} or None,
        )

    def sample_ids(self, index: int) -> Tensor:
        return self.plan.sample_ids(index)

    def shares(self, index: int) -> Mapping[str, Shares]:
        gradients = self.states.record(index).gradients
        return {k: form for k, form in self.states.evaluation(index).shares.items() if k in gradients}

    def select(self, name: str, values: Tensor) -> Tensor:
        return values.flatten(values.dim() - self._trained[name].dim())

    def curvature_product(self, index: int, kind: str, vectors: Vectors) -> Vectors:
        of_loss = curvature_of(kind).of_loss
        return self._hessian_product(index, vectors) if of_loss is None else self._product(of_loss, index, vectors)

    def _hessian_product(self, index: int, vectors: Vectors) -> Vectors:
        self._evaluator.exact = True
        graph = self.states.evaluation(index).graph
        assert graph is not None
        directions = {k: v.to(graph.parameters[k]) for k, v in vectors.items()}
        if (
            self._forward is not False
            and self.stopped_paths == "none"
            and len(next(iter(directions.values()))) >= _MANY
        ):
            products = self._forwards(index, graph, directions)
        else:
            products = self._backwards(index, graph, directions)
        return {k: products[k].to(v) for k, v in vectors.items()}

    def _backwards(self, index: int, graph: GradientGraph, vectors: Vectors) -> Vectors:
        """Hessian products by differentiating the gradient's own graph."""
        if not self.differenced:
            # under the same parameters, because a checkpointed module runs forward once more
            with placed(self.module, graph.parameters | copies(self.states.state(index).buffers)):
                try:
                    return self._summed(index, partial(graph.hessian_product, vectors, at_once=self._at_once))
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
        except CurvatureUnavailable:
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
        return min(max(_AT_ONCE_BYTES // max(self.states.evaluation_bytes, 1), 1), _AT_ONCE)

    def _differenced(self, index: int, vectors: Vectors) -> Vectors:
        """Hessian products by differences of gradients, where the training step cannot be differentiated twice."""
        part, state = self._part(index), self.states.state(index)
        rows = []
        for i in range(len(next(iter(vectors.values())))):
            direction = {k: v[i].view_as(state.parameters[k]) for k, v in vectors.items()}
            moved = self._summed(index, partial(self._passes.slope, part, state, direction), like=direction)
            rows.append({k: moved[k].flatten() if k in moved else torch.zeros_like(v[i]) for k, v in vectors.items()})
        return {k: torch.stack([row[k] for row in rows]) for k in vectors}

    def third_derivative(self, index: int, vectors: Vectors) -> Vectors:
        """``D3L[u, u]`` of the step's batch loss along each direction ``u``, ``(k, d)``."""
        return self._product(third_derivative, index, vectors)

    def token_products(self, index: int, vectors: Vectors) -> list[TokenProducts]:
        """What vectors ``(q, d)`` have in common with the gradient of each label's loss, for each micro-batch of a step."""
        planned, state = self.plan.step(index), self.states.state(index)
        return [
            token_products(self._passes.loss_at(one, state), {k: state.parameters[k] for k in vectors}, vectors)
            for one in planned.micro_batches
        ]

    def _part(self, index: int) -> PlannedStep:
        """What this process evaluates of a step."""
        return self.plan.step(index) if self._ranks.size == 1 else self.states.evaluation(index).part

    def _summed(self, index: int, work: Callable[[], Vectors], like: Vectors | None = None) -> Vectors:
        """What is found of a step from what this process finds of its part.

        Args:
            like: tensors of the same shapes, where a process may find fewer than others.
        """
        vectors = self._ranks.agreed(work)
        if self._ranks.size == 1 or not self.states.evaluation(index).spread:
            return vectors
        return self._evaluator.spread.sum(vectors, like or vectors)

    def _product(self, product: Callable[..., Vectors], index: int, vectors: Vectors) -> Vectors:
        state = self.states.state(index)
        parameters = {k: state.parameters[k] for k in vectors}
        directions = {k: v.to(parameters[k]) for k, v in vectors.items()}
        part, at_once = self._part(index), self._at_once

        def of_part() -> Vectors:
            total = {k: torch.zeros_like(v) for k, v in directions.items()}
            for micro_batch in part.micro_batches:
                loss = self._passes.loss_at(micro_batch, state)
                for k, one in product(loss, parameters, directions, at_once=at_once).items():
                    total[k] += one
            return total

        total = self._summed(index, of_part)
        return {k: total[k].to(vectors[k]) for k in vectors}


def walked_or_run(run: Any, work: Callable[[], _T]) -> _T:
    """What ``work`` finds of a run, which is walked back where that can be; where it goes astray, the run is run forward.

    Args:
        run: a `ReplayTrajectory`, or another that nothing leads astray.
    """
    try:
        return work()
    except WalkedAstray:
        assert isinstance(run, ReplayTrajectory)
        run.states.clear()
        run.states.walks = False
        return work()


@contextmanager
def _tried(task: Task) -> Iterator[None]:
    """Quiet, with gradients, and as it was afterwards."""
    with task.unchanged(), task.quiet(), torch.enable_grad():
        yield
