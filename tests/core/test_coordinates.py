"""What a log keeps of every parameter: a fixed set of coordinates, in the smallest form that fits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_influence.core.coordinates import choose_coordinates, pack_coordinates, unpack_coordinates
from lightning_influence.core.shares import Dense, Form, Outer, Stack, Sum


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
    assert {k.kind for k in choose_coordinates(forms, shapes, compression="full").values()} == {"full"}
    factored = choose_coordinates(forms, shapes, compression="factored")
    assert [k.kind for k in factored.values()] == ["factored", "full", "full"], "the smaller lossless form"
    for name, keep in factored.items():
        assert torch.equal(keep.compress(forms[name]).dense(), forms[name].dense())
        values = torch.randn(2, *shapes[name])
        assert torch.equal(keep.select(values), values.flatten(1))


@pytest.mark.parametrize("size", [1, 7, 100, 2999])
def test_a_mask_is_a_fixed_set_of_coordinates(size: int) -> None:
    forms, shapes = shares()
    keeps = choose_coordinates(forms, shapes, compression="mask", mask_size=size, seed=3)
    again = choose_coordinates(forms, shapes, compression="mask", mask_size=size, seed=3)
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
        tensors, meta = pack_coordinates(keep)
        assert torch.equal(unpack_coordinates(meta, tensors.__getitem__).index, keep.index)
    if size < 60:
        other = choose_coordinates(forms, shapes, compression="mask", mask_size=size, seed=4)
        assert any(not torch.equal(k.index, other[n].index) for n, k in keeps.items())


def test_a_budget_that_is_just_enough_masks_nothing() -> None:
    forms, shapes = shares()
    needed = 4 * (2 * 60 + 2 * 50 + 20 + 60)  # factors of the wide weight, and what is smaller in full
    for budget, masked in ((needed, 0), (needed - 1, 1)):
        keeps = choose_coordinates(forms, shapes, compression="auto", mask_size=30, budget=budget)
        assert sum(k.kind == "mask" for k in keeps.values()) == masked


def test_auto_masks_what_does_not_fit() -> None:
    forms, shapes = shares()
    lossless = choose_coordinates(forms, shapes, compression="auto")
    assert {k.kind for k in lossless.values()} == {"factored", "full"}
    tight = choose_coordinates(forms, shapes, compression="auto", mask_size=30, budget=700)
    assert [k.kind for k in tight.values()] == ["mask", "full", "full"], "the most expensive first"


@settings(max_examples=100, deadline=None)
@given(
    parameters=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(0, 3)), min_size=1, max_size=6),
    mask_size=st.integers(1, 20),
    budget=st.integers(0, 600),
)
def test_auto_masks_as_few_as_the_budget_asks(
    parameters: list[tuple[int, int, int]], mask_size: int, budget: int
) -> None:
    """Most expensive first, until the rest fits: bytes per sample of float32 rows, factors and masks counted here by hand."""
    forms: dict[str, Form] = {}
    for i, (rows, columns, tokens) in enumerate(parameters):
        outer = Outer(torch.zeros(3, tokens, rows), torch.zeros(3, tokens, columns))
        forms[str(i)] = outer if tokens else Dense(torch.zeros(3, rows * columns))
    shapes = {str(i): (rows, columns) for i, (rows, columns, _) in enumerate(parameters)}
    keeps = choose_coordinates(forms, shapes, compression="auto", mask_size=mask_size, budget=budget)

    lossless, saved = {}, {}
    for name, (rows, columns, tokens) in zip(shapes, parameters, strict=True):
        factors, dense = 4 * tokens * (rows + columns), 4 * rows * columns
        lossless[name] = min(factors, dense) if tokens else dense
        saved[name] = lossless[name] - 4 * min(mask_size, rows * columns)
        expected = "factored" if tokens and factors < dense else "full"
        assert keeps[name].kind in (expected, "mask")
    masked = [k for k, keep in keeps.items() if keep.kind == "mask"]
    left = sum(lossless.values()) - sum(saved[k] for k in masked)
    worth = [k for k in keeps if saved[k] > 0]
    assert set(masked) <= set(worth)
    assert left <= budget or set(masked) == set(worth)
    for k in masked:
        assert all(lossless[k] >= lossless[other] for other in worth if other not in masked)
        assert keeps[k].size <= mask_size
    if masked:
        assert left + max(saved[k] for k in masked if lossless[k] == min(lossless[m] for m in masked)) > budget


def test_a_mask_over_a_product_is_some_rows_times_some_columns() -> None:
    product = Outer(torch.zeros(4, 2, 60), torch.zeros(4, 2, 50))
    for form in (product, Sum([product, product]), Stack([product, product])):
        index = choose_coordinates({"a": form}, {"a": (60, 50)}, compression="mask", mask_size=100)["a"].index
        rows, columns = (index // 50).unique(), (index % 50).unique()
        assert (len(rows), len(columns)) == (10, 10) and torch.equal(
            index, torch.cartesian_prod(rows * 50, columns).sum(1)
        )
    narrow = choose_coordinates(
        {"a": Outer(torch.zeros(4, 2, 60), torch.zeros(4, 2, 4))}, {"a": (60, 4)}, compression="mask", mask_size=98
    )
    assert narrow["a"].size == 75 and len((narrow["a"].index // 4).unique()) == 25, (
        "few columns leave room for more rows"
    )
    few = choose_coordinates({"a": Dense(torch.zeros(4, 3000))}, {"a": (60, 50)}, compression="mask", mask_size=100)[
        "a"
    ].index
    assert len((few // 50).unique()) > 40, "of rows that were not captured as products, single coordinates"
