"""Every form contracts like the dense matrix it stands for, and survives packing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_influence.core.coordinates import pack_keep, plan, unpack_keep
from lightning_influence.core.shares import Dense, Form, Outer, Rows, Stack, Sum, add, merged, pack, unpack

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
        return Rows(where, values, ROWS), dense.flatten(1)
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
    torch.testing.assert_close(form.scaled(0.3).dense(), 0.3 * dense)
    index = torch.randperm(dense.shape[1], generator=generator)[: data.draw(st.integers(1, 15))].sort().values
    torch.testing.assert_close(form.at(index).dense(), dense[:, index])
    tensors, meta = pack(form)
    torch.testing.assert_close(unpack(meta, tensors.__getitem__).dense(), dense)


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


def shares(n: int = 4, t: int = 2) -> tuple[dict[str, Form], dict[str, tuple[int, ...]]]:
    generator = torch.Generator().manual_seed(0)
    forms: dict[str, Form] = {
        "wide.weight": Outer(torch.randn(n, t, 60, generator=generator), torch.randn(n, t, 50, generator=generator)),
        "narrow.weight": Outer(torch.randn(n, 40, 4, generator=generator), torch.randn(n, 40, 5, generator=generator)),
        "bias": Dense(torch.randn(n, 60, generator=generator)),
    }
    return forms, {"wide.weight": (60, 50), "narrow.weight": (4, 5), "bias": (60,)}


def test_plans() -> None:
    forms, shapes = shares()
    assert {k.kind for k in plan(forms, shapes, compression="full").values()} == {"full"}
    factored = plan(forms, shapes, compression="factored")
    assert [k.kind for k in factored.values()] == ["factored", "full", "full"], "the smaller lossless form"
    for name, keep in factored.items():
        assert torch.equal(keep.compress(forms[name]).dense(), forms[name].dense())
        values = torch.randn(2, *shapes[name])
        assert torch.equal(keep.select(values), values.flatten(1))


@pytest.mark.parametrize("size", [1, 7, 100, 2999])
def test_a_mask_is_a_fixed_set_of_coordinates(size: int) -> None:
    forms, shapes = shares()
    keeps = plan(forms, shapes, compression="mask", mask_size=size, seed=3)
    again = plan(forms, shapes, compression="mask", mask_size=size, seed=3)
    for name, keep in keeps.items():
        total = forms[name].n_coordinates
        assert 0.5 * min(size, total) <= keep.size <= min(size, total)
        if keep.index is None:
            assert total <= size
            continue
        assert torch.equal(keep.index, again[name].index)
        assert torch.equal(keep.index, keep.index.unique())
        torch.testing.assert_close(keep.compress(forms[name]).dense(), forms[name].dense()[:, keep.index])
        values = torch.randn(2, *shapes[name])
        assert torch.equal(keep.select(values), values.flatten(1)[:, keep.index])
        tensors, meta = pack_keep(keep)
        assert torch.equal(unpack_keep(meta, tensors.__getitem__).index, keep.index)
    if size < 60:
        other = plan(forms, shapes, compression="mask", mask_size=size, seed=4)
        assert any(not torch.equal(k.index, other[n].index) for n, k in keeps.items())


def test_auto_masks_what_does_not_fit() -> None:
    forms, shapes = shares()
    lossless = plan(forms, shapes, compression="auto")
    assert {k.kind for k in lossless.values()} == {"factored", "full"}
    tight = plan(forms, shapes, compression="auto", mask_size=30, budget=700)
    assert [k.kind for k in tight.values()] == ["mask", "full", "full"], "the most expensive first"
