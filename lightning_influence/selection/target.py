"""The gradient of the target at every step of a run, at a fraction of the cost of reading all queries at every step.

The target of selection is the mean loss of the queries, or a function of the module in their place.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import lightning as L
import torch
from torch import Tensor

from lightning_influence.core.trajectory import Vectors
from lightning_influence.errors import ConfigurationError, InfluenceError
from lightning_influence.run.batches import batch_size, leaves, samples_of, without
from lightning_influence.run.parameters import parameters_at
from lightning_influence.run.random_state import random_state
from lightning_influence.run.task import as_task
from lightning_influence.run.unchanged import Apart
from lightning_influence.scoring.queries import mean_gradients, query_losses
from lightning_influence.scoring.query_loss import Traits

TargetLoss: TypeAlias = Callable[[L.LightningModule], Tensor]
"""``module -> scalar loss`` at the module's present parameters."""

_KEPT_BYTES = 2**26
_LOOKED_AT_EVERY = 100  # steps, after which the loss may be another


def target_gradient(
    module: L.LightningModule,
    queries: Any,
    names: Sequence[str],
    select: Callable[[str, Tensor], Tensor],
    traits: Traits | None = None,
) -> Vectors:
    """Gradient of the mean target loss at the module's parameters, ``(1, d)`` each; the rest as of `target_gradients`."""
    return target_gradients(module, queries, names, select, [{}], traits)[0]


def target_gradients(
    module: L.LightningModule,
    queries: Any,
    names: Sequence[str],
    select: Callable[[str, Tensor], Tensor],
    places: Sequence[Mapping[str, Tensor]],
    traits: Traits | None = None,
    whole: Any = None,
) -> list[Vectors]:
    """Gradients of the mean target loss at several places.

    Args:
        queries: batches, or a `TargetLoss`.
        names, select, places, traits: as of `queries.mean_gradients`.
        whole: the batches of which those of ``queries`` are a part.

    Raises:
        InfluenceError: one is not finite; the text names the examples.
    """
    with random_state(None):  # a function, or a hook that prepares a batch, may draw random numbers
        if callable(queries):
            gradients = [_of_function(module, queries, names, select, place) for place in places]
        else:
            gradients = mean_gradients(module, queries, names, select, places, Traits() if traits is None else traits)
    finite = [bool(torch.stack([g.sum() for g in one.values()]).isfinite().all()) for one in gradients]
    for place, one, sums_are in zip(places, gradients, finite, strict=True):
        if not sums_are and not all(g.isfinite().all() for g in one.values()):  # a sum alone may overflow
            with parameters_at(module, place):
                cause = _cause(module, queries if whole is None else whole)
            raise InfluenceError(
                f"the gradient of the target is not finite: {cause}. Every score would be NaN, and what is kept would be chosen at "
                "random."
            )
    return gradients


def _of_function(
    module: L.LightningModule,
    queries: TargetLoss,
    names: Sequence[str],
    select: Callable[[str, Tensor], Tensor],
    place: Mapping[str, Tensor],
) -> Vectors:
    with parameters_at(module, place):
        parameters = dict(module.named_parameters())
        chosen = [parameters[name] for name in names]
        with as_task(module).unchanged(), torch.enable_grad():
            loss = queries(module)
            gradients = torch.autograd.grad(loss, chosen, allow_unused=True, materialize_grads=True)
        return {k: select(k, g)[None] for k, g in zip(names, gradients, strict=True)}


def _cause(module: L.LightningModule, queries: Any) -> str:
    """Which examples make a target's gradient not finite."""
    if callable(queries):
        return "that of the function given as queries="
    wrong, n_examples = [], 0
    for number, batch in enumerate(queries):
        for row, loss in enumerate(query_losses(module, [batch]).tolist()):
            n_examples += 1
            if not math.isfinite(loss):
                wrong.append(f"example {row} of its batch {number} has a loss of {loss}")
    if not n_examples:
        return "which of its examples makes it so cannot be told of a target that is read only once"
    if not wrong:
        return "every loss of its examples is, but not its derivative"
    if len(wrong) == n_examples:
        return "no example has a finite loss at the present parameters, so it is these that diverged; lower the learning rate"
    others = f", and so have {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return f"{wrong[0]}{others}; leave such examples out of the target"


