"""The pure steps against torch's own optimizers; adjoint and finite response against dense references."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_influence.core.adjoint import Adjoint, adjoint
from lightning_influence.core.optimizers import UPDATES, RecordedStep, step
from lightning_influence.core.response import finite_response
from lightning_influence.errors import UnsupportedOptimizer
from lightning_influence.run.optimizer import read_hyper, read_moments, update_name

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "adamw_maximize": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, maximize=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adam_l2": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "adam_l2_maximize": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1, maximize=True),
    "adam_decoupled": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1, decoupled_weight_decay=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "adam_amsgrad_l2": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, weight_decay=0.1),
    "sgd_maximize": lambda p: torch.optim.SGD(p, lr=1e-2, weight_decay=0.1, maximize=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, dampening=0.3, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pure_step_follows_torch(name: str) -> None:
    torch.manual_seed(0)
    parameter = torch.randn(7, dtype=torch.float64, requires_grad=True)
    optimizer = OPTIMIZERS[name]([parameter])
    update = UPDATES[update_name(optimizer)]
    theta, moments = parameter.detach().clone(), read_moments({}, update, parameter)
    for _ in range(5):
        parameter.grad = torch.randn(7, dtype=torch.float64)
        hyper = read_hyper(optimizer.param_groups[0], optimizer.state[parameter], type(optimizer))
        theta, moments = step(update, theta, moments, parameter.grad, hyper)
        optimizer.step()
        torch.testing.assert_close(theta, parameter.detach(), rtol=1e-12, atol=1e-13)
        logged = read_moments(optimizer.state[parameter], update, parameter)
        for mine, theirs in zip(moments, logged, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


def _hyper(kind: str, step_count: int) -> dict[str, float]:
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = OPTIMIZERS[kind]([parameter])
    hyper = read_hyper(optimizer.param_groups[0], {}, type(optimizer))
    return hyper | {"step": float(step_count)}


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
    hyper = _hyper(kind, count)
    update = UPDATES[update_name(OPTIMIZERS[kind]([torch.zeros(1, requires_grad=True)]))]
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
    recorded = RecordedStep(update, moments, sign * gradient + coupled * theta, hyper)
    before, a = adjoint(recorded, after)
    for mine, reference in zip((before.parameter, a, *before.moments), jacobians, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("count", [1, 2, 10])
def test_float32_records_give_the_float64_adjoint(count: int) -> None:
    """At the first step the derivative is a difference of nearly equal numbers (method.md section 2)."""
    torch.manual_seed(0)
    hyper = _hyper("adamw", count)
    gradient = torch.randn(1000) * 1e-3
    m, v = (torch.zeros(1000), torch.zeros(1000)) if count == 1 else (gradient * 0.3, gradient**2 * 0.2)
    after = Adjoint(torch.randn(1, 1000), (torch.randn(1, 1000) * 1e-3, torch.randn(1, 1000) * 1e-3))
    single = adjoint(RecordedStep(UPDATES["adam"], (m, v), gradient, hyper), after)[1]
    after64 = Adjoint(after.parameter.double(), tuple(a.double() for a in after.moments))
    double = adjoint(RecordedStep(UPDATES["adam"], (m.double(), v.double()), gradient.double(), hyper), after64)[1]
    assert (single - double).norm() <= 1e-6 * double.norm()


def test_silent_coordinates_stay_finite() -> None:
    """V = 0, m = 0, g = 0: the square root has an infinite derivative there, the step has none in v."""
    zero = torch.zeros(3)
    recorded = RecordedStep(UPDATES["adam"], (zero, zero), zero, _hyper("adamw", 3))
    before, a = adjoint(recorded, Adjoint(torch.ones(1, 3), (torch.ones(1, 3), torch.ones(1, 3))))
    assert all(torch.isfinite(x).all() for x in (before.parameter, *before.moments, a))
    torch.testing.assert_close(before.moments[1], torch.full((1, 3), 0.95))
    response = finite_response([recorded], [torch.ones(1, 3)], (torch.ones(1, 3), torch.ones(1, 3)), torch.zeros(2, 3))
    assert torch.equal(response, torch.zeros(1, 2))


@pytest.mark.parametrize("kind", ["adamw", "adamw_maximize", "amsgrad", "nesterov", "momentum"])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_finite_response_is_the_formula_of_section_5(kind: str, length: int) -> None:
    """Against the formula with the perturbed moments written in closed form (linear in the stream)."""
    torch.manual_seed(1)
    d, n, q = 6, 3, 2
    update = UPDATES[update_name(OPTIMIZERS[kind]([torch.zeros(1, requires_grad=True)]))]
    hypers = [_hyper(kind, 4 + j) for j in range(length)]
    moments = tuple(torch.randn(d).double() if i == 0 else torch.rand(d).double() for i in range(len(update.moments)))
    gradients = [torch.randn(d).double() for _ in range(length)]
    change = 0.5 * torch.randn(n, d).double()
    after = [torch.randn(q, d).double() for _ in range(length)]
    closing = tuple(torch.randn(q, d).double() for _ in moments)
    window, state = [], moments
    for gradient, hyper in zip(gradients, hypers, strict=True):
        window.append(RecordedStep(update, state, gradient, hyper))
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
    hyper, d = _hyper("adamw", 7), 20
    m, v, g = torch.randn(d).double(), torch.rand(d).double(), torch.randn(d).double()
    recorded = RecordedStep(UPDATES["adam"], (m, v), g, hyper)
    after = Adjoint(torch.randn(1, d).double(), (torch.randn(1, d).double(), torch.randn(1, d).double()))
    direction = torch.randn(5, d).double()
    _, a = adjoint(recorded, after)
    response = finite_response([recorded], [after.parameter], after.moments, 1e-6 * direction) / 1e-6
    torch.testing.assert_close(response, a @ direction.T, rtol=1e-4, atol=1e-7)


def test_unknown_optimizers_are_refused_by_name() -> None:
    parameter = torch.zeros(2, requires_grad=True)

    class MyAdamW(torch.optim.AdamW):
        pass

    for optimizer in (torch.optim.RMSprop([parameter]), MyAdamW([parameter]), torch.optim.LBFGS([parameter])):
        with pytest.raises(UnsupportedOptimizer, match=type(optimizer).__name__):
            update_name(optimizer)
    mixed = torch.optim.AdamW(
        [{"params": [parameter], "amsgrad": True}, {"params": [torch.zeros(1, requires_grad=True)]}]
    )
    with pytest.raises(UnsupportedOptimizer, match="amsgrad"):
        update_name(mixed)
