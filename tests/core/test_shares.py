"""Every form contracts like the dense matrix it stands for, and survives packing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_influence.core.shares import (
    CoordinateBlock,
    Dense,
    Form,
    Layout,
    Outer,
    SparseRows,
    Stack,
    Sum,
    add,
    merged,
    nbytes,
    pack,
    sample_chunks,
    unpack,
)

ROWS, COLUMNS = 5, 3


def draw(kind: str, n: int, t: int, generator: torch.Generator) -> tuple[Form, torch.Tensor]:
    """A form and the dense rows it stands for, computed by a loop."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if kind == "dense":
        values = normal(n, ROWS * COLUMNS)
        return Dense(values), values
    if kind == "outer":
        left, right = normal(n, t, ROWS), normal(n, t, COLUMNS)
        rows = [sum(torch.outer(left[i, k], right[i, k]) for k in range(t)) for i in range(n)]
        return Outer(left, right), torch.stack(rows).flatten(1)
    if kind == "rows":
        where, values = torch.randint(0, ROWS, (n, t), generator=generator), normal(n, t, COLUMNS)
        dense = torch.zeros(n, ROWS, COLUMNS, dtype=torch.float64)
        for i in range(n):
            for k in range(t):
                dense[i, where[i, k]] += values[i, k]
        return SparseRows(where, values, ROWS), dense.flatten(1)
    parts = [draw(k, n, t, generator) for k in ("outer", "rows", "dense")]
    if kind == "sum":
        return Sum([p for p, _ in parts]), sum(d for _, d in parts)
    return Stack([p for p, _ in parts]), torch.cat([d for _, d in parts])


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["dense", "outer", "rows", "sum", "stack"]),
    n=st.integers(1, 4),
    t=st.integers(1, 4),
    q=st.integers(1, 3),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_contractions(kind: str, n: int, t: int, q: int, seed: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    form, dense = draw(kind, n, t, generator)
    vectors = torch.randn(q, dense.shape[1], generator=generator, dtype=torch.float64)
    weights = torch.randn(q, len(dense), generator=generator, dtype=torch.float64)
    assert (form.n_samples, form.n_coordinates) == dense.shape
    torch.testing.assert_close(form.inner(vectors), vectors @ dense.T)
    torch.testing.assert_close(form.combine(weights), weights @ dense)
    start = data.draw(st.integers(0, len(dense) - 1))
    part = slice(start, data.draw(st.integers(start + 1, len(dense) + 2)))
    torch.testing.assert_close(form.dense(part), dense[part])
    block = CoordinateBlock.of(torch.empty(ROWS, COLUMNS))
    total = block.select(dense.sum(0))
    torch.testing.assert_close(form.sum_at(block), total)
    assert block.size == total.numel() == 12
    assert form.dense(slice(start, start)).shape == (0, dense.shape[1])
    torch.testing.assert_close(form.scaled(0.3).dense(), 0.3 * dense)
    index = torch.randperm(dense.shape[1], generator=generator)[: data.draw(st.integers(1, 15))].sort().values
    torch.testing.assert_close(form.at(index).dense(), dense[:, index])
    tensors, meta = pack(form)
    torch.testing.assert_close(unpack(meta, tensors.__getitem__).dense(), dense)


def test_a_layout_in_a_log_is_what_earlier_versions_wrote() -> None:
    rows = SparseRows(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1, 3), n_rows=4)
    form = Stack([Sum([Dense(torch.ones(2, 12)), rows]), Outer(torch.ones(2, 1, 4), torch.ones(2, 1, 3))])
    tensors, layout = pack(form)
    written = {
        "form": "stack",
        "parts": [{"form": "sum", "parts": [{"form": "dense"}, {"form": "rows", "n_rows": 4}]}, {"form": "outer"}],
    }
    assert layout.to_json() == written and Layout.from_json(written) == layout
    assert list(tensors) == ["0/0/values", "0/1/rows", "0/1/values", "1/left", "1/right"]
    torch.testing.assert_close(unpack(Layout.from_json(written), tensors.__getitem__).dense(), form.dense())


@pytest.mark.parametrize("first", ["dense", "outer", "rows", "sum"])
@pytest.mark.parametrize("second", ["dense", "outer", "rows"])
def test_sums_of_uses(first: str, second: str) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = draw(first, 3, 2, generator), draw(second, 3, 4, generator)
    torch.testing.assert_close(add(a[0], b[0]).dense(), a[1] + b[1])


@pytest.mark.parametrize("kind", ["dense", "outer", "rows"])
def test_merged_tokens(kind: str) -> None:
    form, dense = draw(kind, 12, 2, torch.Generator().manual_seed(0))
    torch.testing.assert_close(merged(form, 4).dense(), dense.unflatten(0, (4, 3)).sum(1))


