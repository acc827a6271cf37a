"""A torch optimizer as the mathematics sees it: its update rule, hyperparameters and moments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_influence.core.optimizers import Moments, Update
from lightning_influence.core.trajectory import Hyper
from lightning_influence.errors import UnsupportedOptimizer


def update_name(optimizer: torch.optim.Optimizer) -> str:
    """Key of `UPDATES` for a torch optimizer.

    Raises:
        UnsupportedOptimizer: the optimizer's step is not one of the known elementwise functions.
    """
    groups = optimizer.param_groups
    kind = type(optimizer)
    if kind in (torch.optim.Adam, torch.optim.AdamW):
        return _one_rule(kind, {"amsgrad" if g["amsgrad"] else "adam" for g in groups})
    if kind is torch.optim.SGD:
        return _one_rule(kind, {"momentum_sgd" if g["momentum"] else "sgd" for g in groups})
    raise UnsupportedOptimizer(
        f"the optimizer is {kind.__module__}.{kind.__qualname__}, whose step is not a known elementwise "
        "function; influence is defined for torch.optim.AdamW, Adam (also amsgrad) and SGD "
        "(also momentum, nesterov). Use one of these, not a subclass or a wrapper."
    )


def _one_rule(kind: type, names: set[str]) -> str:
    if len(names) > 1:
        raise UnsupportedOptimizer(
            f"the parameter groups of {kind.__name__} use different update rules ({', '.join(sorted(names))}); "
            "give all groups the same amsgrad (Adam) or all or none of them momentum (SGD)."
        )
    return names.pop()


def trained_by(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module that train and that an optimizer moves, by name."""
    moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {name: p for name, p in module.named_parameters() if p.requires_grad and id(p) in moved}


def read_hyper(group: dict[str, Any], state: dict[str, Any], kind: type) -> dict[str, float]:
    """Hyperparameters of one parameter for its next step.

    Args:
        group: its entry of ``optimizer.param_groups``.
        state: its entry of ``optimizer.state``; empty before its first step.
        kind: class of the optimizer.
    """
    hyper: dict[str, float] = {
        "lr": float(group["lr"]),
        "weight_decay": float(group["weight_decay"]),
        "maximize": float(group["maximize"]),
    }
    if kind is torch.optim.SGD:
        started = state.get("momentum_buffer") is not None
        hyper |= {key: float(group[key]) for key in ("momentum", "dampening", "nesterov")}
        # SGD keeps no step count, and only its first step differs from the others.
        return hyper | {"decoupled": 0.0, "step": 2.0 if started else 1.0}
    beta1, beta2 = group["betas"]
    decoupled = kind is torch.optim.AdamW or bool(group.get("decoupled_weight_decay"))
    return hyper | {
        "beta1": float(beta1),
        "beta2": float(beta2),
        "eps": float(group["eps"]),
        "decoupled": float(decoupled),
        "step": float(state.get("step", 0)) + 1,
    }


def read_hypers(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Hyper]:
    """Hyperparameters of parameters for their next step, by name; of those that the optimizer moves."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    kind = type(optimizer)
    return {
        name: read_hyper(groups[id(p)], optimizer.state.get(p, {}), kind)
        for name, p in parameters.items()
        if id(p) in groups
    }


def read_moments(state: dict[str, Any], update: Update, like: Tensor) -> Moments:
    """Moments of one parameter before its next step, shaped like it; zeros before the first. They are the optimizer's
    own tensors, which its step changes in place.
    """
    values = (state.get(key) for key in update.moments)
    return tuple(torch.zeros_like(like) if v is None else v.detach() for v in values)
