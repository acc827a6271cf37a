"""The steps that a backward walk has passed and the optimizer still remembers: what the finite response runs forward through.

Of each step only its gradient and the adjoint of the parameters after it are kept. The moments at every step follow from those
before the newest, and the adjoint of the moments after the oldest from that after the one before it.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_influence.core.adjoint import Adjoint, adjoint
from lightning_influence.core.optimizers import Moments, ParameterStep, Update
from lightning_influence.core.removal import ConsumedChange
from lightning_influence.core.trajectory import Hyper, Shares, Vectors

_JOINED_COORDINATES = 2**14  # of a parameter that is joined with others

Block: TypeAlias = tuple[str, ...]


def blocks_of(hypers: Sequence[Mapping[str, Hyper]], sizes: Mapping[str, int]) -> list[Block]:
    """Parameters that can go through the elementwise algebra end to end: they took the same steps with the
    same hyperparameters. Only small ones are joined; large ones would be copied for nothing.

    Args:
        hypers: of the parameters that each step moved.
        sizes: coordinates of the parameters to be grouped.
    """
    alike: dict[Any, list[str]] = {}
    blocks: list[Block] = []
    for name, size in sizes.items():
        if size > _JOINED_COORDINATES:
            blocks.append((name,))
        else:
            key = tuple(tuple(hyper[name].items()) if name in hyper else None for hyper in hypers)
            alike.setdefault(key, []).append(name)
    return blocks + [tuple(names) for names in alike.values()]


@dataclass(frozen=True)
class StepRemovals:
    """The changes of a step's consumed gradient by each removal from it."""

    consumed: ConsumedChange
    gradients: Vectors
    shares: Mapping[str, Shares]

    def of(self, names: Sequence[str], sample_ids: Tensor) -> Tensor | None:
        """Changes ``(n, d)`` of some parameters end to end; zero for samples that the step does not hold, None if all."""
        position = {z: i for i, z in enumerate(self.consumed.before_clipping.sample_ids.tolist())}
        held = [i for i, z in enumerate(sample_ids.tolist()) if z in position]
        if not held:
            return None
        own = torch.tensor([position[int(sample_ids[i])] for i in held])
        parts = []
        for name in names:
            gradient, share = self.gradients[name], self.shares[name]
            totals = self.consumed.before_clipping.totals(share, gradient)
            rows = self.consumed.change(gradient, share, own, totals)
            parts.append(
                rows.new_zeros(len(sample_ids), rows.shape[1]).index_copy_(0, torch.tensor(held).to(rows.device), rows)
            )
        return torch.cat(parts, 1)


