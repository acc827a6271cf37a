"""The adjoint of a step against autograd through the step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import hyper_of, update_of

from lightning_influence.core.adjoint import Adjoint, adjoint, gradient_adjoint, join_adjoints
from lightning_influence.core.optimizers import UPDATES, ParameterStep, join, step
from lightning_influence.core.response import finite_response


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(
        ["adamw", "adamw_maximize", "adam_l2", "adam_l2_maximize", "amsgrad", "momentum", "nesterov", "sgd"]
    ),
    count=st.integers(1, 50),
    seed=st.integers(0, 2**16),
)
def test_adjoint_is_the_jacobian_of_the_step(kind: str, count: int, seed: int) -> None:
    """Against autograd through `step` itself, one scalar at a time, float64."""
    generator = torch.Generator().manual_seed(seed)
    hyper = hyper_of(kind, count)
    update = update_of(kind)
    d, q = 4, 2

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    theta, gradient = draw(d), draw(d)
    moments = tuple(draw(d) if i == 0 else draw(d).square() for i in range(len(update.moments)))
    after = Adjoint(draw(q, d), tuple(draw(q, d) for _ in moments))
    inputs = (theta, gradient, *moments)

    def contracted(theta, gradient, *moments):  # type: ignore[no-untyped-def]
        new, new_moments = step(update, theta, moments, gradient, hyper)
        total = after.parameter @ new
        for weight, value in zip(after.moments, new_moments, strict=True):
            total = total + weight @ value
        return total

    jacobians = torch.autograd.functional.jacobian(contracted, inputs)
    sign = -1.0 if hyper["maximize"] else 1.0
    coupled = 0.0 if hyper["decoupled"] else hyper["weight_decay"]
    recorded = ParameterStep(update, moments, sign * gradient + coupled * theta, hyper)
    before, a = adjoint(recorded, after)
    for mine, reference in zip((before.parameter, a, *before.moments), jacobians, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-11)
    assert torch.equal(gradient_adjoint(recorded, after), a)


@pytest.mark.parametrize("count", [1, 2, 10])
def test_float32_records_give_the_float64_adjoint(count: int) -> None:
    """At the first step the derivative is a difference of nearly equal numbers (docs/method.md, "One optimizer step")."""
    torch.manual_seed(0)
    hyper = hyper_of("adamw", count)
    gradient = torch.randn(1000) * 1e-3
    m, v = (torch.zeros(1000), torch.zeros(1000)) if count == 1 else (gradient * 0.3, gradient**2 * 0.2)
    after = Adjoint(torch.randn(1, 1000), (torch.randn(1, 1000) * 1e-3, torch.randn(1, 1000) * 1e-3))
    single = adjoint(ParameterStep(UPDATES["adam"], (m, v), gradient, hyper), after)[1]
    after64 = Adjoint(after.parameter.double(), tuple(a.double() for a in after.moments))
    double = adjoint(ParameterStep(UPDATES["adam"], (m.double(), v.double()), gradient.double(), hyper), after64)[1]
    assert (single - double).norm() <= 1e-6 * double.norm()


def test_silent_coordinates_stay_finite() -> None:
    """V = 0, m = 0, g = 0: the square root has an infinite derivative there, the step has none in v."""
    zero = torch.zeros(3)
    recorded = ParameterStep(UPDATES["adam"], (zero, zero), zero, hyper_of("adamw", 3))
    before, a = adjoint(recorded, Adjoint(torch.ones(1, 3), (torch.ones(1, 3), torch.ones(1, 3))))
    assert all(torch.isfinite(x).all() for x in (before.parameter, *before.moments, a))
    torch.testing.assert_close(before.moments[1], torch.full((1, 3), 0.95))
    response = finite_response([recorded], [torch.ones(1, 3)], (torch.ones(1, 3), torch.ones(1, 3)), torch.zeros(2, 3))
    assert torch.equal(response, torch.zeros(1, 2))


def recorded_step(kind: str, d: int) -> ParameterStep:
    update = update_of(kind)
    moments = tuple(torch.randn(d).double() if i == 0 else torch.rand(d).double() for i in range(len(update.moments)))
    return ParameterStep(update, moments, torch.randn(d).double(), hyper_of(kind, 5))


@pytest.mark.parametrize("kind", ["adamw_maximize", "amsgrad", "sgd"])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("last", [True, False])
def test_blocks_and_joined_parameters_change_nothing(
    kind: str, queries: int, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each coordinate on its own: those of two parameters end to end, in blocks, are those of each. ``last``: of the last
    step, after which the queries do not depend on the moments.
    """
    steps = [recorded_step(kind, d) for d in (5, 2)]
    adjoints = [
        Adjoint(
            torch.randn(queries, len(s.gradient)).double(),
            () if last and i == 0 else tuple(torch.randn(queries, len(m)).double() for m in s.moments),
        )
        for i, s in enumerate(steps)
    ]
    alone = [adjoint(s, a) for s, a in zip(steps, adjoints, strict=True)]
    for size in (1, 3, 7, 100):
        monkeypatch.setattr("lightning_influence.core.adjoint._BLOCK", size)
        before, gradient = adjoint(join(steps), join_adjoints(adjoints))
        torch.testing.assert_close(gradient, torch.cat([g for _, g in alone], 1))
        torch.testing.assert_close(before.parameter, torch.cat([b.parameter for b, _ in alone], 1))
        for mine, *parts in zip(before.moments, *(b.moments for b, _ in alone), strict=True):
            torch.testing.assert_close(mine, torch.cat(parts, 1))
        torch.testing.assert_close(gradient_adjoint(join(steps), join_adjoints(adjoints)), gradient)
