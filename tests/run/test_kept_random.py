"""A function of a batch, run again without some of its rows, draws the same numbers for the others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_influence.run.kept_random import KeptRandom, NotedRandom
from lightning_influence.run.random_state import random_state, read_random_state

N = 5
torch.manual_seed(0)
LSTM = nn.LSTM(8, 8, 2, batch_first=True, dropout=0.5).double()
ENCODER = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True).double()

KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.5),
    "dropout of channels": lambda x: F.dropout2d(x[..., None], 0.5),
    "dropout as a kernel": lambda x: torch.native_dropout(x, 0.5, True)[0],
    "dropout between layers": lambda x: LSTM(x)[0],
    "attention": ENCODER,
    "dropout inside attention": lambda x: F.scaled_dot_product_attention(
        x[:, None], x[:, None], x[:, None], dropout_p=0.3
    ),
    "heads in the batch": lambda x: F.dropout(x.repeat_interleave(3, 0), 0.5),
    "the batch second": lambda x: F.dropout(x.transpose(0, 1), 0.5).transpose(0, 1),
    "noise": lambda x: x + torch.randn_like(x) + torch.empty_like(x).normal_() + torch.normal(x.detach(), 1.0),
    "time steps": lambda x: x * torch.randint(0, 1000, (len(x), 1, 1)),
    "a number for all": lambda x: x * torch.rand(()),
    "gumbel": lambda x: F.gumbel_softmax(x),
    "samples of classes": lambda x: x + torch.multinomial(x[:, 0].softmax(1), 1)[..., None],
    "NumPy's own": lambda x: x,
}
LOST: dict[str, Callable[[Tensor], Tensor]] = {
    "a permutation of the samples": lambda x: x[torch.randperm(len(x))],
    "samples drawn from the batch": lambda x: x[torch.randint(0, len(x), (len(x),))],
    "one by one": lambda x: torch.stack([row * torch.rand(()) for row in x]),
    "as many as there are": lambda x: x * torch.rand(3 * len(x) + 1)[: len(x), None, None],
}


def both(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, KeptRandom]:
    x = torch.randn(N, 4, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    state, rows = read_random_state(), [0, 1, 3, 4]
    with random_state(state), NotedRandom() as noted:
        whole = function(x)
    kept = KeptRandom(noted, torch.tensor([2]), N)
    with random_state(state), kept:
        part = function(x[rows])
        (gradient,) = torch.autograd.grad(part.sum(), x)
    rows = [len(whole) // N * i + j for i in rows for j in range(len(whole) // N)]
    expected = whole[rows]
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), x)[0]) if kept.lost is None else None
    return expected, part, kept


@pytest.mark.parametrize("name", KEPT)
def test_rows_keep_their_numbers(name: str) -> None:
    expected, part, kept = both(KEPT[name])
    assert kept.lost is None
    torch.testing.assert_close(part, expected)


@pytest.mark.parametrize("name", LOST)
def test_numbers_that_cannot_be_kept_are_told(name: str) -> None:
    assert both(LOST[name])[2].lost
