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
from lightning_influence.replay.measured_removals import MeasuredRemovals, WholeMicroBatch
from lightning_influence.replay.passes import Pass, Passes, leaves_of
from lightning_influence.replay.plan import PlannedMicroBatch, PlannedStep, State
from lightning_influence.replay.spread import Spread

StoppedPaths = Literal["none", "followed", "not followed"]

_SAME = 1e-4  # relative difference of two products that say the same
_SAME_HALF = 1e-2  # of two gradients in half precision
_BENT = 0.05  # relative, of the change of a gradient that its second derivative may miss


@dataclass(frozen=True)
class Evaluation:
    """The training step of one optimizer step, evaluated.

    Attributes:
        part: what this process evaluated, to which the graph belongs; the whole step, unless it is spread over processes.
        spread: whether it is.
        graph: None where the run is replayed without second derivatives.
        measured: whether the shares are changes of the gradient (`StepRecord.measured`).
        buffers: after the step.
        form: makes the shares, which are only measured where they are asked for.
    """

    part: PlannedStep
    spread: bool
    gradients: dict[str, Tensor]
    graph: GradientGraph | None
    measured: bool
    buffers: dict[str, Tensor]
    form: Callable[[], dict[str, Form]]

    @cached_property
    def shares(self) -> dict[str, Form]:
        return self.form()


@dataclass(frozen=True)
class _Ran:
    """The micro-batches that this process ran.

    Attributes:
        totals: their gradients, which can be differentiated again by the leaves and by those of stopped paths.
        captured: shares of each; None where hooks could not give them.
        parts: what each gave.
        buffers: before each, and after the last.
    """

    leaves: dict[str, Tensor]
    stopped: dict[str, Tensor]
    totals: dict[str, Tensor]
    captured: list[dict[str, Form]] | None
    parts: list[WholeMicroBatch]
    buffers: list[Mapping[str, Tensor]]


