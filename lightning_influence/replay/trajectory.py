"""A run that is run again: segment by segment from its snapshots, with exact curvature at every step.

`ReplayTrajectory` is a `Trajectory` on all coordinates. It needs the module and a `Plan`: what the run
consumed at each step, and its state at some of them. The plan comes from a log (`replay_log`) or, for
look-ahead, from the batches to come.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from lightning import LightningModule
from torch import Tensor
from tqdm.auto import tqdm

from lightning_influence.capture import GradientCapture, freeze_batch_norm, refuse_compiled
from lightning_influence.core.curvature import (
    GradientGraph,
    differentiable_attention,
    gauss_newton_product,
    third_derivative,
)
from lightning_influence.core.optimizers import UPDATES, coupling, step
from lightning_influence.core.removal import consumed_gradients, removal
from lightning_influence.core.shares import Dense, Form, Stack, nbytes
from lightning_influence.core.trajectory import Clip, Shares, StepRecord, Vectors
from lightning_influence.errors import ConfigurationError, ReplayDrift
from lightning_influence.replay.plan import Plan, ReplayMicroBatch, ReplayStep, State
from lightning_influence.replay.removals import Removals
from lightning_influence.replay.removals import not_the_sum as _not_the_sum
from lightning_influence.run.batches import without
from lightning_influence.run.random_state import random_state, read_random_state, write_random_state
from lightning_influence.run.training_step import at_moment, placed, quiet, set_modes, training_loss

_TOLERANCE = 1e-2  # of a segment's movement
_NORM_TOLERANCE = 1e-3  # of a gradient's norm
_CACHE_BYTES = 2**30  # of the evaluations of one segment


@dataclass(frozen=True)
class _Evaluation:
    """The training step of one optimizer step, evaluated.

    Attributes:
        graph: None where the run is replayed without second derivatives.
        measured: whether the shares are changes of the gradient (`StepRecord.measured`).
        buffers: after the step.
    """

    gradients: dict[str, Tensor]
    shares: dict[str, Form]
    graph: GradientGraph | None
    measured: bool
    buffers: dict[str, Tensor]


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
        counterfactual: of the removals, where they have to be measured.
        progress: show a bar where replaying a segment takes longer than two seconds.
        removals: what was verified of an earlier part of the same run, with which this one goes on.

    Attributes:
        removals: how the changes of the gradient by the removal of a sample are found, and what was verified of it.
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
        counterfactual: Literal["drop", "zero"] = "drop",
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
        self._frozen_batch_norm, self._counterfactual = frozen_batch_norm, counterfactual
        self.removals = removals or Removals()
        self._capture = self._captured(exclude)
        self._autocast, self._exact, self._at_once = autocast, exact, at_once
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
        self._evaluate(self.plan.step(0), self.plan.snapshot(0), measure=False)
        return self.removals

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
        with placed(self.module, graph.parameters | _copies(self._state(index).buffers)):
            products = graph.hessian_product(here, at_once=self._at_once)
        return {k: products[k].to(v) for k, v in vectors.items()}

    def third_derivative(self, index: int, vectors: Vectors) -> Vectors:
        """``D3L[u, u]`` of the step's batch loss along each direction ``u``, ``(k, d)``."""
        return self._product(third_derivative, index, vectors)

    def _product(self, product: Callable[..., Vectors], index: int, vectors: Vectors) -> Vectors:
        state = self._state(index)
        parameters = {k: state.parameters[k] for k in vectors}
        here = {k: v.to(parameters[k]) for k, v in vectors.items()}
        total = {k: torch.zeros_like(v) for k, v in here.items()}
        for micro_batch in self.plan.step(index).micro_batches:
            loss = self._loss_of(micro_batch, state)
            for k, part in product(loss, parameters, here, at_once=self._at_once).items():
                total[k] += part
        return {k: total[k].to(vectors[k]) for k in vectors}

    def _loss_of(self, micro_batch: ReplayMicroBatch, state: State) -> Callable[[dict[str, Tensor]], Tensor]:
        def loss(values: dict[str, Tensor]) -> Tensor:
            with placed(self.module, state.parameters | values | _copies(state.buffers)):
                return self._loss(micro_batch)

        return loss

    def _loss(self, micro_batch: ReplayMicroBatch) -> Tensor:
        """A micro-batch's part in the loss of its step, by the module's own training step."""
        set_modes(self.module, micro_batch.in_eval)
        if micro_batch.random is not None:
            write_random_state(micro_batch.random)
        with at_moment(self.module, micro_batch.epoch, micro_batch.global_step), self._autocast():
            self.removals.half |= torch.is_autocast_enabled(self.module.device.type)
            loss = training_loss(self.module, micro_batch.batch, micro_batch.batch_idx)
        return loss * micro_batch.factor

    def _state(self, index: int) -> State:
        segment = self._at(index)
        return segment.states[index - segment.start]

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

    def _record(self, index: int, planned: ReplayStep, state: State, evaluation: _Evaluation) -> StepRecord:
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
            ids = _each_once(planned.sample_ids)
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

    def _captured(self, exclude: Sequence[str]) -> GradientCapture | None:
        """Hooks for the shares; None where the module's removals have to be measured."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of layers that are slow to capture
                return GradientCapture(
                    self.module, exclude=exclude, frozen_batch_norm=True, trained=self._trained.keys()
                )
        except ConfigurationError as error:
            self.removals.measure(str(error))
            return None

    def _evaluate(self, planned: ReplayStep, state: State, *, measure: bool = True) -> _Evaluation:
        """Gradients and shares of a step, by the module's own training step."""
        leaves = {k: p.detach().requires_grad_() for k, p in state.parameters.items()}
        captured: list[dict[str, Form]] = []
        buffers = [state.buffers]  # before each micro-batch, and after the last
        totals: dict[str, Tensor] = {}
        with differentiable_attention() if self._exact else nullcontext():
            for micro_batch in planned.micro_batches:
                gradients, shares, after = self._gradients(leaves, buffers[-1], micro_batch, self._capture)
                captured += [] if shares is None else [shares]
                buffers.append(after)
                totals |= {k: totals[k] + g if k in totals else g for k, g in gradients.items()}
        gradients = {k: g.detach() for k, g in totals.items()}
        forms: dict[str, Form] | None = None
        if len(captured) == len(planned.micro_batches):
            forms = {k: _stacked([part[k] for part in captured]) for k in captured[0] if k in gradients}
            if not self._right(planned, state.parameters, buffers, gradients, forms):
                forms = None
        measured = forms is None
        if forms is None:
            forms = self._measured(planned, state.parameters, buffers, gradients) if measure else {}
        graph = GradientGraph(leaves, totals) if self._exact else None
        return _Evaluation(gradients, forms, graph, measured, buffers[-1])

    def _gradients(
        self,
        leaves: dict[str, Tensor],
        buffers: Mapping[str, Tensor],
        micro_batch: ReplayMicroBatch,
        capture: GradientCapture | None,
        *,
        exact: bool | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Form] | None, dict[str, Tensor]]:
        """Gradients that a micro-batch has (the optimizer skips a parameter without one), shares, and buffers after it."""
        shares: dict[str, Form] | None = None
        with placed(self.module, leaves | _copies(buffers)) as inside:
            if capture is not None:
                capture.attach()
                capture.begin(micro_batch.n_samples)
            try:
                loss = self._loss(micro_batch)
                found = torch.autograd.grad(
                    loss,
                    list(leaves.values()),
                    create_graph=self._exact if exact is None else exact,
                    allow_unused=True,
                )
                shares = None if capture is None else capture.take()
            except ConfigurationError as error:
                if capture is None:
                    raise
                self.removals.measure(str(error))
                self._capture = None
            finally:
                if capture is not None:
                    capture.detach()
        if capture is not None and shares is None:  # once more, without the hooks
            return self._gradients(leaves, buffers, micro_batch, None, exact=exact)
        gradients = {k: g for k, g in zip(leaves, found, strict=True) if g is not None}
        return gradients, shares, {k: inside[k].detach() for k in buffers}

    # -- removals ---------------------------------------------------------------------------------------

    def _right(
        self,
        planned: ReplayStep,
        parameters: Mapping[str, Tensor],
        buffers: Sequence[Mapping[str, Tensor]],
        gradients: Vectors,
        shares: Mapping[str, Form],
    ) -> bool:
        """Whether the shares give the change of the gradient when a sample leaves: their sum at every step, removals of a
        few samples at the first.
        """
        if self.removals.measuring:
            return False
        wrong = _not_the_sum(shares, gradients)
        if wrong is not None:
            self.removals.not_summed = wrong
            self.removals.measure(f"the per-sample gradients of {wrong} do not sum to its gradient")
            return False
        if self.removals.verified or self.removals.unverifiable:
            return True
        if any(_draws(self, planned, parameters, buffers)):
            self.removals.unverifiable = (
                "the training step draws random numbers, so a step without a sample is another one"
            )
            return True
        record = StepRecord(0, planned.sample_ids, planned.loss_weights, planned.numbers, {}, {}, {}, planned.averaged)
        removed = removal(record, self._counterfactual)
        chosen = sorted({0, len(removed) // 2, len(removed) - 1})
        measured = self._changes(planned, parameters, buffers, gradients, removed.sample_ids[chosen])
        totals = {k: removed.totals(s, gradients[k].flatten()) for k, s in shares.items()}
        for row, position in enumerate(chosen):
            at = slice(position, position + 1)
            predicted = {k: removed.change(s, at, totals[k])[0] for k, s in shares.items()}
            self.removals.compare(predicted, {k: measured[k][row] for k in predicted}, gradients)
        return not self.removals.measuring

    def _measured(
        self,
        planned: ReplayStep,
        parameters: Mapping[str, Tensor],
        buffers: Sequence[Mapping[str, Tensor]],
        gradients: Vectors,
    ) -> dict[str, Form]:
        """The change of the gradient by the removal of every sample, each by evaluating the step without it."""
        changes = self._changes(planned, parameters, buffers, gradients, _each_once(planned.sample_ids))
        return {k: Dense(rows) for k, rows in changes.items()}

    def _changes(
        self,
        planned: ReplayStep,
        parameters: Mapping[str, Tensor],
        buffers: Sequence[Mapping[str, Tensor]],
        gradients: Vectors,
        samples: Tensor,
    ) -> Vectors:
        """``e_z = grad L(B without z) - grad L(B)`` ``(len(samples), d)`` each (method.md section 11)."""
        leaves = {k: p.detach().requires_grad_() for k, p in parameters.items()}
        rows: list[Vectors] = []
        for z in samples.tolist():
            change = {k: torch.zeros_like(g) for k, g in gradients.items()}
            for number, micro_batch in enumerate(planned.micro_batches):
                here = planned.numbers == number
                own = (planned.sample_ids[here] == z).nonzero()[:, 0]
                if len(own) == 0:
                    continue
                evaluate = partial(self._gradients, leaves, buffers[number], capture=None, exact=False)
                whole, *_ = evaluate(micro_batch)
                rest: dict[str, Tensor] = {}
                if len(own) < micro_batch.n_samples:
                    factor = micro_batch.factor
                    if self._counterfactual == "zero" and planned.averaged:
                        weights = planned.loss_weights[here]
                        factor *= float(1 - weights[own].sum() / weights.sum())
                    less = replace(
                        micro_batch,
                        batch=without(micro_batch.batch, own),
                        n_samples=micro_batch.n_samples - len(own),
                        factor=factor,
                    )
                    rest, *_ = evaluate(less)
                for k, total in change.items():
                    total += rest.get(k, 0.0) - whole.get(k, 0.0)  # type: ignore[operator]
            rows.append({k: c.flatten() for k, c in change.items()})
        return {k: torch.stack([row[k] for row in rows]) for k in gradients}

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
        missed = _distance(arrived.parameters, expected)
        moved = _distance(first.parameters, expected)
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


def _draws(
    run: ReplayTrajectory,
    planned: ReplayStep,
    parameters: Mapping[str, Tensor],
    buffers: Sequence[Mapping[str, Tensor]],
) -> Iterator[bool]:
    """Whether the training step of each micro-batch draws random numbers."""
    for micro_batch, before in zip(planned.micro_batches, buffers[:-1], strict=True):
        with torch.no_grad(), placed(run.module, {**parameters, **_copies(before)}):
            run._loss(replace(micro_batch, random=None) if micro_batch.random is None else micro_batch)
        start = micro_batch.random
        now = read_random_state()
        yield start is not None and any(not torch.equal(start[k], now[k]) for k in start if k in now)


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of their own, since a training step may write to its buffers."""
    return {k: t.clone() for k, t in tensors.items()}


def _stacked(forms: Sequence[Form]) -> Form:
    return forms[0] if len(forms) == 1 else Stack(forms)


def _each_once(sample_ids: Tensor) -> Tensor:
    """The samples of a step in the order of first appearance."""
    return torch.tensor(list(dict.fromkeys(sample_ids.tolist())), dtype=torch.int64)


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
