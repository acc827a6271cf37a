"""Clipping against torch's own, and its adjoint against autograd through the definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_influence.core.clipping import apply_clip, clip_adjoint, norm_coefficient
from lightning_influence.core.trajectory import Clip

SIZES = {"a": 5, "b": 3}


def draw(seed: int, *shape: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(*shape, d, generator=generator, dtype=torch.float64) for k, d in SIZES.items()}


def norm_of(gradients: dict[str, Tensor]) -> float:
    return float(torch.cat(list(gradients.values())).norm())


@settings(max_examples=60, deadline=None)
@given(rule=st.sampled_from(["none", "norm", "value"]), bound=st.floats(0.05, 6.0), seed=st.integers(0, 2**16))
def test_it_is_torch_s(rule: str, bound: float, seed: int) -> None:
    gradients = draw(seed)
    parameters = {k: torch.nn.Parameter(torch.zeros_like(g)) for k, g in gradients.items()}
    for k, p in parameters.items():
        p.grad = gradients[k].clone()
    if rule == "norm":
        torch.nn.utils.clip_grad_norm_(parameters.values(), bound)
    elif rule == "value":
        torch.nn.utils.clip_grad_value_(parameters.values(), bound)
    clip = Clip(rule, bound, norm_of(gradients))  # type: ignore[arg-type]
    coefficient = norm_coefficient(clip, clip.raw_norm)
    for k, gradient in gradients.items():
        torch.testing.assert_close(apply_clip(clip, gradient, coefficient), parameters[k].grad, rtol=1e-12, atol=1e-14)


def test_coefficients_of_many_norms_at_once() -> None:
    norms = torch.tensor([0.0, 0.5, 1.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(
        norm_coefficient(Clip("norm", 1.0), norms), torch.tensor([1.0, 1.0, 1.0, 0.25]).double(), rtol=2e-6, atol=0.0
    )
    for rule in ("none", "value"):
        assert torch.equal(norm_coefficient(Clip(rule, 1.0), norms), torch.ones(4, dtype=torch.float64))


@settings(max_examples=60, deadline=None)
@given(rule=st.sampled_from(["none", "norm", "value"]), bound=st.floats(0.05, 6.0), seed=st.integers(0, 2**16))
def test_adjoint_is_the_jacobian_transposed(rule: str, bound: float, seed: int) -> None:
    gradients, adjoints = draw(seed), draw(seed + 1, 2)

    def contracted(*parts: Tensor) -> Tensor:
        """``<A, clip(g)>`` by the definition."""
        norm = torch.cat(parts).norm()
        if rule == "norm":
            parts = tuple(p * torch.clamp(bound / (norm + 1e-6), max=1.0) for p in parts)
        elif rule == "value":
            parts = tuple(p.clamp(-bound, bound) for p in parts)
        return sum(adjoints[k] @ p for k, p in zip(SIZES, parts, strict=True))  # type: ignore[return-value]

    reference = torch.autograd.functional.jacobian(contracted, tuple(gradients.values()))
    clip = Clip(rule, bound, norm_of(gradients))  # type: ignore[arg-type]
    mine = clip_adjoint(clip, gradients, adjoints, dict.fromkeys(SIZES, 1.0))
    for k, expected in zip(SIZES, reference, strict=True):
        torch.testing.assert_close(mine[k], expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("repeats", [2, 5])
def test_a_mask_is_extrapolated(repeats: int) -> None:
    """Where the coordinates that are not kept repeat those that are, the adjoint is the whole gradient's."""
    gradients, adjoints = draw(0), draw(1, 2)
    copies = {"a": repeats, "b": 1}
    whole = {k: g.repeat(copies[k]) for k, g in gradients.items()}
    clip = Clip("norm", 0.5, norm_of(whole))
    reference = clip_adjoint(
        clip, whole, {k: a.repeat(1, copies[k]) for k, a in adjoints.items()}, dict.fromkeys(SIZES, 1.0)
    )
    mine = clip_adjoint(clip, gradients, adjoints, {k: float(c) for k, c in copies.items()})
    for k, size in SIZES.items():
        torch.testing.assert_close(mine[k], reference[k][:, :size])


@pytest.mark.parametrize("rule", ["none", "norm", "value"])
def test_float32_gradients_stay_float32_and_take_float64_adjoints(rule: str) -> None:
    gradients, adjoints = draw(0), draw(1, 2)
    clip = Clip(rule, 0.5, norm_of(gradients))  # type: ignore[arg-type]
    coefficient, scales = norm_coefficient(clip, clip.raw_norm), dict.fromkeys(SIZES, 1.0)
    single = {k: g.float() for k, g in gradients.items()}
    reference = clip_adjoint(clip, gradients, adjoints, scales)
    mine = clip_adjoint(clip, single, adjoints, scales)
    for k, gradient in gradients.items():
        rows = apply_clip(clip, single[k][None], coefficient.reshape(1, 1))
        torch.testing.assert_close(rows[0], apply_clip(clip, gradient, coefficient).float())
        torch.testing.assert_close(mine[k], reference[k], rtol=1e-6, atol=1e-6)