def is_loss_of_module(queries: Any) -> bool:
    """Whether queries are a `TargetLoss` rather than data or a method without arguments that gives them."""
    if not callable(queries) or isinstance(queries, Iterable):
        return False
    try:
        signature = inspect.signature(queries)
        signature.bind()
    except (TypeError, ValueError):  # it needs an argument, or does not say
        return True
    return any(p.kind == p.VAR_POSITIONAL for p in signature.parameters.values())


class Joined:
    """The batches of loaders, one loader after the other, read without a trace in what they may share with the training loader."""

    def __init__(self, loaders: Sequence[Any]) -> None:
        self.loaders = loaders

    def __iter__(self) -> Iterator[Any]:
        for loader in self.loaders:
            batches: Iterator[Any] | None = None
            apart = Apart(loader)
            while True:
                with apart():
                    batches = iter(loader) if batches is None else batches
                    try:
                        batch = next(batches)
                    except StopIteration:
                        break
                yield batch


class FiniteExamples:
    """Batches without the examples whose loss is not finite at the module's present parameters.

    Args:
        tell: told how many a pass left out, at the first pass that leaves some out and whenever their number changes.

    Raises:
        InfluenceError: when read, and no example is left.
    """

    def __init__(self, batches: Iterable[Any], module: L.LightningModule, tell: Callable[[int], None]) -> None:
        self.batches, self._module, self._tell = batches, module, tell
        self._left_out = 0

    def __iter__(self) -> Iterator[Any]:
        n_left, n_left_out = 0, 0
        for batch in self.batches:
            finite = query_losses(self._module, [batch]).isfinite()
            n_left, n_left_out = n_left + int(finite.sum()), n_left_out + int((~finite).sum())
            if finite.all():
                yield batch
            elif finite.any():
                yield without(batch, (~finite).nonzero()[:, 0], len(finite))
        if not n_left:
            raise InfluenceError(
                f"none of the {n_left_out} examples of the target that were read has a finite loss, so nothing is left of it; lower "
                "the learning rate, or give other queries, as a list or a loader that can be read again."
            )
        if n_left_out != self._left_out:
            self._left_out = n_left_out
            self._tell(n_left_out)


