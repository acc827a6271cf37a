"""A run that is run again: segment by segment from its snapshots, with exact curvature at every step.

`ReplayTrajectory` is a `Trajectory` on all coordinates. It needs the module and a `Plan`: what the run
consumed at each step, and its state at some of them. The plan comes from a log (`replay_log`) or, for
look-ahead, from the batches to come.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
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
from lightning_influence.errors import ConfigurationError, CurvatureUnavailable, ReplayDrift
from lightning_influence.replay.plan import Plan, ReplayMicroBatch, ReplayStep, State
from lightning_influence.replay.removals import Removals
from lightning_influence.replay.removals import not_the_sum as _not_the_sum
from lightning_influence.replay.stopped_paths import NotedPaths, OpenPaths, StopWatch
from lightning_influence.run.batches import without
from lightning_influence.run.random_state import random_state, read_random_state, write_random_state
from lightning_influence.run.training_step import at_moment, placed, quiet, set_modes, training_loss
from lightning_influence.run.unchanged import unchanged

_TOLERANCE = 1e-2  # of a segment's movement
_NORM_TOLERANCE = 1e-3  # of a gradient's norm
_SAME = 1e-4  # relative difference of two products that say the same
_BENT = 0.05  # relative, of the change of a gradient that its second derivative may miss
_LONG = 10  # seconds of measuring that are announced
_CACHE_BYTES = 2**30  # of the evaluations of one segment


@dataclass(frozen=True)
class _Evaluation:
    """The training step of one optimizer step, evaluated.

    Attributes:
        graph: None where the run is replayed without second derivatives.
        measured: whether the shares are changes of the gradient (`StepRecord.measured`).
        buffers: after the step.
        form: makes the shares, which are only measured where they are asked for.
    """

    gradients: dict[str, Tensor]
    graph: GradientGraph | None
    measured: bool
    buffers: dict[str, Tensor]
    form: Callable[[], dict[str, Form]]

    @cached_property
    def shares(self) -> dict[str, Form]:
        return self.form()


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
        samples: the only ones whose removals are measured; None for all.
        verify: hold the removals that shares give against evaluations without the sample.
        progress: show a bar where replaying a segment takes longer than two seconds.
        removals: what was verified of an earlier part of the same run, with which this one goes on.

    Attributes:
        stopped_paths: whether the gradient depends on the parameters along paths that the loss stops, and whether the
            curvature follows them; None before the first step.
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
        at_once: int = 8,
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
        self._frozen_batch_norm, self._counterfactual = frozen_batch_norm, counterfactual
        self._samples = None if samples is None else set(samples)
        self._announced = False
        self.stopped_paths: Literal["none", "followed", "not followed"] | None = None
        self.removals = removals or Removals(unverifiable=None if verify else "verify=False")
        self.differenced = False
        self._capture = self._captured(exclude)
        self._autocast, self._exact, self._at_once = autocast, exact, at_once
        self._segment: _Segment | None = None
        self._size: int | None = None

    def __enter__(self) -> ReplayTrajectory:
        self._open = ExitStack()
        self._open.enter_context(_tried(self.module))
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
        self._evaluate(self.plan.step(0), self.plan.snapshot(0))
        return self.removals

    def gradient(self, index: int) -> Vectors:
        """The gradient of a step of `Plan.snapshots`, by parameter and in its shape."""
        planned, state = self.plan.step(index), self.plan.snapshot(index)
        return self._gradient(planned, state, _leaves(state.parameters))

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
        self._exact = True
        graph = self._evaluation(index).graph
        assert graph is not None
        here = {k: v.to(graph.parameters[k]) for k, v in vectors.items()}
        # under the same parameters, because a checkpointed module runs forward once more
        with placed(self.module, graph.parameters | _copies(self._state(index).buffers)):
            try:
                products = graph.hessian_product(here, at_once=self._at_once)
            except CurvatureUnavailable:
                if self.stopped_paths == "followed":
                    raise
                self.differenced = True
        if self.differenced:
            products = self._differenced(index, here)
        return {k: products[k].to(v) for k, v in vectors.items()}

    def _differenced(self, index: int, vectors: Vectors) -> Vectors:
        """Hessian products by differences of gradients, where the training step cannot be differentiated twice."""
        planned, state = self.plan.step(index), self._state(index)
        rows = []
        for i in range(len(next(iter(vectors.values())))):
            moved = self._slope(planned, state, {k: v[i].view_as(state.parameters[k]) for k, v in vectors.items()})
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
        set_modes(self.module, micro_batch.moment.in_eval)
        if micro_batch.random is not None:
            write_random_state(micro_batch.random)
        with at_moment(self.module, micro_batch.moment), self._autocast():
            self.removals.half |= torch.is_autocast_enabled(self.module.device.type)
            loss = training_loss(self.module, micro_batch.batch, micro_batch.moment.batch_idx)
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
        if evaluation.measured:
            each = sum(g.numel() * g.element_size() for g in evaluation.gradients.values())
            return sum(saved) + len(self._asked_of(planned)) * each
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
            ids = self._asked_of(planned)
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

    def _evaluate(self, planned: ReplayStep, state: State) -> _Evaluation:
        """Gradients and shares of a step, by the module's own training step."""
        leaves = _leaves(state.parameters)
        stopped = _leaves(state.parameters) if self._exact and self.stopped_paths == "followed" else {}
        captured: list[dict[str, Form]] = []
        buffers = [state.buffers]  # before each micro-batch, and after the last
        totals: dict[str, Tensor] = {}
        with differentiable_attention() if self._exact else nullcontext():
            for micro_batch in planned.micro_batches:
                gradients, shares, after = self._gradients(
                    leaves, buffers[-1], micro_batch, self._capture, stopped=stopped
                )
                captured += [] if shares is None else [shares]
                buffers.append(after)
                totals |= {k: totals[k] + g if k in totals else g for k, g in gradients.items()}
        if planned.hyper:  # a parameter that is frozen at this step has no gradient for the optimizer
            totals = {k: g for k, g in totals.items() if k in planned.hyper}
        gradients = {k: g.detach() for k, g in totals.items()}
        forms: dict[str, Form] | None = None
        if len(captured) == len(planned.micro_batches):
            forms = {k: _stacked([part[k] for part in captured]) for k in captured[0] if k in gradients}
            if not self._right(planned, state.parameters, buffers, gradients, forms):
                forms = None
        measured = forms is None
        if forms is None:
            form = partial(self._measured, planned, state.parameters, buffers, gradients)
        else:
            form = partial(dict[str, Form], forms)
        graph = GradientGraph(leaves, totals, stopped) if self._exact else None
        if self.stopped_paths is None and graph is not None:
            stops = self._stops(planned, leaves, buffers)
            self.stopped_paths = self._stopped_paths(planned, state, buffers, graph) if stops else "none"
            if self.stopped_paths == "followed":
                return self._evaluate(planned, state)
        return _Evaluation(gradients, graph, measured, buffers[-1], form)

    def _stops(self, planned: ReplayStep, leaves: dict[str, Tensor], buffers: Sequence[Mapping[str, Tensor]]) -> bool:
        """Whether the training step stops a path from a parameter, by ``detach`` or ``no_grad``."""
        watch = StopWatch()
        for micro_batch, before in zip(planned.micro_batches, buffers, strict=False):
            with placed(self.module, leaves | _copies(before)), watch:
                self._loss(micro_batch)
        return watch.seen

    def _stopped_paths(
        self,
        planned: ReplayStep,
        state: State,
        buffers: Sequence[Mapping[str, Tensor]],
        graph: GradientGraph,
    ) -> Literal["none", "followed", "not followed"]:
        """What has to be done about paths that the loss stops: nothing where following them changes no product; otherwise
        they are followed, if the products are then those of a finite difference.
        """
        direction = _random_direction(state.parameters)
        moved = self._slope(planned, state, direction)
        self.stopped_paths = "followed"
        followed = self._evaluate(planned, state).graph
        assert followed is not None
        plain, whole = (
            {k: p[0].double() for k, p in g.hessian_product({k: m.flatten()[None] for k, m in moved.items()}).items()}
            for g in (graph, followed)
        )
        if _distance(plain, whole) <= _SAME * _distance(whole, {k: torch.zeros_like(p) for k, p in whole.items()}):
            return "none"
        # <u, J v> for u = J v, by a difference of gradients and by the product with the transpose
        expected = sum(float(m.double().square().sum()) for m in moved.values())
        found = sum(float((whole[k] * direction[k].flatten()).sum()) for k in whole)
        return "followed" if abs(found - expected) <= _BENT * expected else "not followed"

    def _gradient(self, planned: ReplayStep, state: State, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        buffers: Mapping[str, Tensor] = state.buffers
        for micro_batch in planned.micro_batches:
            gradients, _, buffers = self._gradients(leaves, buffers, micro_batch, None, exact=False)
            total |= {k: total[k] + g if k in total else g for k, g in gradients.items()}
        return total

    def _slope(self, planned: ReplayStep, state: State, direction: Vectors) -> Vectors:
        """Central difference of a step's gradient along a direction of the parameters, by name and in their shapes."""
        length = math.sqrt(sum(float(d.double().square().sum()) for d in direction.values()))
        own = math.sqrt(sum(float(p.double().square().sum()) for p in state.parameters.values()))
        double = next(iter(state.parameters.values())).dtype == torch.float64
        size = (1e-5 if double else 1e-3) * own / max(length, 1e-30)
        sides: list[dict[str, Tensor]] = []
        for sign in (size, -size):
            leaves = _leaves({k: p + sign * direction[k] if k in direction else p for k, p in state.parameters.items()})
            sides.append(self._gradient(planned, state, leaves))
        return {k: (sides[0][k] - sides[1][k]) / (2 * size) for k in sides[0]}

    def _gradients(
        self,
        leaves: dict[str, Tensor],
        buffers: Mapping[str, Tensor],
        micro_batch: ReplayMicroBatch,
        capture: GradientCapture | None,
        *,
        exact: bool | None = None,
        stopped: dict[str, Tensor] | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Form] | None, dict[str, Tensor]]:
        """Gradients that a micro-batch has (the optimizer skips a parameter without one), shares, and buffers after it.

        Args:
            stopped: leaves for the paths that the loss stops (`stopped_paths`), to be followed.
        """
        if stopped and capture is not None:  # whose own hooks detach what they keep
            captured = self._gradients(leaves, buffers, micro_batch, capture, exact=False)
            followed = self._gradients(leaves, buffers, micro_batch, None, exact=exact, stopped=stopped)
            return followed[0], captured[1], followed[2]
        noted = OpenPaths()
        if stopped:
            with placed(self.module, stopped | _copies(buffers)), noted:
                self._loss(micro_batch)
        shares: dict[str, Form] | None = None
        with placed(self.module, leaves | _copies(buffers)) as inside:
            if capture is not None:
                capture.attach()
                capture.begin(micro_batch.n_samples)
            try:
                with NotedPaths(noted) if stopped else nullcontext():
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
        asked = self._asked_of(planned)
        started = time.perf_counter()
        changes = self._changes(planned, parameters, buffers, gradients, asked)
        self._announce((time.perf_counter() - started) / max(len(asked), 1))
        return {k: Dense(rows) for k, rows in changes.items()}

    def _announce(self, seconds: float) -> None:
        """Say once that removals are measured, and what it will take at ``seconds`` for each."""
        if self._announced or not self._progress:
            return
        self._announced = True
        n = sum(len(self._asked_of_ids(self.plan.sample_ids(t))) for t in range(len(self)))
        if n * seconds > _LONG:
            warnings.warn(
                f"every removal is measured by running its step without the sample, because {self.removals.reason}: {n} "
                f"removals, about {n * seconds:.0f} s for one pass over the run. samples= restricts it to the ones of interest.",
                stacklevel=2,
            )

    def _asked_of(self, planned: ReplayStep) -> Tensor:
        return self._asked_of_ids(planned.sample_ids)

    def _asked_of_ids(self, sample_ids: Tensor) -> Tensor:
        """The samples of a step whose removal is asked for, each once, in order of first appearance."""
        each = list(dict.fromkeys(sample_ids.tolist()))
        return torch.tensor([z for z in each if self._samples is None or z in self._samples], dtype=torch.int64)

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
                        batch=without(micro_batch.batch, own, micro_batch.n_samples)
                        if micro_batch.less is None
                        else micro_batch.less(z),
                        n_samples=micro_batch.n_samples - len(own),
                        factor=factor,
                    )
                    rest, *_ = evaluate(less)
                for k, total in change.items():
                    total += rest.get(k, 0.0) - whole.get(k, 0.0)  # type: ignore[operator]
            rows.append({k: c.flatten() for k, c in change.items()})
        if not rows:
            return {k: g.new_zeros(0, g.numel()) for k, g in gradients.items()}
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


def _random_direction(parameters: Vectors) -> Vectors:
    generator = torch.Generator().manual_seed(0)
    return {
        k: torch.randn(p.shape, generator=generator).to(p) * p.square().mean().sqrt() for k, p in parameters.items()
    }


def _leaves(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: p.detach().requires_grad_() for k, p in parameters.items()}


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of their own, since a training step may write to its buffers."""
    return {k: t.clone() for k, t in tensors.items()}


def _stacked(forms: Sequence[Form]) -> Form:
    return forms[0] if len(forms) == 1 else Stack(forms)


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
def _tried(module: LightningModule) -> Iterator[None]:
    """Quiet, with gradients, and as it was afterwards."""
    with unchanged(module), quiet(module), torch.enable_grad():
        yield


def _distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    return float(sum((a[k].double() - b[k].double()).square().sum() for k in b) ** 0.5)