@dataclass
class WindowStep:
    """What is kept of a step.

    Attributes:
        gradients: ``(d,)`` each, effective ones.
        hyper: of the parameters that the step moved.
        after: ``(q, d)`` each, adjoint of the parameters after the step.
        removals: of its samples, where an earlier step of the window holds one of them, too.
    """

    gradients: Vectors
    hyper: dict[str, Hyper]
    after: Vectors
    removals: StepRemovals | None = None
    _joined: dict[Block, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def of(self, block: Block) -> tuple[Tensor, Tensor]:
        """Gradient and adjoint of a block of parameters, end to end."""
        if len(block) == 1:
            return self.gradients[block[0]], self.after[block[0]]
        if block not in self._joined:
            gradient = torch.cat([self.gradients[name] for name in block])
            self._joined[block] = gradient, torch.cat([self.after[name] for name in block], 1)
        return self._joined[block]


class Window:
    """The newest steps of a backward walk.

    Args:
        update: of every step.
        length: the most steps.
        in_files: keep what is large of each step in a file that is mapped to memory, from which it is read piece by piece.
    """

    def __init__(self, update: Update, length: int, *, in_files: bool = False) -> None:
        self._update, self.length, self._in_files = update, length, in_files
        self.steps: deque[WindowStep] = deque()  # newest first: steps t, t+1, ...
        self._moments: dict[str, Moments] = {}  # before the newest step of each parameter
        self._closing: dict[str, Moments] = {}  # adjoint of the moments after its oldest one

    def push(self, recorded: Mapping[str, ParameterStep], after: Mapping[str, Adjoint]) -> None:
        """The walk has come to a step.

        Args:
            after: adjoint of the optimizer state after the step.
        """
        if len(self.steps) == self.length:
            self._forget()
        held = {name for step in self.steps for name in step.hyper}
        self._closing |= {k: after[k].moments for k in recorded if k not in held}
        self._moments |= {k: step.moments for k, step in recorded.items()}
        gradients = {k: step.gradient for k, step in recorded.items()}
        hyper = {k: step.hyper for k, step in recorded.items()}
        adjoints = {k: after[k].parameter for k in recorded}
        if self._in_files:
            gradients, adjoints = _in_a_file(gradients), _in_a_file(adjoints)
        self.steps.appendleft(WindowStep(gradients, hyper, adjoints))

    def blocks(self) -> list[Block]:
        """The parameters that the newest step moved, as they can be evaluated end to end."""
        sizes = {k: len(g) for k, g in self.steps[0].gradients.items()}
        return blocks_of([step.hyper for step in self.steps], sizes)

    def of(self, block: Block) -> tuple[list[ParameterStep], list[Tensor], Moments, list[WindowStep]]:
        """The steps of a block, the adjoint of its parameters after each, and that of its moments after the last."""
        steps = [step for step in self.steps if block[0] in step.hyper]
        joined = [step.of(block) for step in steps]
        moments = _joined([self._moments[name] for name in block])
        recorded: list[ParameterStep] = []
        device = self._moments[block[0]][0].device if self._update.moments else joined[0][0].device
        for step, (gradient, _) in zip(steps, joined, strict=True):
            recorded.append(ParameterStep(self._update, moments, gradient.to(device), step.hyper[block[0]]))
            moments = recorded[-1].taken[1]
        closings = [self._closing[name] for name in block]
        closing = _joined_adjoints(closings, [steps[-1].after[name] for name in block])
        return recorded, [weight.to(device) for _, weight in joined], closing, steps

    def _forget(self) -> None:
        """Let the oldest step go: the closing adjoint moves to before it."""
        sizes = {k: len(g) for k, g in self.steps[-1].gradients.items()}
        for block in blocks_of([step.hyper for step in self.steps], sizes):
            recorded, after, closing, _ = self.of(block)
            if len(recorded) == 1:
                for name in block:
                    del self._closing[name], self._moments[name]
            elif self._update.moments:
                before = adjoint(recorded[-1], Adjoint(after[-1], closing))[0].moments
                parts = zip(*(m.split([sizes[name] for name in block], 1) for m in before), strict=True)
                self._closing |= dict(zip(block, parts, strict=True))
        self.steps.pop()


def _in_a_file(tensors: Vectors) -> Vectors:
    """The same, in a file that goes when they do."""
    total = {t.dtype: 0 for t in tensors.values()}
    for t in tensors.values():
        total[t.dtype] += t.numel()
    files = {dtype: _mapped(size, dtype) for dtype, size in total.items()}
    starts = dict.fromkeys(total, 0)
    mapped = Vectors()
    for k, t in tensors.items():
        start = starts[t.dtype]
        starts[t.dtype] = stop = start + t.numel()
        mapped[k] = files[t.dtype][start:stop].view(t.shape).copy_(t)
    return mapped


def _mapped(size: int, dtype: torch.dtype) -> Tensor:
    with tempfile.NamedTemporaryFile(prefix="influence-window-") as file:
        file.truncate(size * dtype.itemsize)
        return torch.from_file(file.name, shared=True, size=size, dtype=dtype)  # which stays when the name goes


def _joined(moments: Sequence[Moments]) -> Moments:
    return moments[0] if len(moments) == 1 else tuple(torch.cat(parts) for parts in zip(*moments, strict=True))


def _joined_adjoints(moments: Sequence[Moments], like: Sequence[Tensor]) -> Moments:
    """Adjoints of moments end to end; zeros for those that are empty, unless all are."""
    if len(moments) == 1:
        return moments[0]
    count = max(len(m) for m in moments)
    filled = [m or (torch.zeros_like(p),) * count for m, p in zip(moments, like, strict=True)]
    return tuple(torch.cat(parts, 1) for parts in zip(*filled, strict=True))
