"""A function of a batch, run again without some of its rows, draws the same numbers for the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import permutations

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
    "a permutation of two views": lambda x: torch.cat([x, x])[torch.randperm(2 * len(x))],
    "some samples, each once": lambda x: x[torch.multinomial(torch.ones(len(x)), 2)],
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


def partners(draw: Callable[[], Tensor], again: Callable[[], Tensor], gone: list[int]) -> tuple[list[int], list[int]]:
    """Positions of samples that a step draws, and that it draws without some of its samples."""
    with NotedRandom() as noted:
        whole = draw()
    kept = KeptRandom(noted, torch.tensor(gone), N)
    with kept:
        rest = again()
    assert kept.lost is None
    return whole.tolist(), rest.tolist()


@pytest.mark.parametrize("gone", [[2], [0, 4]], ids=str)
def test_a_permutation_keeps_every_partner_that_stays(gone: list[int]) -> None:
    """And is as likely as any other of so many samples: each comes from as many of the whole."""
    left = [i for i in range(N) if i not in gone]
    found = Counter[tuple[int, ...]]()
    for whole in permutations(range(N)):
        noted = NotedRandom()
        noted.draws.append((torch.tensor(whole), N))
        kept = KeptRandom(noted, torch.tensor(gone), N)
        with kept:
            rest = torch.randperm(len(left)).tolist()
        assert kept.lost is None
        found[tuple(rest)] += 1
        for row, other in zip(left, rest, strict=True):
            assert whole[row] in gone or left[other] == whole[row]
    assert set(found.values()) == {len(list(permutations(range(N)))) // len(list(permutations(left)))}
    assert len(found) == len(list(permutations(left)))


DRAWN: dict[str, Callable[[int], Tensor]] = {
    "one for each": lambda n: torch.randint(0, n, (n,)),
    "by weight, again and again": lambda n: torch.multinomial(torch.ones(n), n, True),
    "written into a tensor": lambda n: torch.empty(n, dtype=torch.int64).random_(0, n),
}


@pytest.mark.parametrize("name", DRAWN)
def test_samples_drawn_from_the_batch_stay_where_they_are_there(name: str) -> None:
    torch.manual_seed(1)
    replaced = 0
    for _ in range(20):
        whole, rest = partners(lambda: DRAWN[name](N), lambda: DRAWN[name](N - 1), [2])
        left = [0, 1, 3, 4]
        for row, other in zip(left, rest, strict=True):
            assert 0 <= other < N - 1
            assert whole[row] == 2 or left[other] == whole[row]
            replaced += whole[row] == 2
    assert replaced


def test_a_range_that_only_happens_to_be_the_number_of_samples_is_left() -> None:
    """There are as many classes as samples are left."""
    whole, rest = partners(lambda: torch.randint(0, N - 1, (N,)), lambda: torch.randint(0, N - 1, (N - 1,)), [2])
    assert rest == [whole[i] for i in (0, 1, 3, 4)]
