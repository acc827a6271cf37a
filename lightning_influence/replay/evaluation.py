"""One optimizer step evaluated: its gradient, what stands for its samples, and the graph of its second derivatives."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor

from lightning_influence.capture import GradientCapture
from lightning_influence.core.curvature import GradientGraph, differentiable_attention
from lightning_influence.core.shares import Form, Stack, nbytes
from lightning_influence.core.trajectory import Vectors
from lightning_influence.errors import ConfigurationError
from lightning_influence.replay.measured_removals import MeasuredRemovals, Part
from lightning_influence.replay.passes import Pass, Passes, leaves_of
from lightning_influence.replay.plan import PlannedMicroBatch, PlannedStep, State

StoppedPaths = Literal["none", "followed", "not followed"]

_SAME = 1e-4  # relative difference of two products that say the same
_BENT = 0.05  # relative, of the change of a gradient that its second derivative may miss


@dataclass(frozen=True)
class Evaluation:
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


class StepEvaluator:
    """Evaluates the steps of a run.

    Args:
        removals: of the run: verifies the shares, and stands in for them.
        trained: names of the parameters that the run trains.
        exclude: patterns of parameters that train but are not scored.
        exact: whether gradients will be differentiated again.

    Attributes:
        passes: by which it runs them.
        stopped_paths: whether the gradient depends on the parameters along paths that the loss stops, and whether the
            curvature follows them; None before the first exact evaluation.
    """

    def __init__(
        self,
        passes: Passes,
        removals: MeasuredRemovals,
        trained: Sequence[str],
        exclude: Sequence[str] = (),
        *,
        exact: bool = True,
    ) -> None:
        self.passes, self._removals, self.exact = passes, removals, exact
        self.stopped_paths: StoppedPaths | None = None
        self._capture = self._hooks(trained, exclude)

    def _hooks(self, trained: Sequence[str], exclude: Sequence[str]) -> GradientCapture | None:
        """Hooks for the shares; None where the module's removals have to be measured."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of layers that are slow to capture
                return GradientCapture(self.passes.module, exclude=exclude, frozen_batch_norm=True, trained=trained)
        except ConfigurationError as error:
            self._removals.found.measure(str(error))
            return None

    @property
    def half(self) -> bool:
        """Whether steps are evaluated in half precision."""
        return self.passes.half

    def evaluate(self, planned: PlannedStep, state: State) -> Evaluation:
        """Gradients and shares of a step, by the module's own training step."""
        leaves = leaves_of(state.parameters)
        stopped = leaves_of(state.parameters) if self.exact and self.stopped_paths == "followed" else {}
        captured: list[dict[str, Form]] = []
        parts: list[Part] = []
        buffers = [state.buffers]  # before each micro-batch, and after the last
        totals: dict[str, Tensor] = {}
        with differentiable_attention() if self.exact else nullcontext():
            for micro_batch in planned.micro_batches:
                one = self._pass(leaves, buffers[-1], micro_batch, stopped)
                captured += [] if one.shares is None else [one.shares]
                parts.append(Part(buffers[-1], {k: g.detach() for k, g in one.gradients.items()}, one.drew))
                buffers.append(one.buffers)
                totals |= {k: totals[k] + g if k in totals else g for k, g in one.gradients.items()}
        if planned.hyper:  # a parameter that is frozen at this step has no gradient for the optimizer
            totals = {k: g for k, g in totals.items() if k in planned.hyper}
        gradients = {k: g.detach() for k, g in totals.items()}
        shares = self._verified(planned, state, parts, gradients, captured)
        graph = GradientGraph(leaves, totals, stopped) if self.exact else None
        if self.stopped_paths is None and graph is not None:
            stops = self.passes.stop_paths(planned, leaves, buffers)
            self.stopped_paths = self._paths_to_follow(planned, state, graph) if stops else "none"
            if self.stopped_paths == "followed":
                return self.evaluate(planned, state)
        if shares is None:
            form = partial(self._removals.form, planned, state.parameters, parts, gradients)
        else:
            form = partial(dict[str, Form], shares)
        return Evaluation(gradients, graph, shares is None, buffers[-1], form)

    def gradients(self, planned: PlannedStep, state: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The gradients of a step, as `evaluate` finds them, and the buffers after it."""
        with differentiable_attention() if self.exact else nullcontext():
            one = self.passes.whole(planned, state)
        return {k: g for k, g in one.gradients.items() if not planned.hyper or k in planned.hyper}, one.buffers

    def nbytes(self, planned: PlannedStep, state: State) -> int:
        """Bytes that it takes to keep a step's evaluation; about the same for every step."""
        with _saved_bytes() as saved:
            evaluation = self.evaluate(planned, state)
        if evaluation.measured:
            each = sum(g.numel() * g.element_size() for g in evaluation.gradients.values())
            return sum(saved) + len(self._removals.asked(planned.sample_ids)) * each
        return sum(saved) + sum(nbytes(form) for form in evaluation.shares.values())

    def _pass(
        self,
        leaves: dict[str, Tensor],
        buffers: Mapping[str, Tensor],
        micro_batch: PlannedMicroBatch,
        stopped: dict[str, Tensor],
    ) -> Pass:
        """A pass with its shares, while hooks can give them."""
        if self._capture is not None:
            try:
                return self.passes.run(
                    leaves, buffers, micro_batch, exact=self.exact, capture=self._capture, stopped=stopped
                )
            except ConfigurationError as error:
                self._removals.found.measure(str(error))
                self._capture = None
        return self.passes.run(leaves, buffers, micro_batch, exact=self.exact, stopped=stopped)

    def _verified(
        self,
        planned: PlannedStep,
        state: State,
        parts: Sequence[Part],
        gradients: Vectors,
        captured: Sequence[Mapping[str, Form]],
    ) -> dict[str, Form] | None:
        """The shares of a step; None where the removals of its samples have to be measured."""
        if len(captured) < len(planned.micro_batches):
            return None
        shares = {k: _stacked([part[k] for part in captured]) for k in captured[0] if k in gradients}
        return shares if self._removals.agree(planned, state.parameters, parts, gradients, shares) else None

    def _paths_to_follow(self, planned: PlannedStep, state: State, graph: GradientGraph) -> StoppedPaths:
        """What has to be done about paths that the loss stops: nothing where following them changes no product; otherwise
        they are followed, if the products are then those of a finite difference.
        """
        direction = _random_direction(state.parameters)
        moved = self.passes.slope(planned, state, direction)
        self.stopped_paths = "followed"
        followed = self.evaluate(planned, state).graph
        assert followed is not None
        plain, whole = (
            {k: p[0].double() for k, p in g.hessian_product({k: m.flatten()[None] for k, m in moved.items()}).items()}
            for g in (graph, followed)
        )
        if distance(plain, whole) <= _SAME * distance(whole, {k: torch.zeros_like(p) for k, p in whole.items()}):
            return "none"
        # <u, J v> for u = J v, by a difference of gradients and by the product with the transpose
        expected = sum(float(m.double().square().sum()) for m in moved.values())
        slope = sum(float((whole[k] * direction[k].flatten()).sum()) for k in whole)
        return "followed" if abs(slope - expected) <= _BENT * expected else "not followed"


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Euclidean, over the tensors of ``b``."""
    return float(sum((a[k].double() - b[k].double()).square().sum() for k in b) ** 0.5)


def _random_direction(parameters: Vectors) -> Vectors:
    generator = torch.Generator().manual_seed(0)
    return {
        k: torch.randn(p.shape, generator=generator).to(p) * p.square().mean().sqrt() for k, p in parameters.items()
    }


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
