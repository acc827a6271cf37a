"""The compiled response against separate kernels, and what happens where nothing compiles."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace

import pytest
import torch
from toy import RUNS, ToyTrajectory, hyper_of, update_of

from lightning_influence.core import fused
from lightning_influence.core.optimizers import ParameterStep
from lightning_influence.core.response import finite_response
from lightning_influence.core.sweep import Method, sweep

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="no compiler"
)


def _case(kind: str, dtype: torch.dtype, q: int, length: int, *, closed: bool) -> tuple:  # type: ignore[type-arg]
    torch.manual_seed(length)
    d, n = 5000, 3
    update = update_of(kind)
    moments = tuple(torch.rand(d, dtype=dtype) for _ in update.moments)
    window, after = [], []
    for j in range(length):
        window.append(ParameterStep(update, moments, torch.randn(d, dtype=dtype), hyper_of(kind, 4 + j)))
        moments = window[-1].taken[1]
        after.append(torch.randn(q, d, dtype=dtype))
    closing = tuple(torch.randn(q, d, dtype=dtype) for _ in moments) if closed else ()
    return window, after, closing, 0.5 * torch.randn(n, d, dtype=dtype)


@needs_compiler
@pytest.mark.parametrize(
    ("kind", "dtype", "q"),
    [("adamw", torch.float32, 1), ("adamw_maximize", torch.float64, 2), ("nesterov", torch.float32, 2)],
)
def test_compiled_and_separate_kernels_agree(kind: str, dtype: torch.dtype, q: int) -> None:
    """Also at the end of a run, where the window is shorter and nothing is left in the moments."""
    for length, closed in ((3, True), (2, False), (1, False)):
        case = _case(kind, dtype, q, length, closed=closed)
        found, expected = fused.fused_response(*case, 3), finite_response(*case)
        assert found is not None
        assert found.dtype == dtype and found.shape == expected.shape
        tolerance = 1e-5 if dtype == torch.float32 else 1e-10
        assert (found - expected).norm() <= tolerance * expected.norm()
        torch.testing.assert_close(finite_response(*case, fuse=3), found, rtol=0, atol=0)


@needs_compiler
def test_parts_of_larger_tensors_of_any_shape_are_one_kernel() -> None:
    """As a window in files and its blocks of coordinates are; of each shape of the whole another kernel would be compiled."""

    def part(tensor: torch.Tensor, kind: int) -> torch.Tensor:
        if kind == 0:
            return tensor
        around = torch.zeros(*(n + kind for n in tensor.shape)) if kind < 3 else torch.zeros(2, *tensor.shape)
        view = around[tuple(slice(n) for n in tensor.shape)] if kind < 3 else around[1]
        return view.copy_(tensor)

    window, after, closing, change = _case("adamw", torch.float32, 1, 3, closed=True)
    expected = finite_response(window, after, closing, change)
    fused.fused_response(window, after, closing, change, 3)
    kernels = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for kind in (1, 2, 3):
        parts = [
            replace(s, moments=tuple(part(m, kind) for m in s.moments), gradient=part(s.gradient, kind)) for s in window
        ]
        weights, ends = [part(w, kind) for w in after], tuple(part(w, kind) for w in closing)
        found = fused.fused_response(parts, weights, ends, part(change, kind), 3)
        assert found is not None and (found - expected).norm() <= 1e-5 * expected.norm()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == kernels


def test_a_window_with_a_gap_is_left_to_separate_kernels() -> None:
    """A parameter that rested has fewer steps, and adjoints of its moments: the kernel of whole windows does not fit."""
    case = _case("adamw", torch.float32, 1, 2, closed=True)
    assert fused.fused_response(*case, 3) is None


def test_where_nothing_compiles_scores_are_the_same_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no working C++ compiler")

    run = ToyTrajectory(next(iter(RUNS.values())))
    expected = sweep(run, run.query_gradients(), Method("hessian")).scores
    monkeypatch.setattr(fused, "_PAYS", 0)
    monkeypatch.setattr(fused, "_COORDINATES", 1)
    monkeypatch.setattr(fused._Compiler, "failed", False)
    monkeypatch.setattr(fused, "_compiled", lambda _: refuse)
    with caplog.at_level(logging.WARNING, logger=fused.__name__):
        found = sweep(run, run.query_gradients(), Method("hessian")).scores
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)
    assert [r.message for r in caplog.records if "no working C++ compiler" in r.message] == [
        r.message for r in caplog.records
    ]
    assert len(caplog.records) == 1
    assert not fused.pays(10**12), "and it is not tried again"


@needs_compiler
def test_a_sweep_scores_the_same_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    run = ToyTrajectory(next(iter(RUNS.values())))
    expected = sweep(run, run.query_gradients(), Method("hessian", memory_window=2)).scores
    answered: list[bool] = []

    def spied(*args, **kwargs):  # type: ignore[no-untyped-def]
        found = fused_response(*args, **kwargs)
        answered.append(found is not None)
        return found

    fused_response = fused.fused_response
    monkeypatch.setattr("lightning_influence.core.response.fused_response", spied)
    monkeypatch.setattr(fused, "_PAYS", 0)
    monkeypatch.setattr(fused, "_COORDINATES", 1)
    found = sweep(run, run.query_gradients(), Method("hessian", memory_window=2)).scores
    assert any(answered)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
