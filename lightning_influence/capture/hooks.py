"""The hooks that collect per-sample gradient shares while a module trains."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_influence.capture.generic import generic
from lightning_influence.capture.rules import rule_for
from lightning_influence.capture.shared_rows import SharedRows
from lightning_influence.core.shares import Form, SparseRows, add, merged
from lightning_influence.errors import ConfigurationError, InfluenceError, UncoveredParameter

_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
_WHOLE = (nn.MultiheadAttention, nn.RNNBase)
"""Modules that use the parameters of their children, or many of their own, without calling a layer."""


class GradientCapture:
    """Collects the per-sample gradient shares of a module's trainable parameters.

    Args:
        exclude: patterns (`fnmatch`) of parameter names to leave out.
        frozen_batch_norm: normalise with running statistics during training; refused otherwise.
        trained: names of the parameters that the optimizer moves; None for all that require a gradient.

    Attributes:
        parameters: the recorded ones, by their names in the module; tied ones once.
        excluded_ids: ``id`` of the trainable parameters that were left out.
        table: parameter, module, rule and shape of every use.

    Raises:
        UncoveredParameter: a trainable parameter whose module cannot be hooked.
        ConfigurationError: a layer that couples the samples of a batch, or a compiled one.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        exclude: Sequence[str] = (),
        frozen_batch_norm: bool = False,
        trained: Collection[str] | None = None,
    ) -> None:
        trained = {
            name: p
            for name, p in module.named_parameters()
            if (p.requires_grad if trained is None else name in trained)
        }
        excluded = {name for name in trained if any(fnmatchcase(name, pattern) for pattern in exclude)}
        self.parameters = {name: p for name, p in trained.items() if name not in excluded}
        self.excluded_ids = {id(trained[name]) for name in excluded}
        self._names = {id(p): name for name, p in self.parameters.items()}
        self._layers = self._recorded_layers(module)
        # by layer, since a functional call puts other tensors in the place of the parameters
        self._own_names = {layer: self._own(layer) for layer in self._layers.values()}
        self.table = [row for path, layer in self._layers.items() for row in self._rows(path, layer)]
        self._module, self._frozen_batch_norm = module, frozen_batch_norm
        if not frozen_batch_norm:
            refuse_batch_norm(module)
        refuse_compiled(module)
        self._refuse(module)
        self._hooks: list[Any] = []
        self._n: int | None = None
        self._shared: SharedRows | None = None
        self._forward = ExitStack()  # in which shared rows are looked for
        self._rerunning = False
        self._forms: dict[str, Form] = {}
        # of a hook, told when the shares are taken rather than inside the training step
        self._failure: Exception | None = None

    def _recorded_layers(self, module: nn.Module) -> dict[str, nn.Module]:
        layers: dict[str, nn.Module] = {}
        whole: list[str] = []
        for path, layer in module.named_modules():
            if any(path.startswith(f"{owner}.") for owner in whole):
                continue
            if isinstance(layer, _WHOLE):
                whole.append(path)
            if self._own(layer):
                layers[path] = layer
        return layers

    def _own(self, layer: nn.Module) -> dict[str, str]:
        """Recorded parameters that a layer uses itself: ``{local name: canonical name}``."""
        recurse = isinstance(layer, _WHOLE)
        return {
            local: self._names[id(p)]
            for local, p in layer.named_parameters(recurse=recurse, remove_duplicate=False)
            if id(p) in self._names
        }

    @property
    def slow(self) -> list[str]:
        """The modules that no rule covers, which run once more per step, one sample at a time."""
        return sorted({row["module"] for row in self.table if row["rule"] == "generic"})

    def _rows(self, path: str, layer: nn.Module) -> list[dict[str, Any]]:
        function = rule_for(layer)
        return [
            {
                "parameter": name,
                "module": f"{path} ({type(layer).__name__})",
                "rule": "generic" if function is None else function.__name__,
                "shape": list(self.parameters[name].shape),
            }
            for name in self._own(layer).values()
        ]

    def _refuse(self, module: nn.Module) -> None:
        for path, layer in module.named_modules():
            kind = type(layer).__name__
            if isinstance(layer, _BATCH_NORMS) and not layer.track_running_stats:
                raise ConfigurationError(f"{path} ({kind}) has no running statistics to freeze; use GroupNorm.")
            if getattr(layer, "batch_first", True) is False:
                raise ConfigurationError(
                    f"{path} ({kind}) takes the batch in its second dimension; build it with batch_first=True."
                )
        if "" in self._layers:
            names = ", ".join(self._own(module).values())
            raise UncoveredParameter(
                f"{names} belongs to {type(module).__name__} itself, whose forward the training step need not call. Move "
                "it into a submodule with a forward of its own, freeze it, name it in exclude=, or use record='replay'."
            )
        if self.slow:
            warnings.warn(
                f"no rule for {', '.join(self.slow)}: these modules run once more per step, one sample at a time (slower).",
                stacklevel=3,
            )

    def attach(self) -> None:
        """Hook the layers; does nothing where they are hooked."""
        if self._hooks:
            return
        for layer in dict.fromkeys(self._layers.values()):
            self._hooks.append(layer.register_forward_hook(self._after_forward, with_kwargs=True))
        if self._frozen_batch_norm:
            self._hooks += freeze_batch_norm(self._module)

    def detach(self) -> None:
        """Remove all hooks."""
        while self._hooks:
            self._hooks.pop().remove()
        self._n, self._forms = None, {}
        self._forget_shared()

    def begin(self, n_samples: int) -> None:
        """A micro-batch of ``n_samples`` is about to go forward."""
        self._forget_shared()
        self._n, self._forms, self._failure = n_samples, {}, None
        if n_samples > 1:
            self._shared = self._forward.enter_context(SharedRows(n_samples))

    def end_forward(self) -> None:
        """The loss is there, and nothing in the backward pass is to be looked at; may be left out, and costs time then."""
        self._forward.close()

    def _forget_shared(self) -> None:
        self._forward.close()
        self._shared = None

    def take(self, scale: float = 1.0) -> dict[str, Form]:
        """The shares of the micro-batch whose backward has run, times ``scale``; zero where none came.

        Raises:
            ConfigurationError: rows of a layer that are not the samples', or a layer that its rule does not fit.
            MemoryError, torch.OutOfMemoryError: there was too little for a hook.
        """
        failure, self._failure = self._failure, None
        if failure is not None:
            self._n, self._forms = None, {}
            self._forget_shared()
            raise failure
        assert self._n is not None, "begin() comes first"
        forms, n, self._forms, self._n = self._forms, self._n, {}, None
        self._forget_shared()
        missing = {name: p for name, p in self.parameters.items() if name not in forms}
        forms |= {name: _nothing(n, p) for name, p in missing.items()}
        return {name: forms[name].scaled(scale) if scale != 1.0 else forms[name] for name in self.parameters}

    def _after_forward(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._n is None or self._rerunning or self._failure is not None or not torch.is_grad_enabled():
            return
        try:
            with torch._C.DisableTorchFunction():  # modes that watch the module have nothing to see here
                self._watch(layer, args, kwargs, output)
        except Exception as error:
            self._failure = _of_layer(layer, error)

    def _watch(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Collect the layer's shares when the gradients of its outputs come."""
        args, kwargs = pytree.tree_map(_detached, (args, kwargs))
        tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        for position, tensor in enumerate(tensors):
            if tensor.requires_grad:
                shared = None
                if self._shared is not None and len(tensor) == 1 and tensor.dim() > 1:
                    shared = self._shared.follow(tensor)
                # it must not hold the tensor itself, which would then never be freed
                hook = partial(self._collect, layer, args, kwargs, position, tensor.shape, shared)
                _hooked(tensor).register_hook(hook)

    def _per_sample(self, leaf: Any) -> Any:
        """An input that is the same for all samples, once for each."""
        assert self._n is not None
        return leaf.expand(self._n, *leaf.shape[1:]) if isinstance(leaf, Tensor) and leaf.shape[:1] == (1,) else leaf

    @torch.no_grad()
    def _collect(
        self,
        layer: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        position: int,
        shape: torch.Size,
        shared: int | None,
        gradient: Tensor,
    ) -> None:
        if self._n is None or self._failure is not None:  # a gradient of the gradient
            return
        try:
            self._add(layer, args, kwargs, position, shape, shared, gradient)
        except Exception as error:
            self._failure = _of_layer(layer, error)

    def _add(
        self,
        layer: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        position: int,
        shape: torch.Size,
        shared: int | None,
        gradient: Tensor,
    ) -> None:
        function, own = rule_for(layer), self._own_names[layer]
        delta = _widened(gradient.detach().reshape(shape))
        if shared is not None and self._shared is not None:
            delta = self._shared.gradient_of(shared, delta)
            args, kwargs = pytree.tree_map(self._per_sample, (args, kwargs))
        if function is not None:
            inputs = args[0] if args else next(iter(kwargs.values()))
            shares = function(layer, _widened(inputs), delta)
        else:
            self._rerunning = True
            try:
                wide_args, wide_kwargs = pytree.tree_map(_widened, (args, kwargs))
                shares = generic(layer, list(own), wide_args, wide_kwargs, position, delta)
            finally:
                self._rerunning = False
        unknown = own.keys() - shares.keys()
        if unknown:
            raise ConfigurationError(
                f"a {type(layer).__name__} computes its weight from {', '.join(sorted(unknown))} before its forward, as "
                "torch.nn.utils.weight_norm and spectral_norm do, which its rule does not know. Use their successors in "
                "torch.nn.utils.parametrizations, name the parameters in exclude=, or use record='replay', which measures what a "
                "removal does."
            )
        for local, name in own.items():
            form = self._regrouped(shares[local], layer)
            self._forms[name] = add(self._forms[name], form) if name in self._forms else form

    def _regrouped(self, form: Form, layer: nn.Module) -> Form:
        """One row per sample, where its tokens came as items of their own."""
        n = self._n
        assert n is not None
        if form.n_samples == n:
            return form
        if form.n_samples % n:
            raise ConfigurationError(
                f"a {type(layer).__name__} saw {form.n_samples} items in a batch of {n} samples, so its first dimension is "
                "not the samples'. Let the batch come first, name its parameters in exclude=, or use record='replay', which "
                "measures what a removal does."
            )
        return merged(form, n)


def _of_layer(layer: nn.Module, error: Exception) -> Exception:
    """What a hook of a layer raised, as an error that says what can be done."""
    if isinstance(error, (InfluenceError, MemoryError, torch.OutOfMemoryError)):
        return error
    refusal = ConfigurationError(
        f"a {type(layer).__name__} is used in a way from which its per-sample gradients do not follow ({type(error).__name__}: "
        f"{error}). Name its parameters in exclude=, or use record='replay', which measures what a removal does."
    )
    refusal.__cause__ = error
    return refusal


def refuse_batch_norm(module: nn.Module) -> None:
    """Refuse layers that normalise with the statistics of the batch.

    Raises:
        ConfigurationError: there is one in train mode.
    """
    for path, layer in module.named_modules():
        if isinstance(layer, _BATCH_NORMS) and layer.training:
            raise ConfigurationError(
                f"{path} ({type(layer).__name__}) normalises with the statistics of the batch, so no sample has a gradient of "
                "its own. Use GroupNorm or LayerNorm, put the layer in eval mode, or say frozen_batch_norm=True to train "
                "with its running statistics."
            )


def refuse_compiled(module: nn.Module) -> None:
    """Refuse compiled modules, whose graphs call no hooks and cannot be differentiated twice.

    Raises:
        ConfigurationError: there is one.
    """
    for path, layer in module.named_modules():
        scripted = isinstance(layer, torch.jit.ScriptModule) and any(p.requires_grad for p in layer.parameters())
        if scripted or hasattr(layer, "_orig_mod") or getattr(layer, "_compiled_call_impl", None) is not None:
            by = "torch.jit" if scripted else "torch.compile"
            raise ConfigurationError(
                f"{path or 'the module'} ({type(layer).__name__}) is compiled, and a compiled graph calls no hooks and "
                f"cannot be differentiated twice. Train it without {by} while it is recorded."
            )


def freeze_batch_norm(module: nn.Module) -> list[Any]:
    """Let every batch normalisation use its running statistics; the handles undo it."""
    layers = [layer for layer in module.modules() if isinstance(layer, _BATCH_NORMS)]
    return [layer.register_forward_pre_hook(_freeze) for layer in layers]


def _freeze(layer: nn.Module, _: Any) -> None:
    layer.eval()


def _hooked(output: Tensor) -> Tensor:
    """The tensor whose hook sees the output's gradient even where the output is a view that is modified in
    place later on: autograd then rewrites the view's history, but not that of its base.
    """
    base = output._base
    whole = base is not None and base.grad_fn is not None and base.numel() == output.numel()
    return base if whole and base.is_contiguous() and output.is_contiguous() else output  # type: ignore[union-attr, return-value]


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _widened(value: Any) -> Any:
    """Half-precision tensors in single precision, in which shares are computed."""
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value


def _nothing(n: int, parameter: Tensor) -> Form:
    n_rows = parameter.shape[0] if parameter.dim() else 1
    return SparseRows(
        torch.zeros(n, 0, dtype=torch.int64, device=parameter.device),
        torch.zeros(n, 0, parameter.numel() // max(n_rows, 1), dtype=parameter.dtype, device=parameter.device),
        n_rows,
    )
