"""What can be known before a run that influence could not follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from lightning_influence.errors import ConfigurationError
from lightning_influence.run.lightning_names import is_a


@contextmanager
def recommending(otherwise: str) -> Iterator[None]:
    """What is refused here recommends something that the caller has, in the place of recording for replay."""
    try:
        yield
    except ConfigurationError as error:
        error.args = (str(error).replace("use record='replay'", otherwise),)
        raise


@contextmanager
def left_out(what: str, give_up: Callable[[str, ConfigurationError], None] | None) -> Iterator[None]:
    """Whatever is refused here is left out of what is recorded, if it may be.

    Args:
        what: is not possible then.
        give_up: told so and why, and the run goes on without it, unless this raises; None for a run that needs it.

    Raises:
        ConfigurationError: the refusal, of what a run needs.
    """
    try:
        yield
    except ConfigurationError as error:
        if give_up is None:
            raise
        give_up(what, error)


def refuse_parameters(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse parameters whose steps are not those of real numbers that a module owns.

    Raises:
        ConfigurationError: complex ones, sparse gradients, or ones that only the optimizer knows.
    """
    refuse_unowned(module, optimizer)
    for name, p in module.named_parameters():
        if p.is_complex() and p.requires_grad:
            raise ConfigurationError(
                f"{name} is complex ({p.dtype}); influence follows real parameters. Keep its real and imaginary parts "
                "as one real parameter (torch.view_as_complex in the forward), or freeze it."
            )
    for path, layer in module.named_modules():
        if getattr(layer, "sparse", False) and isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
            raise ConfigurationError(
                f"{path} ({type(layer).__name__}) has sparse=True, and the optimizer's step is followed on dense gradients. "
                "Build it with sparse=False."
            )


def refuse_unowned(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse parameters that only the optimizer knows.

    Raises:
        ConfigurationError: there is one.
    """
    own = {id(p) for p in module.parameters()}
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        if id(p) not in own:
            raise ConfigurationError(
                f"the optimizer moves a parameter of shape {tuple(p.shape)} that {type(module).__name__} does not own, so its "
                "state cannot be recorded. Assign it to the module as an nn.Parameter (or to an nn.ParameterList), not to a "
                "plain list, dict or tensor."
            )


def refuse_thawing(trainer: Any, module: nn.Module, exclude: Sequence[str]) -> None:
    """Refuse a callback that will unfreeze parameters, whose per-sample gradients would then be missing.

    Raises:
        ConfigurationError: there is one, and a frozen parameter that is not excluded.
    """
    thaws = [c for c in trainer.callbacks if is_a(c, "BaseFinetuning")]
    frozen = [k for k, p in module.named_parameters() if not p.requires_grad]
    waiting = [k for k in frozen if not any(fnmatchcase(k, pattern) for pattern in exclude)]
    if thaws and waiting:
        raise ConfigurationError(
            f"{type(thaws[0]).__name__} unfreezes parameters while the run trains, and {waiting[0]} is frozen now, so that its "
            "per-sample gradients would come in the midst of the log. Name what it unfreezes in exclude=, or use record='replay'."
        )


REENTRANT = (
    "the training step uses reentrant activation checkpointing, whose gradients cannot be taken apart from the run's own backward "
    "pass. Call torch.utils.checkpoint.checkpoint(..., use_reentrant=False), or in transformers "
    "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})."
)


def is_reentrant(loss: Tensor) -> bool:
    """Whether a loss went through activation checkpointing of the old kind."""
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            return True
        waiting += [following for following, _ in node.next_functions]
    return False
