"""What of a run is held at a time, so that all of it together stays within the memory that a user gives.

Counted is everything besides the model and one evaluation of a step: the adjoints of the queries, the steps of the memory window,
and what a replay holds of the states of a run. Sizes are those of the largest moment of the walk, a little rounded up.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_influence.core.optimizers import UPDATES
from lightning_influence.core.sweep import Method, window_length
from lightning_influence.core.trajectory import Trajectory
from lightning_influence.errors import ConfigurationError
from lightning_influence.log.steps import MOMENTS_EVERY
from lightning_influence.replay.trajectory import ReplayTrajectory

MaxMemory: TypeAlias = "int | Literal['auto']"
"""Bytes; ``"auto"`` for half of what is free where the model is."""

_OF_FREE = 0.5
_PIECE = 2**17  # coordinates of a parameter that are computed at a time, over the whole window
_OF_PIECE = (12, 4)  # copies of them, and how many more for each step of the window
_PULLED = 5  # copies of the parameters, for each query: adjoint before the step and of its gradient, twice where it is clipped, and a product
_VARIATION = 24  # copies of the parameters in double precision, for each pair of the error proxy


@dataclass(frozen=True)
class Holding:
    """What is held at a time.

    Attributes:
        memory_window: steps for which the optimizer's memory of a removal is followed.
        in_files: whether these steps are kept in files that are mapped to memory.
        queries: that go through the run together.
        replay: bytes for the states of a replay.
        pairs: that the error proxy carries through the run together.
    """

    memory_window: int
    queries: int
    replay: int
    pairs: int = 1
    in_files: bool = False


def memory_in_bytes(max_memory: MaxMemory, device: torch.device, processes: int = 1) -> int:
    """The bytes that a process may hold on a device.

    Args:
        processes: that there are; on a processor they share what is free.

    Raises:
        ConfigurationError: neither a positive number nor ``"auto"``.
    """
    if max_memory == "auto":
        return int(_OF_FREE * _free(device)) // (processes if device.type == "cpu" else 1)
    if isinstance(max_memory, bool) or not isinstance(max_memory, int) or max_memory <= 0:
        raise ConfigurationError(
            f"max_memory={max_memory!r}; give a number of bytes, or 'auto' for half of what is free."
        )
    return max_memory


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _free_on_disk() -> int:
    """Where temporary files go."""
    return shutil.disk_usage(tempfile.gettempdir()).free


@dataclass(frozen=True)
class _Sizes:
    """Of a run: bytes of its kept coordinates, as queries are differentiated by them, moments, and what a step needs."""

    coordinates: int
    moments: int
    steps: int
    step: int
    wanted: int
    piece: int

    @classmethod
    def of(cls, run: Trajectory, parameters: Mapping[str, Tensor]) -> _Sizes:
        kept = sum(d for d, _ in run.sizes.values())
        item = max((4, *(parameters[k].element_size() for k in run.sizes)))
        moments = len(UPDATES[run.optimizer].moments)
        if isinstance(run, ReplayTrajectory):
            step, wanted = run.states.least(), run.states.wanted()
        else:  # a block of steps is read together
            step = wanted = min(MOMENTS_EVERY, len(run)) * (1 + moments) * kept * item
        return cls(kept * item, moments, len(run), step, wanted, min(_PIECE, kept) * item)

    def sweep(self, length: int, queries: int, *, in_files: bool = False) -> int:
        """Bytes of a sweep, the states of a replay aside.

        Args:
            length: of the window.
            in_files: whether its steps take none.
        """
        forgets = self.moments + 1 if 0 < length < self.steps else 0  # the closing adjoint, and the queries themselves
        copies = queries * (_PULLED + self.moments + forgets)
        copies += 0 if in_files else length * (1 + queries)
        fixed, each = _OF_PIECE
        return copies * self.coordinates + (fixed + each * length) * self.piece

    def proxy(self, queries: int, pairs: int) -> int:
        """Bytes of an error proxy, the states of a replay aside."""
        passed = (self.steps * (2 + self.moments) + _PULLED) * queries
        return passed * self.coordinates + (pairs * self.coordinates + self.piece) * 2 * _VARIATION


def held_by_a_sweep(
    run: Trajectory, method: Method, parameters: Mapping[str, Tensor], queries: int, max_memory: int
) -> Holding:
    """What a sweep may hold: the window that was asked for before all else, then queries, then the states of a replay.

    A window for which there is no memory lies in files, where the disk has room, and is shorter, where it has not.

    Args:
        parameters: of the model, by name.
        queries: that there are.

    Raises:
        ConfigurationError: it is too little for a single query.
    """
    sizes, asked = _Sizes.of(run, parameters), method.memory_window
    lengths = {w: window_length(run, replace(method, memory_window=w)) for w in range(asked + 1)}
    on_disk = 2 * lengths[asked] * sizes.coordinates
    in_files = sizes.step + sizes.sweep(lengths[asked], 1) > max_memory and on_disk <= _free_on_disk()

    def bytes_of_window(window: int, queries: int = 1) -> int:
        return sizes.sweep(lengths[window], queries, in_files=in_files)

    least = sizes.step + bytes_of_window(asked if in_files else 0)
    _refuse_too_little(
        max_memory, least, f"{sizes.step + sizes.sweep(lengths[asked], 1)} with the memory window in memory"
    )
    window = asked if in_files else max(w for w in lengths if sizes.step + bytes_of_window(w) <= max_memory)
    spare = max_memory - sizes.step - bytes_of_window(window)
    replay = sizes.step + min(sizes.wanted - sizes.step, spare // 2)  # before more queries go through the run together
    more = bytes_of_window(window, 2) - bytes_of_window(window)
    together = min(queries, 1 + (max_memory - replay - bytes_of_window(window)) // more)
    if in_files:
        together = max(1, min(together, _free_on_disk() // max(on_disk, 1) * 2 - 1))
    return Holding(window, together, max_memory - bytes_of_window(window, together), in_files=in_files)


def held_by_a_proxy(
    run: Trajectory, parameters: Mapping[str, Tensor], queries: int, pairs: int, max_memory: int
) -> Holding:
    """What an error proxy may hold; arguments and errors as of `held_by_a_sweep`.

    Args:
        pairs: that there are.
    """
    sizes = _Sizes.of(run, parameters)
    need = sizes.step + sizes.proxy(1, 1)
    _refuse_too_little(max_memory, need, f"{sizes.step + sizes.proxy(queries, pairs)} to do everything at once")
    replay = sizes.step + min(sizes.wanted - sizes.step, (max_memory - need) // 2)
    rest = max_memory - replay - sizes.proxy(1, 1)
    one_query, one_pair = sizes.proxy(2, 1) - sizes.proxy(1, 1), sizes.proxy(1, 2) - sizes.proxy(1, 1)
    queries = min(queries, 1 + rest // one_query)
    pairs = min(pairs, 1 + (rest - (queries - 1) * one_query) // one_pair)
    return Holding(0, queries, max_memory - sizes.proxy(queries, pairs), pairs)


def _refuse_too_little(given: int, need: int, more: str) -> None:
    if given < need:
        raise ConfigurationError(
            f"max_memory={given} bytes is too little for this run: it takes {need} bytes besides the model and one evaluation of a "
            f"step ({more}). Give max_memory={need} or more, free memory where it is 'auto', or leave parameters out with "
            "InfluenceCallback(exclude=...)."
        )
