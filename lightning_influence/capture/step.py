"""One optimizer step of a live run, collected: its samples, their shares, and what the optimizer is about to consume.

The order of calls within one optimizer step is ``begin`` and ``after_backward`` once per micro-batch, and ``before_step``
once, when all gradients are there and none is clipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor

from lightning_influence.capture.hooks import GradientCapture
from lightning_influence.capture.sums import SumCheck
from lightning_influence.core.optimizers import UPDATES, coupling
from lightning_influence.core.shares import Form, Stack
from lightning_influence.core.trajectory import Clip, StepRecord
from lightning_influence.errors import ConfigurationError, InfluenceError, check_choice
from lightning_influence.run.optimizer import read_hypers, read_moments, update_name
from lightning_influence.run.ranks import Ranks
from lightning_influence.run.refusals import refuse_unowned
from lightning_influence.run.sample_weights import WeightSource
from lightning_influence.run.sharding import local

_CHANGE_TOLERANCE = 1e-3  # relative, of a gradient's norm


@dataclass(frozen=True)
class StepOptions:
    """How the loss of a step is made of its samples, and which parameters are looked at: of recording and of selecting.

    Attributes:
        reduction: whether the training loss is a mean or a sum over its samples.
        sample_weights: as of `sample_weights.sample_weights`; None for the weights in the loss that is called.
        exclude: patterns (`fnmatch`) of parameter names to leave out.
        frozen_batch_norm: train batch normalisation with its running statistics.
        verify: hold what per-sample gradients say against the training step without a sample, and their sum against the gradient.

    Raises:
        ConfigurationError: an unknown reduction.
    """

    reduction: Literal["mean", "sum"] = "mean"
    sample_weights: WeightSource = None
    exclude: Sequence[str] = ()
    frozen_batch_norm: bool = False
    verify: bool = True

    def __post_init__(self) -> None:
        check_choice("reduction", self.reduction, ("mean", "sum"))
        object.__setattr__(self, "exclude", (self.exclude,) if isinstance(self.exclude, str) else tuple(self.exclude))

    @property
    def averaged(self) -> bool:
        """Whether the loss is a mean."""
        return self.reduction == "mean"

    @property
    def reads_the_loss(self) -> bool:
        """Whether the weights of the samples are those in the loss that the training step calls."""
        return self.averaged and self.sample_weights is None

    def check(self, module: torch.nn.Module) -> None:
        """Refuse a pattern that leaves out nothing, which is misspelt, and patterns that leave nothing in.

        Raises:
            ConfigurationError: there are such.
        """
        trains = {name: p.requires_grad for name, p in module.named_parameters()}
        matched = {pattern: {name for name in trains if fnmatchcase(name, pattern)} for pattern in self.exclude}
        for pattern, names in matched.items():
            if not names:
                raise ConfigurationError(
                    f"exclude={pattern!r} matches no parameter of {type(module).__name__}, which has {', '.join(trains):.200}; "
                    "give their names, or patterns of them."
                )
        recorded = {name for name in trains if trains[name]}.difference(*matched.values())
        if self.exclude and not recorded:
            raise ConfigurationError(
                f"exclude={', '.join(self.exclude)!r} leaves out every parameter that trains; leave one to be recorded."
            )


@dataclass(frozen=True)
class Samples:
    """The samples of one micro-batch.

    Attributes:
        ids: ``(n,)`` int64.
        loss_weights: ``(n,)`` float64, as of `StepRecord`.
    """

    ids: Tensor
    loss_weights: Tensor

    @classmethod
    def weighted(cls, ids: Tensor, weights: Tensor, parts: int, *, averaged: bool) -> Samples:
        """From relative weights.

        Args:
            parts: the number of losses that the step averages: of micro-batches, times processes.
            averaged: whether the loss of a micro-batch is a mean over its samples.
        """
        weights = weights.detach().to("cpu", torch.float64)
        return cls(ids, (weights / weights.sum() if averaged else weights) / parts)

    @staticmethod
    def columns(micro_batches: Sequence[Samples]) -> tuple[Tensor, Tensor, Tensor]:
        """``sample_ids``, ``loss_weights`` and ``micro_batch_numbers`` of a `StepRecord`, ``(n,)`` each."""
        return (
            torch.cat([m.ids for m in micro_batches]),
            torch.cat([m.loss_weights for m in micro_batches]),
            torch.cat([torch.full_like(m.ids, i) for i, m in enumerate(micro_batches)]),
        )


@dataclass(frozen=True)
class CollectedStep:
    """The step that an optimizer is about to take.

    Attributes:
        record: on every coordinate. Its tensors are the optimizer's and the module's own, which the step changes.
        shares: of the samples, by captured parameter; also of those without a gradient at this step.
    """

    record: StepRecord
    shares: dict[str, Form]


class StepCollector:
    """Collects the optimizer steps of a training loop, one at a time.

    Args:
        module: whose parameters train.
        optimizer: the one that moves them.
        capture: attached to the module; None where per-sample gradients are not collected.
        averaged: whether the training loss is a mean over its samples.
        ranks: the processes whose gradients are averaged.
        otherwise: what a user can do whose per-sample gradients do not add up to the gradient, for the error's text.
        verify: hold their sum against the gradient at every step, on a few coordinates of every parameter.
        give_up: told why per-sample gradients cannot be collected, and that they are not from here on; None to raise that.

    Attributes:
        compress: what is kept of a parameter's shares, as soon as they are there; None for everything.
        settle: called once, when all processes have collected their first step, where they have to agree on what they give up.

    Raises:
        UnsupportedOptimizer: the optimizer's step is not a known function.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        capture: GradientCapture | None,
        averaged: bool = True,
        ranks: Ranks | None = None,
        otherwise: str = "use record='replay'",
        verify: bool = True,
        give_up: Callable[[ConfigurationError], None] | None = None,
    ) -> None:
        self._give_up = give_up
        self.module, self.optimizer, self.capture = module, optimizer, capture
        self.averaged, self.ranks, self.update_name = averaged, ranks or Ranks(), update_name(optimizer)
        self.compress: Callable[[str, Form], Form] | None = None
        self.settle: Callable[[], None] | None = None
        self._otherwise = otherwise
        self._names = {id(p): name for name, p in module.named_parameters()}
        self._started: _Started | None = None
        self._micro_batches: list[tuple[Samples, dict[str, Form]]] = []
        self._norm: Tensor | None = None  # of the gradient after the last backward pass
        self._sums = None if capture is None or not verify else SumCheck(capture.parameters)
        self._local_scale = 1.0  # of the gradients of this process alone, in the step's
        several = self._sums is not None and self.ranks.size > 1
        self._handles = self._sums.watch_local() if self._sums is not None and several else []

    def begin(self, sample_ids: Tensor, weights: Tensor, accumulated: int) -> None:
        """A micro-batch is about to be run.

        Args:
            sample_ids: ``(n,)`` int64.
            weights: ``(n,)``, relative weights of the samples in the loss (tokens, say).
            accumulated: micro-batches by whose number its loss is divided.
        """
        self._started = _Started(sample_ids, weights, accumulated)
        if self.capture is not None:
            self.capture.begin(len(sample_ids))

    def before_zero_grad(self) -> None:
        """Gradients are about to be cleared, and with them those of micro-batches that no step has consumed."""
        self._micro_batches.clear()
        if self._sums is not None:
            self._sums.forget()

    def before_backward(self, index: int) -> None:
        """Gradients have been cleared, if this is a step's first micro-batch.

        Raises:
            ConfigurationError: they were not.
        """
        if self.capture is not None:
            self.capture.end_forward()
        if self._micro_batches:
            return
        left = total_norm(p.grad for p in self.parameters())
        if float(left) > 0:
            raise ConfigurationError(
                f"step {index}: a gradient of norm {float(left):.6g} is left of the last step, to which the backward pass "
                "adds: optimizer.zero_grad() was not called, or optimizer_zero_grad is overridden and does not clear it. Influence follows steps whose gradients are "
                "those of their own batches; clear them, and keep a running mean in the optimizer (momentum)."
            )

    @property
    def first_of_step(self) -> bool:
        """Whether the last micro-batch is the first of its step."""
        return len(self._micro_batches) == 1

    @property
    def inside_a_step(self) -> bool:
        """Whether micro-batches have been collected that no step has consumed."""
        return bool(self._micro_batches)

    def weigh(self, weights: Tensor) -> None:
        """The weights of the micro-batch's samples as its loss turned out to have them."""
        if self._started is not None:
            self._started = replace(self._started, weights=weights)

    def after_backward(self, loss_scale: float = 1.0, *, watch: bool = False) -> Samples | None:
        """Collect the micro-batch's shares.

        Args:
            loss_scale: what the loss was multiplied with.
            watch: remember the gradient's norm, since something may change gradients before the step.

        Returns:
            The micro-batch's samples; None where no micro-batch was begun.
        """
        if self._started is None:
            return None
        self._norm = total_norm(p.grad for p in self.parameters()) / loss_scale if watch else None
        shares: dict[str, Form] = {}
        if self.capture is not None:
            self._local_scale = 1.0 / (loss_scale * self.ranks.size)
            with self._may_give_up():
                shares = self.capture.take(self._local_scale)
            if self._sums is not None:
                self._sums.add(shares)
        if self.compress is not None:
            shares = {name: self.compress(name, share) for name, share in shares.items()}
        started, self._started = self._started, None
        parts = started.accumulated * self.ranks.size
        samples = Samples.weighted(started.sample_ids, started.weights, parts, averaged=self.averaged)
        self._micro_batches.append((samples, shares))
        return samples

    def before_step(self, index: int, clip: Clip, *, may_skip: bool = False) -> CollectedStep | None:
        """All gradients are there, not yet clipped.

        Args:
            index: of the step.
            clip: rule and bound; the norm is measured here.
            may_skip: the optimizer may skip the step where the gradient is not finite (loss scaling).

        Returns:
            The step; None where every batch was skipped, or the step will be.

        Raises:
            InfluenceError: a gradient that is not finite.
            ConfigurationError: shares that do not sum to the gradient, or a gradient nobody collected.
        """
        micro_batches, self._micro_batches = self._micro_batches, []
        if not micro_batches:  # training_step returned None
            return None
        norm = total_norm(p.grad for p in self.parameters())
        if not torch.isfinite(norm):
            if may_skip:
                return None
            raise InfluenceError(
                f"step {index}: the gradient's norm is {float(norm)}, so its influence is undefined. Lower the learning rate, "
                "clip the gradient, or look for the loss that is not finite with Trainer(detect_anomaly=True)."
            )
        self._refuse_changed(index, norm)
        shares: dict[str, Form] = {}
        with self._may_give_up():
            self._refuse_uncollected(index)
            shares = self._of_step([part for _, part in micro_batches])
            self._refuse_other_sums(index, float(norm))
        settle, self.settle = self.settle, None
        if settle is not None:
            settle()
        if self.capture is None:
            shares = {}
        refuse_unowned(self.module, self.optimizer)
        ids, loss_weights, numbers = Samples.columns([samples for samples, _ in micro_batches])
        trained = {self._names[id(p)]: p for p in self.parameters() if p.grad is not None}
        collected = {name: p for name, p in trained.items() if name in shares}
        hyper, state = read_hypers(self.optimizer, trained), self.optimizer.state
        update = UPDATES[self.update_name]
        record = StepRecord(
            index=index,
            sample_ids=ids,
            loss_weights=loss_weights,
            micro_batch_numbers=numbers,
            gradients={k: p.grad.detach().flatten() for k, p in collected.items() if p.grad is not None},
            moments={
                k: tuple(m.flatten() for m in read_moments(state.get(p, {}), update, p)) for k, p in collected.items()
            },
            hyper=hyper,
            averaged=self.averaged,
            clip=replace(clip, raw_norm=float(norm)),
            parameters={k: p.detach().flatten() for k, p in collected.items() if coupling(hyper[k])},
        )
        return CollectedStep(record, shares)

    def _of_step(self, parts: Sequence[Mapping[str, Form]]) -> dict[str, Form]:
        """The shares of a step's micro-batches together; none where they are not collected any more."""
        if self.capture is None:
            return {}
        return {
            name: share if len(parts) == 1 else Stack([part[name] for part in parts])
            for name, share in parts[0].items()
        }

    @contextmanager
    def _may_give_up(self) -> Iterator[None]:
        try:
            yield
        except ConfigurationError as error:
            self.give_up(error)

    def give_up(self, error: ConfigurationError) -> None:
        """Collect no per-sample gradients from here on.

        Raises:
            ConfigurationError: the reason, where a run is not to go on without them.
        """
        if self._give_up is None or self.capture is None:
            raise error
        self._give_up(error)
        self.capture.detach()
        self.close()
        self.capture = self._sums = None

    def parameters(self) -> Iterable[torch.nn.Parameter]:
        """Those that the optimizer moves."""
        return (p for group in self.optimizer.param_groups for p in group["params"])

    def _refuse_changed(self, index: int, norm: Tensor) -> None:
        if self._norm is not None and float((norm - self._norm).abs()) > _CHANGE_TOLERANCE * float(norm):
            raise ConfigurationError(
                f"step {index}: the backward pass left a gradient of norm {float(self._norm):.6g}, and the optimizer "
                f"is about to consume one of norm {float(norm):.6g}: on_after_backward or on_before_optimizer_step, of the module or of a "
                "callback, or the loop changes gradients, which influence does not follow. Clip through Trainer(gradient_clip_val=...), or in "
                "a loop of your own by the recorder's clip_grad_norm or clip_grad_value."
            )

    def _refuse_uncollected(self, index: int) -> None:
        if self.capture is None:
            return
        known = {id(p) for p in self.capture.parameters.values()} | self.capture.excluded_ids
        unknown = [p for p in self.parameters() if p.grad is not None and id(p) not in known]
        if unknown:
            raise ConfigurationError(
                f"step {index}: {len(unknown)} parameters (the first of shape {tuple(unknown[0].shape)}) began "
                "to train after fit had started. Unfreeze them before fit, or name them in exclude=."
            )

    def _refuse_other_sums(self, index: int, norm: float) -> None:
        """The safety net under all capture rules: shares are additive parts of the gradient."""
        if self._sums is None:
            return
        assert self.capture is not None
        gradients = {k: p.grad for k, p in self.capture.parameters.items() if p.grad is not None}
        wrong = self._sums.disagreement(gradients, norm, self._local_scale)
        if wrong is not None:
            raise ConfigurationError(
                f"step {index}: the per-sample gradient shares of {wrong.parameter} sum to its gradient only up to a relative error of "
                f"{wrong.error:.3g}. The parameter is used in a way that its module's rule does not see (outside its module's "
                f"forward, say), or a hook changes its gradient. Freeze it, name it in exclude=, or {self._otherwise}."
            )

    def close(self) -> None:
        """Leave nothing in the module."""
        for handle in self._handles:
            handle.remove()


@dataclass(frozen=True)
class _Started:
    """A micro-batch that is being run; ``weights`` are relative."""

    sample_ids: Tensor
    weights: Tensor
    accumulated: int


def total_norm(gradients: Iterable[Tensor | None]) -> Tensor:
    """Norm of all gradients together, of what this process holds of them, in single precision at least."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for g in gradients:
        if g is not None:
            by_dtype.setdefault(torch.promote_types(g.dtype, torch.float32), []).append(local(g))
    norms = [norm for dtype, group in by_dtype.items() for norm in torch._foreach_norm(group, 2, dtype)]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
