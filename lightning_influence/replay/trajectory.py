"""A run that is run again: segment by segment from its snapshots, with exact curvature at every step.

`ReplayTrajectory` is a `Trajectory` on all coordinates. It needs the module and a `Plan`: what the run
consumed at each step, and its state at some of them. The plan comes from a log (`replay_log`) or, for
look-ahead, from the batches to come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.func import functional_call
from tqdm.auto import tqdm

from lightning_influence.capture import GradientCapture
from lightning_influence.core.curvature import (
    GradientGraph,
    differentiable_attention,
    gauss_newton_product,
    third_derivative,
)
from lightning_influence.core.optimizers import UPDATES, coupling, step
from lightning_influence.core.removal import consumed_gradients
from lightning_influence.core.shares import Form, Stack, nbytes
from lightning_influence.core.trajectory import Clip, Shares, StepRecord, Vectors
from lightning_influence.errors import ReplayDrift
from lightning_influence.replay.plan import Plan, ReplayMicroBatch, ReplayStep, State
from lightning_influence.run.random_state import random_state, write_random_state
from lightning_influence.run.training_step import loss_of, quiet

_TOLERANCE = 1e-2  # of a segment's movement
_NORM_TOLERANCE = 1e-3  # of a gradient's norm
_CACHE_BYTES = 2**30  # of the evaluations of one segment


@dataclass(frozen=True)
class _Evaluation:
    """The training step of one optimizer step, evaluated.

    Attributes:
        graph: None where the run is replayed without second derivatives.
    """

    gradients: dict[str, Tensor]
    shares: dict[str, Form]
    graph: GradientGraph | None


@dataclass
class _Segment:
    """The steps from one snapshot to the next, replayed, with the state they end in; evaluations are kept while they
    fit.
    """

    start: int
    states: list[State]
    records: list[StepRecord]
    evaluations: dict[int, _Evaluation]


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
        at_once: vectors carried through the network together in an exact curvature product.
        progress: show a bar where replaying a segment takes longer than two seconds.

    Attributes:
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
        at_once: int = 8,
        progress: bool = True,
    ) -> None:
        self.module, self.plan, self.optimizer = module, plan, plan.optimizer
        self._progress = progress
        self.drift: dict[int, float] = {}
        self._capture = GradientCapture(module, exclude=exclude, frozen_batch_norm=frozen_batch_norm)
        self._trained = {k: p for k, p in module.named_parameters() if p.requires_grad}
        self.sizes = {k: (p.numel(), p.numel()) for k, p in self._trained.items()}
        self._scope = _Scope(module)
        self._autocast, self._exact, self._at_once = autocast, exact, at_once
        self._segment: _Segment | None = None
        self._size: int | None = None

    def __enter__(self) -> ReplayTrajectory:
        self._open = ExitStack()
        self._open.enter_context(_as_it_was(self.module))
        self._open.enter_context(random_state(None))
        self.module.train()
        self._capture.attach()
        return self

    def __exit__(self, *error: Any) -> None:
        self._capture.detach()
        self._segment = None
        self._open.close()

    def __len__(self) -> int:
        return len(self.plan)

    def place(self, index: int) -> None:
        """Put the module where the run was before a step, or after its last one."""
        segment = self._at(min(index, len(self) - 1))
        state = segment.states[index - segment.start]
        self._restore(state)
        with torch.no_grad():
            for k, p in self._trained.items():
                p.copy_(state.parameters[k])

    def record(self, index: int) -> StepRecord:
        segment = self._at(index)
        return segment.records[index - segment.start]

    def shares(self, index: int) -> Mapping[str, Shares]:
        kept = self.record(index).gradients
        return {k: form for k, form in self._evaluation(index).shares.items() if k in kept}

    def select(self, name: str, values: Tensor) -> Tensor:
        return values.flatten(values.dim() - self._trained[name].dim())

    def curvature_product(self, index: int, kind: str, vectors: Vectors) -> Vectors:
        if kind == "gauss_newton":
            return self._product(gauss_newton_product, index, vectors)
        self._exact = True
        graph = self._evaluation(index).graph
        assert graph is not None
        here = {k: v.to(graph.parameters[k]) for k, v in vectors.items()}
        # under the same parameters, because a checkpointed module runs forward once more
        products = self._under(graph.parameters, lambda: graph.hessian_product(here, at_once=self._at_once))
        return {k: products[k].to(v) for k, v in vectors.items()}

    def third_derivative(self, index: int, vectors: Vectors) -> Vectors:
        """``D3L[u, u]`` of the step's batch loss along each direction ``u``, ``(k, d)``."""
        return self._product(third_derivative, index, vectors)

    def _product(self, product: Callable[..., Vectors], index: int, vectors: Vectors) -> Vectors:
        segment = self._at(index)
        state = segment.states[index - segment.start]
        parameters = {k: state.parameters[k] for k in vectors}
        here = {k: v.to(parameters[k]) for k, v in vectors.items()}
        total = {k: torch.zeros_like(v) for k, v in here.items()}
        self._restore(state)
        for micro_batch in self.plan.step(index).micro_batches:
            loss = self._loss_of(micro_batch)
            for k, part in product(loss, parameters, here, at_once=self._at_once).items():
                total[k] += part
        return {k: total[k].to(vectors[k]) for k in vectors}

    def _loss_of(self, micro_batch: ReplayMicroBatch) -> Callable[[dict[str, Tensor]], Tensor]:
        return lambda values: self._under(values, lambda: self._loss(micro_batch))

    def _loss(self, micro_batch: ReplayMicroBatch) -> Tensor:
        """A micro-batch's part in the loss of its step, by the module's own training step."""
        if micro_batch.random is not None:
            write_random_state(micro_batch.random)
        with self._autocast():
            loss = loss_of(self.module.training_step(micro_batch.batch, micro_batch.batch_idx))
        return loss * micro_batch.factor

    def _under(self, parameters: Mapping[str, Tensor], function: Callable[[], Any]) -> Any:
        """The value of a function with other tensors in the place of the module's parameters."""
        return functional_call(self._scope, {f"module.{k}": p for k, p in parameters.items()}, (function,))

    # -- forward ----------------------------------------------------------------------------------------

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
                self._size = self._size_of(planned, state)
            evaluation = self._evaluate(planned, state)
            record = self._record(index, planned, state, evaluation.gradients)
            if len(segment.evaluations) * self._size <= _CACHE_BYTES:
                segment.evaluations[index] = evaluation
            segment.states.append(state)
            segment.records.append(record)
            state = self._next(record, state)
        segment.states.append(state)
        if stop in self.plan.snapshots:
            self._check_arrival(start, stop, segment.states[0], state)
        return segment

    def _size_of(self, planned: ReplayStep, state: State) -> int:
        """Bytes that it takes to keep a step's evaluation; about the same for every step."""
        with _saved_bytes() as saved:
            evaluation = self._evaluate(planned, state)
        return sum(saved) + sum(nbytes(form) for form in evaluation.shares.values())

    def _evaluation(self, index: int) -> _Evaluation:
        """The evaluation of a step; made again where it was not kept."""
        segment = self._at(index)
        found = segment.evaluations.get(index)
        if found is None or (found.graph is None and self._exact):
            found = self._evaluate(self.plan.step(index), segment.states[index - segment.start])
            segment.evaluations = {index: found}
        return found

    def _record(self, index: int, planned: ReplayStep, state: State, gradients: Vectors) -> StepRecord:
        norm = float(torch.linalg.vector_norm(torch.stack([g.float().norm() for g in gradients.values()])))
        recorded = planned.clip.raw_norm
        if recorded and abs(norm - recorded) > _NORM_TOLERANCE * recorded:
            raise ReplayDrift(
                f"step {index}: the replayed gradient has norm {norm:.6g}, the recorded one had {recorded:.6g}. {_CAUSES}"
            )
        own = [k for k in gradients if k in planned.hyper]
        return StepRecord(
            index=index,
            sample_ids=planned.sample_ids,
            loss_weights=planned.loss_weights,
            micro_batches=planned.numbers,
            gradients={k: gradients[k].flatten() for k in own},
            moments={k: tuple(m.flatten() for m in state.moments[k]) for k in own},
            hyper=planned.hyper,
            averaged=planned.averaged,
            clip=Clip(planned.clip.rule, planned.clip.bound, norm),
            parameters={k: state.parameters[k].flatten() for k in own if coupling(planned.hyper[k])} or None,
        )

    def _evaluate(self, planned: ReplayStep, state: State) -> _Evaluation:
        """Gradients and shares of a step, by the module's own training step."""
        leaves = {k: p.detach().requires_grad_() for k, p in state.parameters.items()}
        self._restore(state)
        parts: list[dict[str, Form]] = []
        totals: dict[str, Tensor] = {}
        with differentiable_attention() if self._exact else nullcontext():
            for micro_batch in planned.micro_batches:
                self._capture.begin(micro_batch.n_samples)
                found = self._under(leaves, partial(self._gradients, leaves, micro_batch))
                parts.append(self._capture.take())
                totals |= {k: totals[k] + g if k in totals else g for k, g in found.items()}
        shares: dict[str, Form] = {
            k: parts[0][k] if len(parts) == 1 else Stack([part[k] for part in parts]) for k in parts[0]
        }
        gradients = {k: g.detach() for k, g in totals.items()}
        return _Evaluation(
            gradients,
            {k: s for k, s in shares.items() if k in gradients},
            GradientGraph(leaves, totals) if self._exact else None,
        )

    def _gradients(self, leaves: dict[str, Tensor], micro_batch: ReplayMicroBatch) -> dict[str, Tensor]:
        """Those that the micro-batch has: the optimizer skips a parameter without one."""
        loss = self._loss(micro_batch)
        found = torch.autograd.grad(loss, list(leaves.values()), create_graph=self._exact, allow_unused=True)
        return {k: g for k, g in zip(leaves, found, strict=True) if g is not None}

    def _next(self, record: StepRecord, state: State) -> State:
        """The state after a step, by the pure update in the run's own precision."""
        parameters, moments = dict(state.parameters), dict(state.moments)
        for k, gradient in consumed_gradients(record).items():
            shape = parameters[k].shape
            parameters[k], moments[k] = step(
                UPDATES[self.optimizer], parameters[k], moments[k], gradient.view(shape), record.hyper[k]
            )
        buffers = {k: b.detach().clone() for k, b in self.module.named_buffers()}
        return State(parameters, moments, buffers)

    def _check_arrival(self, start: int, stop: int, first: State, arrived: State) -> None:
        expected = self.plan.snapshot(stop).parameters
        missed = _distance(arrived.parameters, expected)
        moved = _distance(first.parameters, expected)
        self.drift[stop] = missed / max(moved, 1e-30)
        if self.drift[stop] > _TOLERANCE:
            raise ReplayDrift(
                f"steps {start} to {stop - 1}: the replay misses the snapshot before step {stop} by {self.drift[stop]:.2g} of "
                f"the way it went. {_CAUSES}"
            )

    def _restore(self, state: State) -> None:
        """Put the module's buffers into a state; its parameters are given to every call."""
        with torch.no_grad():
            for k, b in self.module.named_buffers():
                if k in state.buffers:
                    b.copy_(state.buffers[k])


_CAUSES = (
    "Likely causes: other data or another collate function than in the run, random augmentation in loader workers (record "
    "with store_batches=True), a module or library that changed since, or an operation that is not deterministic."
)


class _Scope(nn.Module):
    """Calls a function as a module's forward, so that `functional_call` is in force while it runs."""

    def __init__(self, module: LightningModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()


@contextmanager
def _saved_bytes() -> Iterator[list[int]]:
    """Sizes of the tensors that autograd saves meanwhile. Watching is slow."""
    sizes: dict[int, int] = {}
    found: list[int] = []
    saved: list[Tensor] = []  # autograd is given positions: a node that held its own output would never be freed

    def pack(tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        saved.append(tensor)
        return len(saved) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, saved.__getitem__):
        yield found
    found.extend(sizes.values())
    saved.clear()


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


def _distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    return float(sum((a[k].double() - b[k].double()).square().sum() for k in b) ** 0.5)
