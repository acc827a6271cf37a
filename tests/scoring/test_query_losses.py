"""Query losses, their gradients and curvature against the network written out, as it is in evaluation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from modules import Classifier, digits
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_influence.scoring.queries import query_curvature, query_gradients, query_losses

N = 6


def noisy() -> Classifier:
    """A network that answers otherwise in training: half of its features dropped, and normalised by the batch."""
    net = nn.Sequential(nn.Linear(64, 4), nn.BatchNorm1d(4), nn.GELU(), nn.Dropout(0.5), nn.Linear(4, 10)).double()
    with torch.no_grad():
        net[1].running_mean.normal_()
        net[1].running_var.uniform_(0.5, 2.0)
    return Classifier(net=net)


def own_loss(module: Classifier, i: int) -> Callable[[dict[str, Tensor]], Tensor]:
    """Loss of query ``i`` as a function of the parameters: running statistics, nothing dropped."""
    x, y = digits(N, torch.float64).tensors
    norm = module.net[1]
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    linears = {"net.0": nn.Linear(64, 4).double(), "net.4": nn.Linear(4, 10).double()}

    def loss(p: dict[str, Tensor]) -> Tensor:
        def through(name: str, value: Tensor) -> Tensor:
            return functional_call(linears[name], {k: p[f"{name}.{k}"] for k in ("weight", "bias")}, (value,))

        hidden = (through("net.0", x[i]) - mean) / (var + norm.eps).sqrt() * p["net.1.weight"] + p["net.1.bias"]
        return F.cross_entropy(through("net.4", F.gelu(hidden))[None], y[i : i + 1])

    return loss


def flat(name: str, values: Tensor) -> Tensor:
    return values.flatten()


def per_example(model: Classifier, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model.net(batch[0]), batch[1], reduction="none")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("query_loss", [None, per_example])
def test_queries_are_asked_in_evaluation_mode(training: bool, query_loss: Callable[..., Tensor] | None) -> None:
    module = noisy().train(training)
    buffers = {k: b.clone() for k, b in module.named_buffers()}
    parameters = {k: p.detach().clone() for k, p in module.named_parameters()}
    queries = DataLoader(digits(N, torch.float64), 4)
    names = list(parameters)
    losses = [own_loss(module, i) for i in range(N)]
    torch.testing.assert_close(
        query_losses(module, queries, query_loss), torch.stack([loss(parameters) for loss in losses])
    )

    references = [grad(loss)(parameters) for loss in losses]
    each = query_gradients(module, queries, names, flat, query_loss=query_loss, progress=False)
    mean = query_gradients(module, queries, names, flat, query_loss=query_loss, target="mean", progress=False)
    for k in names:
        rows = torch.stack([reference[k].flatten() for reference in references])
        torch.testing.assert_close(each[k], rows)
        torch.testing.assert_close(mean[k], rows.mean(0, keepdim=True))

    directions = {k: torch.randn(2, p.numel(), dtype=torch.float64) for k, p in parameters.items()}
    columns = []
    for loss in losses:
        blocks = hessian(loss)(parameters)
        columns.append(
            sum(
                torch.einsum(
                    "ki,ij,kj->k", directions[a], blocks[a][b].reshape(parameters[a].numel(), -1), directions[b]
                )
                for a in names
                for b in names
            )
        )
    curvature = query_curvature(module, queries, names, query_loss=query_loss)
    torch.testing.assert_close(curvature(directions), torch.stack(columns, 1))

    assert all(m.training is training for m in module.modules())
    assert all(torch.equal(b, buffers[k]) for k, b in module.named_buffers())