class LiveTarget:
    """Gradient of the target loss at parameters that move.

    Args:
        every: optimizer steps in which the whole target is read once.

    The whole target is read once in ``every`` steps. Whenever it is needed in between, the next part of it tells how far
    its gradient has moved since, which is a control variate, as in SVRG (Johnson and Zhang 2013):

        grad f(theta)  ~  grad f(theta_r) + grad f_part(theta) - grad f_part(theta_r)

    A gradient that is merely kept lets selection push in one direction until the next reading; at a learning rate of 1e-3
    that selects worse than chance (docs/benchmarks.md).
    """

    def __init__(self, every: int) -> None:
        if every < 1:
            raise ConfigurationError(f"refresh_target_every={every}; it counts optimizer steps and is at least 1.")
        self.every = every
        self._reading: _Reading | None = None
        self._parts: Iterator[list[Any]] | None = None
        self._kept: list[Any] | None = None  # the batches of a small target, which its loader then gives once
        self._part: _Part | None = None  # the last one
        self._traits = Traits()  # of the loss
        self._looked_at = 0  # the step of the run at which they were looked for

    def gradient(
        self,
        module: L.LightningModule,
        queries: Any,
        select: Callable[[str, Tensor], Tensor],
        step: int,
        *,
        again: bool = False,
    ) -> Vectors:
        """At the module's present parameters, ``(1, d)`` for each that is trained.

        Args:
            queries: batches, read as said; a function of the module has no parts and is read every time.
            step: the optimizer step that is about to be taken.
            again: the step was asked for before, with more samples in it; the part of the target is then the same.
        """
        names = [k for k, p in module.named_parameters() if p.requires_grad]
        if callable(queries):
            return target_gradient(module, queries, names, select)
        batches = queries if self._kept is None else self._kept
        if self.every == 1 or self._reading is None or (step % self.every == 0 and step != self._reading.step):
            return self._read(module, batches, names, select, step)
        if again and self._part is not None:
            then = self._part.then
            (now,) = target_gradients(module, self._part.batches, names, select, [{}], self._traits, whole=batches)
        else:
            part = self._next_part(batches)
            places = [{}, self._reading.parameters]
            now, then = target_gradients(module, part, names, select, places, self._traits, whole=batches)
            self._part = _Part(part, then)
        return {k: self._reading.gradient[k].to(now[k]) + now[k] - then[k] for k in names}

    def _read(
        self,
        module: L.LightningModule,
        batches: Iterable[Any],
        names: Sequence[str],
        select: Callable[[str, Tensor], Tensor],
        step: int,
    ) -> Vectors:
        self._part = None
        seen = _Seen(batches)
        if step >= self._looked_at + _LOOKED_AT_EVERY:
            self._traits, self._looked_at = Traits(wrong=self._traits.wrong), step
        gradient = target_gradient(module, seen, names, select, traits=self._traits)
        self._kept = seen.kept
        if self.every > 1:
            parameters = {k: p.detach().clone() for k, p in module.named_parameters() if k in gradient}
            self._reading, self._parts = _Reading(step, gradient, parameters, seen.n_examples), None
        return gradient

    def _next_part(self, batches: Iterable[Any]) -> list[Any]:
        assert self._reading is not None
        with random_state(None):
            if self._parts is None:
                self._parts = _round_and_round(batches, -(-self._reading.n_examples // self.every))
                for _ in range(self._reading.taken):  # a resumed run continues with the next part
                    next(self._parts)
            self._reading.taken += 1
            return next(self._parts)

    def state_dict(self) -> dict[str, Any] | None:
        """What a run that is resumed needs, to go on as if it had not been interrupted."""
        return None if self._reading is None else asdict(self._reading)

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on from a `state_dict`."""
        self._reading, self._parts = None if state is None else _Reading(**state), None


@dataclass
class _Reading:
    """The target as it was last read whole.

    Attributes:
        step: of the run, at which it was read.
        gradient, parameters: there.
        n_examples: of the target.
        taken: parts that were read since.
    """

    step: int
    gradient: Vectors
    parameters: dict[str, Tensor]
    n_examples: int
    taken: int = 0


@dataclass(frozen=True)
class _Part:
    """The part of the target that tells how its gradient has moved at a step.

    Attributes:
        then: its gradient where the whole target was last read.
    """

    batches: list[Any]
    then: Vectors


class _Seen:
    """Batches as they pass.

    Attributes:
        n_examples: that have passed.
        kept: the batches, unless they are too large together.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches, self.n_examples, self._bytes = batches, 0, 0
        self.kept: list[Any] | None = []

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.n_examples += batch_size(batch)
            self._bytes += sum(leaf.nbytes for leaf in leaves(batch))
            if self._bytes > _KEPT_BYTES:
                self.kept = None
            if self.kept is not None:
                self.kept.append(batch)
            yield batch


def _round_and_round(queries: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of batches with ``size`` examples together, in pass after pass over the queries."""
    part, n = list[Any](), 0
    while True:
        batches = iter(queries)
        if batches is queries:
            raise ConfigurationError(
                f"the target is a {type(queries).__name__}, which can be read only once; give a loader or a list of batches."
            )
        for batch in batches:
            start = 0
            while start < batch_size(batch):
                part.append(samples_of(batch, slice(start, start + size - n)))
                n_cut = batch_size(part[-1])
                start, n = start + n_cut, n + n_cut
                if n == size:
                    yield part
                    part, n = [], 0
