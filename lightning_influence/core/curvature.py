"""What stands for the Hessian of a batch loss in the sweep (docs/method.md, "Curvature")."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lightning_influence.core.torch_function import keywords_of
from lightning_influence.core.trajectory import Shares, StepRecord, Trajectory, Vectors
from lightning_influence.errors import CurvatureUnavailable, check_choice

Loss: TypeAlias = Callable[[dict[str, Tensor]], Tensor]
"""``loss(parameters) -> scalar``, by parameter name."""


def fisher_product(record: StepRecord, shares: Mapping[str, Shares], products: Tensor) -> Vectors:
    """Empirical Fisher of the batch times vectors, from the products ``(q, n)`` of vectors and shares.

    With ``s_z = kappa_z grad l_z`` the Fisher of the batch loss is ``sum_z s_z s_z^T / kappa_z``, which
    for a mean over ``n`` is the product of docs/method.md, "Curvature".
    """
    kappa = record.loss_weights.to(products)
    weights = torch.where(kappa > 0, products / torch.where(kappa > 0, kappa, 1.0), 0.0)
    return {name: share.combine(weights) for name, share in shares.items()}


@dataclass(frozen=True)
class GradientGraph:
    """A gradient that can be differentiated again: evaluated once, it serves any number of Hessian products.

    Attributes:
        parameters: the leaves it was taken with respect to.
        gradients: shaped like them.
        stopped: leaves of the same values on which the gradient depends along paths that the loss stops; empty where
            there are none, or where they are not followed.
    """

    parameters: dict[str, Tensor]
    gradients: dict[str, Tensor]
    stopped: dict[str, Tensor] = field(default_factory=dict)

    def hessian_product(self, vectors: Vectors, *, at_once: int = 8) -> Vectors:
        """Exact Hessian-vector products ``H v = d <grad loss, v> / d theta``, ``(q, d)`` each.

        Args:
            vectors: ``(q, d)`` each, flat.
            at_once: vectors that are carried through the network together.
        """
        leaves = [*self.parameters.values(), *self.stopped.values()]
        varying = {name: g for name, g in self.gradients.items() if g.requires_grad}  # the others are constant
        n = len(next(iter(vectors.values())))
        try:
            rows = [self._pulled(leaves, varying, vectors, chunk) for chunk in torch.arange(n).split(at_once)]
        except RuntimeError:
            # some second derivatives (of group normalisation, for one) cannot be vectorised over the vectors
            try:
                rows = [self._pulled(leaves, varying, vectors, chunk) for chunk in torch.arange(n).split(1)]
            except RuntimeError as error:
                raise CurvatureUnavailable(
                    f"the training step cannot be differentiated twice ({_first_line(error)}); use curvature='none', or 'fisher' with a "
                    "log of gradients."
                ) from error
        columns = [torch.cat([row[i].reshape(-1, leaf.numel()) for row in rows]) for i, leaf in enumerate(leaves)]
        products = dict(zip(self.parameters, columns, strict=False))
        for name, column in zip(self.stopped, columns[len(self.parameters) :], strict=True):
            products[name] = products[name] + column
        return {name: products[name] for name in vectors}

    def _pulled(
        self, leaves: list[Tensor], varying: dict[str, Tensor], vectors: Vectors, chunk: Tensor
    ) -> Sequence[Tensor]:
        if not varying:
            return [leaf.new_zeros(len(chunk), leaf.numel()) for leaf in leaves]
        directions = [vectors[name][chunk].view(-1, *g.shape) for name, g in varying.items()]
        single = len(chunk) == 1
        return torch.autograd.grad(
            list(varying.values()),
            leaves,
            [d[0] if single else d for d in directions],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
            is_grads_batched=not single,
        )


def gradient_graph(loss: Loss, parameters: dict[str, Tensor]) -> GradientGraph:
    """Gradient of a loss, to be differentiated again.

    Example:
        >>> graph = gradient_graph(lambda p: (p["weight"] ** 3).sum(), {"weight": torch.tensor([1.0, 2.0])})
        >>> graph.gradients["weight"].detach()
        tensor([ 3., 12.])
        >>> graph.hessian_product({"weight": torch.eye(2)})["weight"]
        tensor([[ 6.,  0.],
                [ 0., 12.]])
    """
    leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    with differentiable_attention():
        gradients = torch.autograd.grad(loss(leaves), list(leaves.values()), create_graph=True, materialize_grads=True)
    return GradientGraph(leaves, dict(zip(leaves, gradients, strict=True)))


def hessian_product(loss: Loss, parameters: dict[str, Tensor], vectors: Vectors, *, at_once: int = 8) -> Vectors:
    """Exact Hessian-vector products, forward over reverse: ``d/d eps grad loss(theta + eps v)``, ``(q, d)`` each.

    For many vectors and convolutions, whose second derivative in reverse is slow, faster than `GradientGraph`.

    Raises:
        CurvatureUnavailable: an operation of the loss has no such derivative.

    Example:
        >>> direction = {"weight": torch.tensor([[1.0, 2.0]])}
        >>> hessian_product(lambda p: (p["weight"] ** 3).sum(), {"weight": torch.ones(2)}, direction)
        {'weight': tensor([[ 6., 12.]])}
    """

    def product(direction: dict[str, Tensor]) -> dict[str, Tensor]:
        return jvp(grad(loss), (parameters,), (direction,))[1]  # type: ignore[no-any-return]

    with _or_unavailable("the training step cannot be differentiated forwards", "use curvature='none'"):
        return _for_each(product, parameters, vectors, at_once)


def third_derivative(loss: Loss, parameters: dict[str, Tensor], vectors: Vectors, *, at_once: int = 8) -> Vectors:
    """``D3L[v, v] = d2/d eps2 grad loss(theta + eps v)``, ``(q, d)`` each.

    Raises:
        CurvatureUnavailable: an operation of the loss has no such derivative.

    Example:
        >>> direction = {"weight": torch.tensor([[1.0, 2.0]])}
        >>> third_derivative(lambda p: (p["weight"] ** 3).sum(), {"weight": torch.zeros(2)}, direction)
        {'weight': tensor([[ 6., 24.]])}
    """

    def product(direction: dict[str, Tensor]) -> dict[str, Tensor]:
        def slope(values: dict[str, Tensor]) -> dict[str, Tensor]:
            return jvp(grad(loss), (values,), (direction,))[1]  # type: ignore[no-any-return]

        return jvp(slope, (parameters,), (direction,))[1]  # type: ignore[no-any-return]

    instead = "use curvature='fisher' with a log of gradients, or 'none'"
    with _or_unavailable("the training step cannot be differentiated three times", instead):
        return _for_each(product, parameters, vectors, at_once)


def gauss_newton_product(loss: Loss, parameters: dict[str, Tensor], vectors: Vectors, *, at_once: int = 8) -> Vectors:
    """Exact Gauss-Newton products ``J^T H_out J v``, where the loss is a known functional loss of outputs.

    Raises:
        CurvatureUnavailable: the loss does not go through one of torch's functional losses, or the outputs cannot be
            differentiated forwards.

    Example:
        Of ``(theta^2 - 1)^2`` at 1 the Gauss-Newton matrix is ``2 (2 theta)^2``, without the curvature of ``theta^2``:

        >>> loss = lambda p: torch.nn.functional.mse_loss(p["weight"] ** 2, torch.ones(1))
        >>> gauss_newton_product(loss, {"weight": torch.ones(1)}, {"weight": torch.ones(1, 1)})
        {'weight': tensor([[8.]])}
    """

    def outputs(values: dict[str, Tensor]) -> Tensor:
        with _Outputs() as watch:
            loss(values)
        return watch.outputs

    def of_outputs(tap: Tensor) -> Tensor:
        with _Outputs(tap):
            return loss(parameters)

    def product(direction: dict[str, Tensor]) -> dict[str, Tensor]:
        logits, moved = jvp(outputs, (parameters,), (direction,))  # type: ignore[misc]  # v -> J v
        (cotangent,) = vjp(grad(of_outputs), logits)[1](moved)  # -> H_out J v; H_out is symmetric
        return vjp(outputs, parameters)[1](cotangent)[0]  # -> J^T H_out J v

    with _or_unavailable(
        "the outputs of the training step cannot be differentiated forwards", "use curvature='hessian'"
    ):
        return _for_each(product, parameters, vectors, at_once)


@contextmanager
def _or_unavailable(what: str, instead: str) -> Iterator[None]:
    """An operation that lacks a derivative says so in torch's words; the user hears what to do."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise CurvatureUnavailable(f"{what} ({_first_line(error)}); {instead}.") from error


