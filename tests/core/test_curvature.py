"""Curvature products against dense matrices from autograd, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev
from torch.nn import functional as F

from lightning_influence.core import curvature
from lightning_influence.core.curvature import fisher_product, gauss_newton_product, gradient_graph, third_derivative
from lightning_influence.core.shares import Dense
from lightning_influence.core.trajectory import StepRecord
from lightning_influence.errors import CurvatureUnavailable


class Attentive(nn.Module):
    """Attention, a norm and a head: what a transformer is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.norm, self.head = nn.Linear(4, 12), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return self.head((x + F.scaled_dot_product_attention(q, k, v, is_causal=True)).mean(1))


LOSSES = {
    "cross entropy": lambda out, y: F.cross_entropy(out, y),
    "cross entropy by keyword": lambda out, y: F.cross_entropy(input=out, target=y),
    "mean squared error": lambda out, y: F.mse_loss(out, F.one_hot(y, 3).to(out)),
    "scaled, with a penalty": lambda out, y: 0.3 * F.cross_entropy(out.tanh(), y) + 0.1,
}


def problem(name: str):  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    net = Attentive().double()
    x, y = torch.randn(5, 3, 4).double(), torch.randint(0, 3, (5,))
    parameters = {k: p.detach() for k, p in net.named_parameters()}

    def outputs(values: dict[str, Tensor]) -> Tensor:
        return functional_call(net, values, (x,))

    def loss(values: dict[str, Tensor]) -> Tensor:
        return LOSSES[name](outputs(values), y)

    vectors = {k: torch.randn(3, p.numel()).double() for k, p in parameters.items()}
    return parameters, outputs, loss, vectors, y


def hessian_product(loss, parameters, vectors, at_once: int = 8):  # type: ignore[no-untyped-def]
    return gradient_graph(loss, parameters).hessian_product(vectors, at_once=at_once)


def flat(tree: dict[str, Tensor]) -> Tensor:
    return torch.cat(list(tree.values()), 1)


def dense_hessian(loss, parameters) -> Tensor:  # type: ignore[no-untyped-def]
    blocks = hessian(loss)(parameters)
    sizes = {k: p.numel() for k, p in parameters.items()}
    return torch.cat([torch.cat([blocks[i][j].reshape(sizes[i], sizes[j]) for j in sizes], 1) for i in sizes])


@pytest.mark.parametrize("name", ["cross entropy", "scaled, with a penalty"])
@pytest.mark.parametrize("at_once", [1, 2, 8])
def test_hessian_products(name: str, at_once: int) -> None:
    parameters, _, loss, vectors, _ = problem(name)
    reference = flat(vectors) @ dense_hessian(loss, parameters)
    torch.testing.assert_close(flat(hessian_product(loss, parameters, vectors, at_once=at_once)), reference)
    first = {k: v[:1] for k, v in vectors.items()}
    torch.testing.assert_close(flat(hessian_product(loss, parameters, first)), reference[:1])
    forwards = curvature.hessian_product(loss, parameters, vectors, at_once=at_once)
    torch.testing.assert_close(flat(forwards), reference)


@pytest.mark.parametrize("name", LOSSES)
def test_gauss_newton_products(name: str) -> None:
    parameters, outputs, loss, vectors, y = problem(name)
    jacobian = jacrev(outputs)(parameters)
    j = torch.cat([b.reshape(15, -1) for b in jacobian.values()], 1)
    logits = outputs(parameters)
    inner = logits.tanh() if "penalty" in name else logits  # the loss function's own input
    if "penalty" in name:
        j = (1 - inner.square()).flatten()[:, None] * j
        h = 0.3 * hessian(lambda o: F.cross_entropy(o, y))(inner).reshape(15, 15)
    else:
        h = hessian(lambda o: LOSSES[name](o, y))(inner).reshape(15, 15)
    reference = flat(vectors) @ (j.T @ h @ j)
    torch.testing.assert_close(flat(gauss_newton_product(loss, parameters, vectors)), reference)


def test_gauss_newton_needs_a_known_loss() -> None:
    parameters, outputs, _, vectors, _ = problem("cross entropy")
    with pytest.raises(CurvatureUnavailable, match="curvature='hessian'"):
        gauss_newton_product(lambda values: outputs(values).square().mean(), parameters, vectors)


def test_third_derivative() -> None:
    """Against a central difference of exact Hessian products along the same direction."""
    parameters, _, loss, vectors, _ = problem("cross entropy")
    exact = third_derivative(loss, parameters, vectors)
    for i in range(3):
        v = {k: x[i].reshape(parameters[k].shape) for k, x in vectors.items()}
        one = {k: x[i : i + 1] for k, x in vectors.items()}
        h = 1e-4
        plus, minus = (
            flat(hessian_product(loss, {k: p + e * v[k] for k, p in parameters.items()}, one)) for e in (h, -h)
        )
        torch.testing.assert_close(flat(exact)[i : i + 1], (plus - minus) / (2 * h), rtol=1e-5, atol=1e-6)


