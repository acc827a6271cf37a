"""A step of a plain torch loop, collected: held against autograd, one sample at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_influence.capture import GradientCapture
from lightning_influence.capture.step import CollectedStep, StepCollector, StepOptions
from lightning_influence.core.trajectory import Clip
from lightning_influence.errors import ConfigurationError, InfluenceError

WINDOW = [[0, 1, 2], [3, 4]]


class Loop:
    """A loop that accumulates two micro-batches of unequal size."""

    def __init__(self, *, averaged: bool = True, **options: Any) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 1)).double()
        self.x, self.y = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64)
        self.weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-2)
        self.capture = GradientCapture(self.net)
        self.capture.attach()
        self.averaged = averaged
        self.collector = StepCollector(self.net, self.optimizer, capture=self.capture, averaged=averaged, **options)

    def losses(self, ids: list[int]) -> Tensor:
        return (self.net(self.x[ids]) - self.y[ids]).square()[:, 0]

    def backward(self, ids: list[int], **options: Any) -> None:
        weights = self.weights[ids] if self.averaged else torch.ones(len(ids), dtype=torch.float64)
        self.collector.begin(torch.tensor(ids), weights, len(WINDOW))
        total = weights @ self.losses(ids)
        ((total / weights.sum() if self.averaged else total) / len(WINDOW)).backward()
        self.collector.after_backward(**options)

    def step(self, **options: Any) -> CollectedStep | None:
        self.optimizer.zero_grad()
        for ids in WINDOW:
            self.backward(ids, **options)
        return self.collector.before_step(0, Clip("norm", 1.0))


@pytest.mark.parametrize("averaged", [True, False])
def test_shares_weights_and_norm_are_those_of_autograd(averaged: bool) -> None:
    loop = Loop(averaged=averaged)
    for _ in range(2):
        collected = loop.step()
        assert collected is not None
        record = collected.record
        assert record.sample_ids.tolist() == [0, 1, 2, 3, 4] and record.micro_batch_numbers.tolist() == [0, 0, 0, 1, 1]
        expected = [1 / 12, 2 / 12, 3 / 12, 4 / 18, 5 / 18] if averaged else [0.5] * 5
        torch.testing.assert_close(record.loss_weights, torch.tensor(expected, dtype=torch.float64))
        assert record.averaged == averaged
        norm = torch.cat([p.grad.flatten() for p in loop.net.parameters()]).norm()  # type: ignore[union-attr]
        assert record.clip == Clip("norm", 1.0, pytest.approx(float(norm)))
        parameters = dict(loop.net.named_parameters())
        for row, weight in enumerate(record.loss_weights):
            own = torch.autograd.grad(weight * loop.losses([row])[0], list(parameters.values()))
            for name, gradient in zip(parameters, own, strict=True):
                torch.testing.assert_close(collected.shares[name].dense()[row], gradient.flatten())
        for name, p in parameters.items():
            first = loop.optimizer.state[p].get("exp_avg", torch.zeros_like(p))
            torch.testing.assert_close(record.moments[name][0], first.flatten())
        loop.optimizer.step()


def test_a_step_without_batches_is_none() -> None:
    assert Loop().collector.before_step(0, Clip()) is None


def test_gradients_that_are_changed_or_not_finite_are_refused() -> None:
    loop = Loop()
    for ids in WINDOW:
        loop.backward(ids, watch=True)
    for p in loop.net.parameters():
        p.grad.mul_(2)  # type: ignore[union-attr]
    with pytest.raises(ConfigurationError, match="on_after_backward"):
        loop.collector.before_step(3, Clip())
    loop.y[0] = torch.nan
    with pytest.raises(InfluenceError, match="step 0: the gradient's norm is nan"):
        loop.step()
    for ids in WINDOW:
        loop.backward(ids)
    assert loop.collector.before_step(0, Clip(), may_skip=True) is None


def test_shares_that_are_not_the_gradient_are_refused_with_what_to_do() -> None:
    loop = Loop(otherwise="do something else")
    loop.backward(WINDOW[0])
    loop.net[0].weight.square().sum().backward()  # a use that no layer sees
    with pytest.raises(ConfigurationError, match="0.weight sum to its gradient only up to .* or do something else"):
        loop.collector.before_step(0, Clip())


def test_options() -> None:
    with pytest.raises(ConfigurationError, match="reduction='max'"):
        StepOptions(reduction="max")  # type: ignore[arg-type]
    assert StepOptions(exclude="a*").exclude == ("a*",)
    net = nn.Linear(2, 2)
    StepOptions(exclude=["w*"]).check(net)
    with pytest.raises(ConfigurationError, match="matches no parameter of Linear"):
        StepOptions(exclude=["v*"]).check(net)
    with pytest.raises(ConfigurationError, match="leaves out every parameter"):
        StepOptions(exclude=["w*", "b*"]).check(net)