def _first_line(error: Exception) -> str:
    """Of torch's words, of which the others are for its own developers."""
    return str(error).splitlines()[0].rstrip(".")


def _for_each(
    product: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    parameters: dict[str, Tensor],
    vectors: Vectors,
    at_once: int,
) -> Vectors:
    directions = {name: v.reshape(len(v), *parameters[name].shape) for name, v in vectors.items()}
    n = len(next(iter(directions.values())))
    with differentiable_attention():
        if n == 1:
            products = {name: p[None] for name, p in product({k: d[0] for k, d in directions.items()}).items()}
        else:
            products = vmap(product, randomness="same", chunk_size=at_once)(directions)
    return {name: p.detach().reshape(n, -1) for name, p in products.items()}


def differentiable_attention() -> AbstractContextManager[Any]:
    """Fused attention kernels can be differentiated once; the plain one any number of times."""
    return sdpa_kernel(SDPBackend.MATH)


_LOSSES = {
    torch.nn.functional.cross_entropy,
    torch.nn.functional.nll_loss,
    torch.nn.functional.mse_loss,
    torch.nn.functional.l1_loss,
    torch.nn.functional.huber_loss,
    torch.nn.functional.smooth_l1_loss,
    torch.nn.functional.binary_cross_entropy,
    torch.nn.functional.binary_cross_entropy_with_logits,
    torch.nn.functional.kl_div,
    torch.nn.functional.gaussian_nll_loss,
    torch.nn.functional.poisson_nll_loss,
}