class StepEvaluator:
    """Evaluates the steps of a run.

    Args:
        removals: of the run: verifies the shares, and stands in for them.
        trained: names of the parameters that the run trains.
        exclude: patterns of parameters that train but are not scored.
        exact: whether gradients will be differentiated again.
        spread: over which processes; they all have to ask for the same steps, in the same order.

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
        spread: Spread | None = None,
    ) -> None:
        self.passes, self._removals, self.exact, self.spread = passes, removals, exact, spread or Spread()
        self.stopped_paths: StoppedPaths | None = None
        self._capture = self._hooks(trained, exclude)

    def _hooks(self, trained: Sequence[str], exclude: Sequence[str]) -> GradientCapture | None:
        """Hooks for the shares; None where the module's removals have to be measured."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of layers that are slow to capture
                return GradientCapture(self.passes.module, exclude=exclude, frozen_batch_norm=True, trained=trained)
        except ConfigurationError as error:
            self._removals.check.measure(str(error))
            return None

    @property
    def half(self) -> bool:
        """Whether steps are evaluated in half precision."""
        return self.passes.half

    def evaluate(self, planned: PlannedStep, state: State) -> Evaluation:
        """Gradients and shares of a step, by the module's own training step."""
        return self._evaluated(planned, state, self._part(planned))

    def _evaluated(self, planned: PlannedStep, state: State, part: PlannedStep) -> Evaluation:
        """The same, of which this process runs a part."""
        ran = self.spread.ranks.agreed(partial(self._run, part, state))
        buffers, captured = dict(ran.buffers[-1]), ran.captured
        totals = {k: g for k, g in ran.totals.items() if _is_stepped(k, planned)}
        gradients = {k: g.detach() for k, g in totals.items()}
        if part is not planned:
            if not self._adds_up(planned, state, ran):
                return self._evaluated(planned, state, planned)
            gradients = self.spread.sum(gradients, state.parameters)
            captured = self.spread.gathered(captured or [])
        shares = self._verified(planned, state, ran.parts, gradients, captured)
        if part is not planned and shares is None:  # removals are measured on the whole step
            return self._evaluated(planned, state, planned)
        graph = GradientGraph(ran.leaves, totals, ran.stopped) if self.exact else None
        if self.stopped_paths is None and graph is not None:
            stops = self.passes.stop_paths(planned, ran.leaves, ran.buffers)
            self.stopped_paths = self._paths_to_follow(planned, state, graph) if stops else "none"
            if self.stopped_paths == "followed":
                return self._evaluated(planned, state, planned)
        if self.spread.divides is None and self.spread.is_short(planned) and self._removals.check.verified:
            self.spread.divides = self._divides(planned, state, gradients)
        if shares is None:
            form = partial(self._removals.form, planned, state.parameters, ran.parts, gradients)
        else:
            form = partial(dict[str, Form], shares)
        return Evaluation(part, part is not planned, gradients, graph, shares is None, buffers, form)

    def gradients(self, planned: PlannedStep, state: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The gradients of a step, as `evaluate` finds them, and the buffers after it."""
        part = self._part(planned)
        with differentiable_attention() if self.exact else nullcontext():
            one = self.spread.ranks.agreed(partial(self.passes.whole, part, state))
            gradients = one.gradients
            if part is not planned:
                if not self._is_apart(planned, state, one.buffers, one.drew):
                    return self.gradients(planned, state)
                gradients = self.spread.sum(gradients, state.parameters)
        return {k: g for k, g in gradients.items() if _is_stepped(k, planned)}, one.buffers

    def nbytes(self, planned: PlannedStep, state: State) -> int:
        """Bytes that it takes to keep a step's evaluation; about the same for every step."""
        with _saved_bytes() as saved:
            evaluation = self.evaluate(planned, state)
        if evaluation.measured:
            each = sum(g.numel() * g.element_size() for g in evaluation.gradients.values())
            of_shares = len(self._removals.asked(planned.sample_ids)) * each
        else:
            of_shares = sum(nbytes(form) for form in evaluation.shares.values())
        return max(self.spread.ranks.gather(sum(saved) + of_shares))

    def _part(self, planned: PlannedStep) -> PlannedStep:
        """What this process evaluates of a step: the whole of it where there is something yet to be seen of it."""
        spread, check = self.spread, self._removals.check
        paths_known = self.stopped_paths is not None or not self.exact
        if (
            spread.ranks.size == 1
            or spread.whole
            or check.measuring
            or not paths_known
            or self._removals.is_due(planned)
        ):
            return planned
        return planned if spread.is_short(planned) and not spread.divides else spread.part(planned)

    def _run(self, part: PlannedStep, state: State) -> _Ran:
        leaves = leaves_of(state.parameters)
        stopped = leaves_of(state.parameters) if self.exact and self.stopped_paths == "followed" else {}
        captured: list[dict[str, Form]] = []
        parts: list[WholeMicroBatch] = []
        buffers: list[Mapping[str, Tensor]] = [state.buffers]
        totals: dict[str, Tensor] = {}
        with differentiable_attention() if self.exact else nullcontext():
            for micro_batch in part.micro_batches:
                one = self._pass(leaves, buffers[-1], micro_batch, stopped)
                captured += [] if one.shares is None else [one.shares]
                parts.append(WholeMicroBatch(buffers[-1], {k: g.detach() for k, g in one.gradients.items()}, one.drew))
                buffers.append(one.buffers)
                totals |= {k: totals[k] + g if k in totals else g for k, g in one.gradients.items()}
        complete = len(captured) == len(part.micro_batches)
        return _Ran(leaves, stopped, totals, captured if complete else None, parts, buffers)

    def _adds_up(self, planned: PlannedStep, state: State, ran: _Ran) -> bool:
        """Whether a step is the sum of what the processes ran; if not, it has to be evaluated whole."""
        apart = self._is_apart(planned, state, ran.buffers[-1], any(part.drew for part in ran.parts))
        self._removals.adopt(self.spread.ranks)
        return apart and not self._removals.check.measuring

    def _is_apart(self, planned: PlannedStep, state: State, buffers: Mapping[str, Tensor], drew: bool) -> bool:
        """Whether no micro-batch is another by what the others do: none leaves something in a buffer, and none of which samples
        were left out draws random numbers. The processes agree, and remember where it is not so.
        """
        left = any(not torch.equal(b, state.buffers[k]) for k, b in buffers.items())
        of_all = self.spread.ranks.gather((left, drew and self.spread.is_short(planned)))
        self.spread.whole |= any(left for left, _ in of_all)
        if any(drew for _, drew in of_all):
            self.spread.divides = False
        return not any(left or drew for left, drew in of_all)

    def _divides(self, planned: PlannedStep, state: State, gradients: Vectors) -> bool:
        """Whether the gradients of the processes' samples add up to that of the step."""
        part = self.spread.part(planned, divided=True)
        one = self.spread.ranks.agreed(partial(self.passes.whole, part, state))
        total = self.spread.sum(one.gradients, state.parameters)
        missed = distance({k: total.get(k, torch.zeros_like(g)) for k, g in gradients.items()}, gradients)
        size = distance({k: torch.zeros_like(g) for k, g in gradients.items()}, gradients)
        return not any(self.spread.ranks.gather(one.drew)) and missed <= (_SAME_HALF if self.half else _SAME) * size

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
                self._removals.check.measure(str(error))
                self._capture = None
        return self.passes.run(leaves, buffers, micro_batch, exact=self.exact, stopped=stopped)

    def _verified(
        self,
        planned: PlannedStep,
        state: State,
        parts: Sequence[WholeMicroBatch],
        gradients: Vectors,
        captured: Sequence[Mapping[str, Form]] | None,
    ) -> dict[str, Form] | None:
        """The shares of a step; None where the removals of its samples have to be measured."""
        shares: dict[str, Form] | None = None
        if captured is not None:
            stacked = {k: _stacked([part[k] for part in captured]) for k in captured[0] if k in gradients}
            shares = stacked if self._removals.agree(planned, state.parameters, parts, gradients, stacked) else None
        self._removals.adopt(self.spread.ranks)
        return None if self._removals.check.measuring else shares

    def _paths_to_follow(self, planned: PlannedStep, state: State, graph: GradientGraph) -> StoppedPaths:
        """What has to be done about paths that the loss stops: nothing where following them changes no product; otherwise
        they are followed, if the products are then those of a finite difference.
        """
        direction = _random_direction(state.parameters)
        moved = self.passes.slope(planned, state, direction)
        self.stopped_paths = "followed"
        followed = self._evaluated(planned, state, planned).graph
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


def _is_stepped(name: str, planned: PlannedStep) -> bool:
    """Whether a parameter has a gradient for the optimizer, which one that is frozen at this step has not."""
    return not planned.hyper or name in planned.hyper


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
    held: list[int] = []
    saved: list[Tensor] = []  # autograd is given positions: a node that held its own output would never be freed

    def pack(tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        saved.append(tensor)
        return len(saved) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, saved.__getitem__):
        yield held
    held.extend(sizes.values())
    saved.clear()
