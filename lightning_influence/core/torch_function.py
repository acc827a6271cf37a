"""What a `TorchFunctionMode` has to know so that it changes nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

from torch.nn.functional import l1_loss


def keywords_of(func: Callable[..., Any], kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """The keyword arguments of the call that a mode is being asked about.

    They are those that the mode was given, except for `l1_loss`, whose ``weight`` torch 2.13 forgets to pass on to any mode, so
    that another loss would be computed under it. The weight is still there where the call waits for the mode's answer.
    """
    kwargs = dict(kwargs or {})
    if func is not l1_loss:
        return kwargs
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not l1_loss.__code__:
        frame = frame.f_back
    weight = None if frame is None else frame.f_locals.get("weight")
    return kwargs if weight is None else {"weight": weight, **kwargs}