def test_products_hold_no_graph() -> None:
    """Of parameters that are being trained too."""
    parameters, _, loss, vectors, _ = problem("cross entropy")
    trained = {k: p.clone().requires_grad_() for k, p in parameters.items()}
    one = {k: v[:1] for k, v in vectors.items()}
    for v in (one, vectors):
        for products in (
            third_derivative(loss, trained, v),
            gauss_newton_product(loss, trained, v),
            hessian_product(loss, trained, v),
        ):
            assert not any(p.requires_grad for p in products.values())


def test_products_are_linear_in_the_gradient() -> None:
    """A sanity check of the reference itself: the Hessian is the derivative of the gradient."""
    parameters, _, loss, vectors, _ = problem("cross entropy")
    one = {k: x[:1] for k, x in vectors.items()}
    v = {k: x[0].reshape(parameters[k].shape) for k, x in vectors.items()}
    plus, minus = (grad(loss)({k: p + e * v[k] for k, p in parameters.items()}) for e in (1e-5, -1e-5))
    difference = torch.cat([((plus[k] - minus[k]) / 2e-5).flatten() for k in plus])
    torch.testing.assert_close(flat(hessian_product(loss, parameters, one))[0], difference, rtol=1e-6, atol=1e-8)


def test_a_linear_loss_has_no_curvature() -> None:
    parameters = {"a": torch.randn(3), "b": torch.randn(2)}
    vectors = {k: torch.randn(2, p.numel()) for k, p in parameters.items()}
    found = hessian_product(lambda v: v["a"].sum() + 2 * v["b"].sum(), parameters, vectors)
    assert flat(found).shape == (2, 5) and not flat(found).any()
    mixed = hessian_product(lambda v: v["a"].sum() + v["b"].square().sum(), parameters, vectors)
    torch.testing.assert_close(mixed["b"], 2 * vectors["b"])
    assert not mixed["a"].any()


@pytest.mark.parametrize(
    "kappa",
    [[0.2] * 5, [0.5, 0.1, 0.1, 0.2, 0.1], [1 / 6, 1 / 6, 1 / 6, 1 / 4, 1 / 4], [0.5, 0.0, 0.25, 0.25, 0.0], [2.0] * 5],
    ids=["mean", "weighted mean", "micro-batches of three and two", "ignored samples", "sum"],
)
def test_fisher_products_weigh_each_sample_as_the_loss_does(kappa: list[float]) -> None:
    """The Fisher of ``sum_z kappa_z l_z`` is ``sum_z kappa_z grad l_z grad l_z^T``, here from each sample's own loss."""
    parameters, outputs, _, vectors, y = problem("cross entropy")
    sizes = [p.numel() for p in parameters.values()]
    per_sample = jacrev(lambda values: F.cross_entropy(outputs(values), y, reduction="none"))(parameters)
    rows = torch.cat([j.reshape(5, -1) for j in per_sample.values()], 1)
    weights = torch.tensor(kappa, dtype=torch.float64)
    fisher = sum(k * torch.outer(g, g) for k, g in zip(weights, rows, strict=True))
    numbers = torch.arange(5)
    record = StepRecord(0, numbers, weights, torch.zeros(5, dtype=torch.int64), {}, {}, {})
    shares = dict(zip(parameters, map(Dense, (weights[:, None] * rows).split(sizes, 1)), strict=True))
    products = flat(vectors) @ (weights[:, None] * rows).T
    torch.testing.assert_close(flat(fisher_product(record, shares, products)), flat(vectors) @ fisher)


def test_hessian_products_of_what_cannot_be_vectorised() -> None:
    """Group normalisation has no rule for many second derivatives at once: they are taken one after the other."""
    net = nn.Sequential(nn.Conv1d(2, 4, 1), nn.GroupNorm(2, 4), nn.GELU(), nn.Flatten(), nn.Linear(12, 3)).double()
    x, y = torch.randn(2, 2, 3).double(), torch.tensor([0, 2])
    parameters = {k: p.detach() for k, p in net.named_parameters()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(net, values, (x,)), y)

    def slope(values: dict[str, Tensor]) -> Tensor:
        leaves = {k: v.detach().requires_grad_() for k, v in values.items()}
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss(leaves), list(leaves.values()))])

    vectors = {k: torch.randn(3, p.numel()).double() for k, p in parameters.items()}
    products = flat(hessian_product(loss, parameters, vectors))
    for i, product in enumerate(products):
        v = {k: x[i].reshape(parameters[k].shape) for k, x in vectors.items()}
        plus, minus = (slope({k: p + e * v[k] for k, p in parameters.items()}) for e in (1e-5, -1e-5))
        torch.testing.assert_close(product, (plus - minus) / 2e-5, rtol=1e-5, atol=1e-7)