@pytest.mark.parametrize("kind", ["dense", "outer", "rows", "sum", "stack"])
def test_contractions_are_made_in_the_precision_of_what_is_asked(kind: str) -> None:
    """A log keeps float32; what it is contracted with may be float64."""
    form, dense = draw(kind, 4, 2, torch.Generator().manual_seed(0))
    tensors, meta = pack(form)
    single = unpack(meta, lambda key: tensors[key].float() if tensors[key].is_floating_point() else tensors[key])
    assert single.dense().dtype == torch.float32
    vectors, weights = torch.randn(2, dense.shape[1]).double(), torch.randn(2, len(dense)).double()
    torch.testing.assert_close(single.inner(vectors), vectors @ dense.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(single.combine(weights), weights @ dense, rtol=1e-5, atol=1e-5)
    assert single.inner(vectors).dtype == single.combine(weights).dtype == torch.float64
    assert nbytes(single) == sum(t.nbytes for t in pack(single)[0].values())


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["dense", "outer", "rows", "sum", "stack"]),
    used=st.lists(st.booleans(), min_size=12, max_size=12),
    seed=st.integers(0, 2**16),
)
def test_few_samples_combined_are_those_samples(kind: str, used: list[bool], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    form, dense = draw(kind, 12 if kind != "stack" else 4, 2, generator)
    weights = torch.randn(2, 12, generator=generator, dtype=torch.float64) * torch.tensor(used)
    torch.testing.assert_close(form.combine(weights), weights @ dense)


@pytest.mark.parametrize("elements", [1, 8, 2**24])
def test_scattered_coordinates_of_products(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A diagonal: far fewer coordinates than the block of its rows and columns holds."""
    monkeypatch.setattr("lightning_influence.core.shares._GATHER_ELEMENTS", elements)
    form = Outer(torch.randn(3, 2, 9).double(), torch.randn(3, 2, 9).double())
    index = torch.arange(9) * 10
    torch.testing.assert_close(form.at(index).values, form.dense()[:, index])


def test_no_samples_of_a_single_micro_batch() -> None:
    assert Stack([Dense(torch.zeros(2, 3))]).dense(slice(1, 1)).shape == (0, 3)


def test_what_is_not_a_form_is_refused() -> None:
    class Lazy:
        n_samples, n_coordinates = 1, 1

    with pytest.raises(TypeError, match="Lazy is not a form"):
        pack(Lazy())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Sum is not what a rule returns"):
        merged(Sum([Dense(torch.zeros(2, 1))]), 1)


@pytest.mark.parametrize("formed", [False, True])
def test_both_orders_of_contraction_are_equal(formed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the factors and with the products formed, over several blocks; each is the matrix product."""
    form, dense = draw("outer", 4, 3, torch.Generator().manual_seed(0))
    monkeypatch.setattr(Outer, "_is_cheaper_formed", lambda *_: formed)
    monkeypatch.setattr("lightning_influence.core.shares._FORMED_ELEMENTS", 2 * ROWS * COLUMNS)
    vectors = torch.randn(5, ROWS * COLUMNS).double()
    weights = torch.randn(5, 4).double()
    torch.testing.assert_close(form.inner(vectors), vectors @ dense.T, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(form.combine(weights), weights @ dense, rtol=1e-10, atol=1e-12)


def test_a_share_is_formed_where_that_multiplies_less() -> None:
    """One query goes through the factors, as does one token; many queries of many tokens read the product."""
    sizes = {
        (t, q): Outer(torch.ones(1, t, 8), torch.ones(1, t, 8))._is_cheaper_formed(q) for t in (1, 64) for q in (1, 64)
    }
    assert sizes == {(1, 1): False, (1, 64): False, (64, 1): False, (64, 64): True}


@pytest.mark.parametrize("least", [1, 2])
@pytest.mark.parametrize("n", [0, 1, 2, 5, 64])
@pytest.mark.parametrize("d", [1, 5000, 2**20])
def test_chunks_hold_every_sample_once(n: int, d: int, least: int) -> None:
    chunks = sample_chunks(n, d, elements=2**15, least=least)
    assert [i for c in chunks for i in range(c.start, c.stop)] == list(range(n))
    sizes = [c.stop - c.start for c in chunks]
    assert not sizes or min(sizes) >= min(least, n)
    assert all(size * d <= 2**15 or size <= max(1, 2 * least - 1) for size in sizes)


@pytest.mark.parametrize("kind", ["dense", "outer", "rows", "sum", "stack"])
def test_shares_are_weighted_by_sample(kind: str) -> None:
    form, dense = draw(kind, 3, 2, torch.Generator().manual_seed(0))
    weights = torch.linspace(0, 2, len(dense), dtype=torch.float64)
    torch.testing.assert_close(form.weighted(weights).dense(), weights[:, None] * dense)
