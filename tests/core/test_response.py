"""The finite response against its formula, the changed moments in closed form."""

from __future__ import annotations

import pytest
import torch
from toy import hyper_of, update_of

from lightning_influence.core.adjoint import Adjoint, adjoint
from lightning_influence.core.optimizers import UPDATES, ParameterStep, step
from lightning_influence.core.response import finite_response


@pytest.mark.parametrize("kind", ["adamw", "adamw_maximize", "amsgrad", "nesterov", "momentum"])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_finite_response_is_the_formula_with_moments_in_closed_form(kind: str, length: int) -> None:
    """Against the formula with the perturbed moments written in closed form (linear in the stream)."""
    torch.manual_seed(1)
    d, n, q = 6, 3, 2
    update = update_of(kind)
    hypers = [hyper_of(kind, 4 + j) for j in range(length)]
    moments = tuple(torch.randn(d).double() if i == 0 else torch.rand(d).double() for i in range(len(update.moments)))
    gradients = [torch.randn(d).double() for _ in range(length)]
    change = 0.5 * torch.randn(n, d).double()
    after = [torch.randn(q, d).double() for _ in range(length)]
    closing = tuple(torch.randn(q, d).double() for _ in moments)
    window, state = [], moments
    for gradient, hyper in zip(gradients, hypers, strict=True):
        window.append(ParameterStep(update, state, gradient, hyper))
        state = update.apply(state, gradient, hyper)[1]

    expected = torch.zeros(q, n, dtype=torch.float64)
    sign = -1.0 if hypers[0]["maximize"] else 1.0
    for z in range(n):
        recorded, perturbed = moments, moments
        for j, (gradient, hyper) in enumerate(zip(gradients, hypers, strict=True)):
            shifted = gradient + sign * change[z] if j == 0 else gradient
            new, perturbed = step(update, torch.zeros(d).double(), perturbed, sign * shifted, hyper)
            old, recorded = step(update, torch.zeros(d).double(), recorded, sign * gradient, hyper)
            expected[:, z] += after[j] @ (new - old)
        expected[:, z] += sum(c @ (p - r) for c, p, r in zip(closing, perturbed, recorded, strict=True))
    torch.testing.assert_close(finite_response(window, after, closing, change), expected, rtol=1e-10, atol=1e-13)


def test_finite_response_of_a_small_change_is_the_tangent() -> None:
    torch.manual_seed(2)
    hyper, d = hyper_of("adamw", 7), 20
    m, v, g = torch.randn(d).double(), torch.rand(d).double(), torch.randn(d).double()
    recorded = ParameterStep(UPDATES["adam"], (m, v), g, hyper)
    after = Adjoint(torch.randn(1, d).double(), (torch.randn(1, d).double(), torch.randn(1, d).double()))
    direction = torch.randn(5, d).double()
    _, a = adjoint(recorded, after)
    response = finite_response([recorded], [after.parameter], after.moments, 1e-6 * direction) / 1e-6
    torch.testing.assert_close(response, a @ direction.T, rtol=1e-4, atol=1e-7)


def test_a_float32_record_answers_in_the_precision_of_the_change() -> None:
    hyper, d = hyper_of("adamw", 2), 50
    m, v, g = torch.randn(d), torch.rand(d), torch.randn(d)
    window = [ParameterStep(UPDATES["adam"], (m, v), g, hyper)]
    exact = [step_.to(torch.float64) for step_ in window]
    after, closing = [torch.randn(2, d)], (torch.randn(2, d), torch.randn(2, d))
    change = 0.1 * torch.randn(4, d, dtype=torch.float64)
    reference = finite_response(exact, [a.double() for a in after], tuple(c.double() for c in closing), change)
    torch.testing.assert_close(finite_response(window, after, closing, change), reference, rtol=1e-12, atol=1e-14)
    single = finite_response(exact, after, closing, change.float())
    torch.testing.assert_close(single, reference.float(), rtol=1e-4, atol=1e-5)
