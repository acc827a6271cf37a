"""What a log keeps of every parameter: a fixed set of coordinates, in the smallest form that fits."""

from __future__ import annotations

import pytest
import torch

from lightning_influence.core.coordinates import pack_keep, plan, unpack_keep
from lightning_influence.core.shares import Dense, Form, Outer


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
