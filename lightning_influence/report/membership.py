"""Groups as a user names them: a label for every training sample, or sample ids by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_influence.errors import ConfigurationError

GroupsOf: TypeAlias = "Mapping[Any, Iterable[int]] | Sequence[Any] | Tensor"
"""Sample ids by name, which may overlap; or one label per sample of the training dataset, None for those of no group."""


def named_groups(groups: GroupsOf) -> dict[str, list[int]]:
    """Sample ids by the name of their group, ascending.

    Raises:
        ConfigurationError: no group, ids that are none, or two groups of one name.

    Example:
        >>> named_groups(["cat", "dog", None, "cat"])
        {'cat': [0, 3], 'dog': [1]}
        >>> named_groups({"odd": [3, 1], "small": range(2)})
        {'odd': [1, 3], 'small': [0, 1]}
    """
    members: dict[Any, list[int]] = {}
    if isinstance(groups, Mapping):
        for name, ids in groups.items():
            members[name] = _ids(name, ids)
    else:
        labels = groups.tolist() if isinstance(groups, Tensor) else list(groups)
        for sample, label in enumerate(labels):
            if label is not None:
                members.setdefault(label, []).append(sample)
    named = {str(name): ids for name, ids in members.items()}
    if len(named) < len(members):
        raise ConfigurationError(f"groups has several groups of one name among {list(members)[:8]}; name them apart.")
    if not named:
        raise ConfigurationError("groups names no group; give a label per training sample, or sample ids by name.")
    return named


def _ids(name: Any, ids: Iterable[int]) -> list[int]:
    try:
        given = torch.as_tensor(list(ids))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(f"group {name!r} does not hold sample ids: {error}") from error
    wrong = given.dim() != 1 or (len(given) > 0 and (given.is_floating_point() or bool((given < 0).any())))
    if wrong or not len(given):
        raise ConfigurationError(
            f"group {name!r} holds {given.tolist()!r:.80}; give the ids of its samples, which count from 0."
        )
    return sorted(set(given.tolist()))
