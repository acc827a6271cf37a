"""Any other module: its own forward, where every sample has a copy of the parameters to itself.

The gradient of such a copy is the sample's share. Slower than a rule, since the module's forward runs again, but it asks
nothing of the module except that it treats the samples of its first dimension independently and draws no random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, vmap
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from lightning_influence.core.shares import Dense, Form
from lightning_influence.errors import ConfigurationError


def generic(
    layer: nn.Module, names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any], position: int, delta: Tensor
) -> dict[str, Form]:
    """Per-sample gradients of some parameters of a module, through one of its outputs.

    Args:
        names: parameters, by their names in the module.
        args, kwargs: of the module's forward; tensors as long as ``delta`` hold one item per sample.
        position: of the output among the tensors that the forward returned.
        delta: gradient ``(n, ...)`` of that output.

    Raises:
        ConfigurationError: the module cannot be run one sample at a time.
    """
    if any(isinstance(value, PackedSequence) for value in args):
        raise ConfigurationError(
            f"{type(layer).__name__} is given a packed sequence, in which the words of all samples are mixed, so that no row is a "
            "sample's. Give it padded sequences, or use record='replay', which measures what a removal does."
        )
    # by attribute, since a replay puts plain tensors in the place of the parameters
    parameters = {name: attrgetter(name)(layer).detach() for name in names}
    leaves, structure = pytree.tree_flatten((args, kwargs))
    n = len(delta)
    batched = [isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == n for leaf in leaves]
    # the state of a recurrent layer is (layers, n, d), whatever the order of its input
    states = [
        isinstance(layer, nn.RNNBase) and i > 0 and isinstance(leaf, Tensor) and leaf.dim() == 3
        for i, leaf in enumerate(leaves)
    ]
    leaves = [leaf.transpose(0, 1) if state else leaf for leaf, state in zip(leaves, states, strict=True)]
    batched = [b or (s and len(leaf) == n) for leaf, b, s in zip(leaves, batched, states, strict=True)]

    def one(items: list[Tensor], values: dict[str, Tensor]) -> Tensor:
        queue = iter(items)
        inputs = [next(queue)[None] if b else leaf for leaf, b in zip(leaves, batched, strict=True)]
        inputs = [leaf.transpose(0, 1) if state else leaf for leaf, state in zip(inputs, states, strict=True)]
        own_args, own_kwargs = pytree.tree_unflatten(inputs, structure)
        outputs = pytree.tree_leaves(functional_call(layer, values, own_args, own_kwargs))
        tensor: Tensor = [t for t in outputs if isinstance(t, Tensor)][position]
        return tensor[0]

    inputs = [leaf for leaf, b in zip(leaves, batched, strict=True) if b]
    copies = {k: p.expand(len(delta), *p.shape).clone().requires_grad_() for k, p in parameters.items()}
    try:
        # whoever watches what the training step saves for its backward pass is not to see this one's
        with torch.enable_grad(), saved_tensors_hooks(_as_it_is, _as_it_is):
            if isinstance(layer, nn.RNNBase):  # its kernels cannot be vectorised over samples
                own = [{k: c[i] for k, c in copies.items()} for i in range(len(delta))]
                outputs = torch.stack([one([x[i] for x in inputs], own[i]) for i in range(len(delta))])
            else:
                outputs = vmap(one)(inputs, copies)
            gradients = torch.autograd.grad(
                outputs, list(copies.values()), delta, allow_unused=True, materialize_grads=True
            )
    except RuntimeError as error:
        raise ConfigurationError(
            f"{type(layer).__name__} has no rule of its own and cannot be run one sample at a time: {error}. Switch off its "
            "dropout, freeze its parameters, name them in exclude=, or use record='replay'."
        ) from error
    return {name: Dense(rows.flatten(1)) for name, rows in zip(copies, gradients, strict=True)}


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
