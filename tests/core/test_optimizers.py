"""The pure steps against torch's own optimizers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import OPTIMIZERS

from lightning_influence.core.optimizers import UPDATES, ParameterStep, effective_gradient, parameter_before, step
from lightning_influence.errors import UnsupportedOptimizer
from lightning_influence.run.optimizer import read_hyper, read_moments, update_name


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


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    count=st.integers(1, 10_000),
    beta1=st.floats(0.5, 0.99),
    beta2=st.floats(0.9, 0.9999),
    weight_decay=st.floats(0, 1),
    decoupled=st.booleans(),
)
def test_inverse_undoes_the_step(
    seed: int, count: int, beta1: float, beta2: float, weight_decay: float, decoupled: bool
) -> None:
    """Of every update that has one, in float64."""
    g = torch.Generator().manual_seed(seed)
    theta, gradient, m, v = (torch.randn(9, generator=g, dtype=torch.float64) for _ in range(4))
    hyper = {"lr": 1e-2, "beta1": beta1, "beta2": beta2, "eps": 1e-8, "step": float(count), "maximize": 0.0}
    hyper |= {"weight_decay": weight_decay, "decoupled": float(decoupled)}
    undone = [name for name, update in UPDATES.items() if update.inverse is not None]
    assert undone == ["adam"]
    for name in undone:
        update, moments = UPDATES[name], (m, v.square())
        inverse = update.inverse
        assert inverse is not None
        after, new = step(update, theta, moments, gradient, hyper)
        before = parameter_before(inverse, after, new, hyper)
        torch.testing.assert_close(before, theta, rtol=1e-10, atol=1e-12)
        effective = effective_gradient(gradient, before, hyper)
        for mine, true in zip(inverse.moments(new, effective, hyper), moments, strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-11)


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


def test_coupled_weight_decay_needs_the_parameter() -> None:
    hyper = {"maximize": False, "decoupled": False, "weight_decay": 0.1}
    with pytest.raises(ValueError, match="coupled weight decay needs the parameter"):
        effective_gradient(torch.ones(2), None, hyper)
    for needless in (hyper | {"decoupled": True}, hyper | {"weight_decay": 0.0}):
        assert torch.equal(effective_gradient(torch.ones(2), None, needless), torch.ones(2))


def test_recorded_steps_in_another_precision() -> None:
    recorded = ParameterStep(UPDATES["momentum_sgd"], (torch.rand(3),), torch.rand(3), {"lr": 0.1})
    assert recorded.to(torch.float32) is recorded
    double = recorded.to(torch.float64)
    assert torch.equal(double.gradient, recorded.gradient.double())
    assert torch.equal(double.moments[0], recorded.moments[0].double())
