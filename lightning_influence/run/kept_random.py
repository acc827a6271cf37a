"""The random numbers that a training step draws for its samples, kept where a sample leaves.

A step without one of its samples draws fewer numbers, so that from there on every sample would get those of another: other
dropout masks, other noise. What a removal does is meant with the random numbers of all other samples as they were. So the
numbers are noted while the whole step runs, and given again, without the rows of the sample, to the step without it.
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
        "_standard_gamma",
        "_sample_dirichlet",
    ]
)
"""Functions whose numbers can be put in the place of others; not so a permutation of the samples, or a fused kernel."""


class NotedRandom(TorchDispatchMode):
    """Notes the random numbers that are drawn meanwhile.

    Attributes:
        numbers: of each draw, in order.
        lost: the function whose numbers cannot be given again; None where there was none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[Tensor] = []
        self.lost: str | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            name = _name(func)
            if name in _DRAWS:
                self.numbers.append((result[1] if name == "native_dropout" else result).detach().clone())
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
        self._n_rows, self._noted = n_rows, iter(noted.numbers)
        self._left = len(noted.numbers)
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
        numbers = self._next(drawn.shape) if name in _DRAWS and not self._tells_rows(name, args) else None
        if numbers is None:
            self._lost = self._lost or name
            return result
        drawn.copy_(numbers)
        if name == "native_dropout":
            inputs, rate = args[0], float(args[1])
            result[0].copy_(inputs * drawn.to(inputs) / (1 - rate))
        return result

    def _tells_rows(self, name: str, args: tuple[Any, ...]) -> bool:
        """Whether the numbers are positions of samples in the batch, of which there now are fewer."""
        if name == "multinomial":
            return args[0].dim() == 1 and len(args[0]) == len(self._kept)
        highest = [a for a in args if type(a) is int] if name.startswith("rand") else []
        return name in ("randint", "randint_like", "random_") and highest[-1:] == [len(self._kept)]

    def _next(self, shape: torch.Size) -> Tensor | None:
        """The numbers in the place of new ones of some shape; None where there are no such."""
        numbers = next(self._noted, None)
        if numbers is None:
            return None
        self._left -= 1
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


def _name(func: Any) -> str:
    return str(func._schema.name).partition("::")[2]
