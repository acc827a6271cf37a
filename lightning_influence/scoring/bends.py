"""Whether the score of a group can be read as a size: how far the queries' losses bend where its removal moves the parameters.

Scores are first order in the parameters. What leaves as a group moves them further than a sample does, and where the losses of the
queries are no longer straight lines over such a distance, neither are those of training. So each group is looked at once: at the
parameters of the run's end, moved as its removal moves them by itself, the change of the losses is compared with the straight line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lightning_influence.core.trajectory import Vectors
from lightning_influence.run.parameters import parameters_at
from lightning_influence.run.task import Task

_LOOKS = 2**12  # losses of queries that are evaluated in all; groups beyond are left unlooked at
_VISIBLE = 1e-3  # relative change of the losses that single precision shows


def straight_lines(gradients: Vectors, moves: Vectors) -> Tensor:
    """Changes of the query losses ``(n_groups, n_queries)`` to first order.

    Args:
        gradients: of the losses, ``(n_queries, d)`` each.
        moves: of the parameters, ``(n_groups, d)`` each.
    """
    return torch.stack([moves[k].double() @ g.to(moves[k]).double().T for k, g in gradients.items()]).sum(0)


def bends(
    task: Task, losses: Callable[[], Tensor], moves: Vectors, lines: Tensor, largest_first: Iterable[int]
) -> list[float | None]:
    """The distance of the losses' change from the straight line, relative to the line's, by group.

    Args:
        losses: of the queries at the module's present parameters, ``(n_queries,)``; to be looked at.
        moves: of the parameters, ``(n_groups, d)`` each.
        lines: of `straight_lines`.
        largest_first: groups in the order in which they are looked at, as long as there are not too many; None for the others.
    """
    own = dict(task.module.named_parameters())
    start, by_group = losses().double().cpu(), list[float | None]([None] * len(lines))
    for group in list(largest_first)[: max(1, _LOOKS // len(start))]:
        size = float(lines[group].norm())
        if size == 0:
            continue
        # a small move is made larger, so that the change is not rounded away; its bend grows in proportion
        factor = max(1.0, _VISIBLE * float(start.norm()) / size)
        there = {k: own[k].data + factor * m[group].view_as(own[k]).to(own[k]) for k, m in moves.items()}
        with parameters_at(task.module, there):
            change = losses().double().cpu() - start
        by_group[group] = float((change - factor * lines[group]).norm()) / (factor**2 * size)
    return by_group
