"""The random numbers that a training step draws for its samples, kept where a sample leaves.

A step without one of its samples draws fewer numbers, so that from there on every sample would get those of another: other
dropout masks, other noise. What a removal does is meant with the random numbers of all other samples as they were. So the
numbers are noted while the whole step runs, and given again, without the rows of the sample, to the step without it.

Where the numbers are themselves positions of samples in the batch (the partners of mixup, negatives drawn from the batch), those of
the other samples stay, too: a sample whose partner leaves gets the partner's partner of a permutation, and otherwise a new one.
Either is again a permutation, or are draws, as the training step makes them of so many samples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_DRAWS = frozenset(
    [
        "rand",
        "randn",
        "randint",
        "rand_like",
        "randn_like",
        "randint_like",
        "bernoulli",
        "bernoulli_",
        "normal",
        "normal_",
        "uniform",
        "uniform_",
        "random_",
        "exponential_",
        "geometric_",
        "cauchy_",
        "log_normal_",
        "multinomial",
        "poisson",
        "binomial",
        "native_dropout",
        "randperm",
        "_standard_gamma",
        "_sample_dirichlet",
    ]
)
"""Functions whose numbers can be put in the place of others; not so those of a fused kernel."""

Draw = tuple[Tensor, "int | None"]
"""Numbers, and below which number they lie, where that is one of a function's arguments."""


class NotedRandom(TorchDispatchMode):
    """Notes the random numbers that are drawn meanwhile.

    Attributes:
        draws: in order.
        lost: the function whose numbers cannot be given again; None where there was none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[Draw] = []
        self.lost: str | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            name = _name(func)
            if name in _DRAWS:
                drawn = result[1] if name == "native_dropout" else result
                self.draws.append((drawn.detach().clone(), _below(name, args)))
            else:
                self.lost = self.lost or name
        return result


class KeptRandom(TorchDispatchMode):
    """Gives noted numbers again, without the rows of a sample.

    Args:
        noted: of the whole step.
        rows: ``(k,)`` int64, of the sample.
        n_rows: of the whole step's batch.

    Attributes:
        lost: why numbers could not be kept, so that what was computed says nothing; None where they were.
    """

    def __init__(self, noted: NotedRandom, rows: Tensor, n_rows: int) -> None:
        super().__init__()
        leave = set(rows.tolist())
        self._kept = [i for i in range(n_rows) if i not in leave]
        self._n_rows, self._noted = n_rows, iter(noted.draws)
        self._left = len(noted.draws)
        self._lost = noted.lost

    @property
    def lost(self) -> str | None:
        return self._lost or ("another number of draws" if self._left else None)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return result
        name = _name(func)
        drawn = result[1] if name == "native_dropout" else result
        numbers = self._next(name, args, drawn) if name in _DRAWS else None
        if numbers is None:
            self._lost = self._lost or name
            return result
        drawn.copy_(numbers)
        if name == "native_dropout":
            inputs, rate = args[0], float(args[1])
            result[0].copy_(inputs * drawn.to(inputs) / (1 - rate))
        return result

    def _next(self, name: str, args: tuple[Any, ...], drawn: Tensor) -> Tensor | None:
        """The numbers in the place of new ones; None where there are no such."""
        numbers, below = next(self._noted, (None, None))
        if numbers is None:
            return None
        self._left -= 1
        if below == _below(name, args):
            return self._of_kept_rows(numbers, drawn.shape)
        if (below, _below(name, args)) != (self._n_rows, len(self._kept)):
            return None  # they count something else that there is less of now
        if name == "randperm":
            return self._permutation(numbers)
        mine = self._of_kept_rows(numbers, drawn.shape)
        if mine is None:
            return None
        if name == "multinomial" and drawn.numel() > 1 and not (len(args) > 2 and args[2]):
            return None  # without replacement, where a new one might be there already
        new = self._new_rows().to(numbers)[mine]
        return torch.where(new < 0, drawn, new)

    def _permutation(self, numbers: Tensor) -> Tensor:
        """A permutation of the samples without those that leave: each is passed over in its cycle."""
        new, old = self._new_rows().tolist(), numbers.tolist()
        followed = []
        for row in self._kept:
            other = old[row]
            while new[other] < 0:
                other = old[other]
            followed.append(new[other])
        return torch.tensor(followed).to(numbers)

    def _new_rows(self) -> Tensor:
        """Of every row of the whole batch, its position among those that are left; -1 of one that leaves."""
        new = torch.full((self._n_rows,), -1)
        new[self._kept] = torch.arange(len(self._kept))
        return new

    def _of_kept_rows(self, numbers: Tensor, shape: torch.Size) -> Tensor | None:
        """Numbers of the whole batch in the shape that those of the kept rows have; None where it is another."""
        if numbers.shape == shape:
            return numbers
        differing = [d for d, (a, b) in enumerate(zip(numbers.shape, shape, strict=False)) if a != b]
        if numbers.dim() != len(shape) or len(differing) != 1:
            return None
        (d,) = differing
        each, rest = divmod(numbers.shape[d], self._n_rows)
        if rest or shape[d] != each * len(self._kept):
            return None
        rows = torch.tensor(self._kept, device=numbers.device)
        return numbers.unflatten(d, (self._n_rows, each)).index_select(d, rows).flatten(d, d + 1)


def _below(name: str, args: tuple[Any, ...]) -> int | None:
    if name == "multinomial":
        return len(args[0]) if args[0].dim() == 1 else None
    bounds = [a for a in args if type(a) is int] if name.startswith("rand") else []
    return bounds[-1] if bounds else None


def _name(func: Any) -> str:
    return str(func._schema.name).partition("::")[2]