class _Outputs(TorchFunctionMode):
    """Finds what a loss function is first called with; puts ``tap`` in its place where given."""

    def __init__(self, tap: Tensor | None = None) -> None:
        super().__init__()
        self._tap, self._reached, self._first_input = tap, False, None

    @property
    def outputs(self) -> Tensor:
        if self._first_input is None:
            raise CurvatureUnavailable(
                "curvature='gauss_newton' needs to know where the model's output ends and the loss begins, and the training "
                "step calls none of torch.nn.functional's losses; use curvature='hessian'."
            )
        return self._first_input

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = keywords_of(func, kwargs)
        if func in _LOSSES and not self._reached:
            self._reached = True
            self._first_input = args[0] if args else kwargs["input"]
            if self._tap is not None and args:
                args = (self._tap, *args[1:])
            elif self._tap is not None:
                kwargs = kwargs | {"input": self._tap}
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Curvature:
    """What stands for the Hessian of a batch loss.

    Attributes:
        product: ``(trajectory, record, shares, vectors, products) -> vectors``, the curvature of a step's batch loss times
            vectors ``(q, d)`` each; ``products`` ``(q, n)`` are those of the vectors and the shares. A parameter that it leaves
            out has the product 0.
        of_shares: whether it is made of the shares, which a log of gradients holds.
        of_loss: the product from the loss as a function of the parameters, where it is one that a replay calls.
        differentiated: whether a replay differentiates the step's gradient once more.
        third_derivative: whether the third derivative of the loss is to be had beside it.
    """

    product: Callable[[Trajectory, StepRecord, Mapping[str, Shares], Vectors, Tensor], Vectors]
    of_shares: bool = False
    of_loss: Callable[..., Vectors] | None = None
    differentiated: bool = False
    third_derivative: bool = False

    @property
    def replayed(self) -> bool:
        """Whether it needs the run's steps to be run again."""
        return self.differentiated or self.of_loss is not None


def curvature_of(name: str) -> Curvature:
    """The curvature of a name.

    Raises:
        ConfigurationError: there is none.
    """
    check_choice("curvature", name, CURVATURES)
    return CURVATURES[name]


def best_curvature(*, replayed: bool) -> Literal["fisher", "hessian"]:
    """Name of the most faithful curvature of a run that is replayed, or read from a log of gradients."""
    return "hessian" if replayed else "fisher"


def _no_product(*_: Any) -> Vectors:
    return {}


def _product_of_shares(
    trajectory: Trajectory, record: StepRecord, shares: Mapping[str, Shares], vectors: Vectors, products: Tensor
) -> Vectors:
    if record.measured:
        raise CurvatureUnavailable(
            "curvature='fisher' needs per-sample gradients, and in this module the effect of a removal was measured "
            "instead, because no rule gives them; use curvature='hessian' or 'none'."
        )
    return fisher_product(record, shares, products)


def _replayed_product(name: str) -> Callable[..., Vectors]:
    def product(
        trajectory: Trajectory, record: StepRecord, shares: Mapping[str, Shares], vectors: Vectors, products: Tensor
    ) -> Vectors:
        return trajectory.curvature_product(record.index, name, vectors)

    return product


CURVATURES: dict[str, Curvature] = {
    "none": Curvature(_no_product),
    "fisher": Curvature(_product_of_shares, of_shares=True),
    "gauss_newton": Curvature(_replayed_product("gauss_newton"), of_loss=gauss_newton_product),
    "hessian": Curvature(_replayed_product("hessian"), differentiated=True, third_derivative=True),
}
