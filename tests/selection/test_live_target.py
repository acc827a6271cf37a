"""The target gradient of a run at a fraction of its cost: exact where the target is read, right on average in between."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from modules import Classifier, digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence.errors import ConfigurationError
from lightning_influence.run.batches import batch_size
from lightning_influence.selection import target as live_target
from lightning_influence.selection.target import LiveTarget, _round_and_round

N = 24


def target(batch: int = 8, **options: Any) -> DataLoader[Any]:
    x, y = digits(N).tensors
    return DataLoader(TensorDataset(x.double(), y), batch, **options)


def whole_gradient(module: Any) -> dict[str, Tensor]:
    (batch,) = target(N)
    loss = module.training_step(batch, 0)
    found = torch.autograd.grad(loss, list(module.parameters()))
    return {k: g.flatten()[None] for (k, _), g in zip(module.named_parameters(), found, strict=True)}


def select(name: str, values: Tensor) -> Tensor:
    return values.flatten()


def move(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("every", [2, 3, 6])
@pytest.mark.parametrize("batch", [3, 8, 24])
def test_parts_are_right_on_average(every: int, batch: int) -> None:
    """At parameters that stand still, the estimates of one round through the target have the exact gradient as their mean."""
    module, live = Classifier().double(), LiveTarget(every)
    torch.testing.assert_close(live.gradient(module, target(batch), select, 0), whole_gradient(module))
    move(module, every)
    before = {k: p.clone() for k, p in module.named_parameters()}
    found = [live.gradient(module, target(batch), select, 1) for _ in range(every)]
    exact = whole_gradient(module)
    mean = {k: torch.stack([f[k] for f in found]).mean(0) for k in exact}
    torch.testing.assert_close(mean, exact, rtol=1e-10, atol=1e-12)
    assert not all(torch.allclose(found[0][k], exact[k], rtol=1e-3) for k in exact), "a part is not the whole"
    assert all(torch.equal(p, before[k]) and p.grad is None for k, p in module.named_parameters())


def test_it_is_read_whole_when_due_and_stays_exact_where_nothing_moves() -> None:
    module, live = Classifier().double(), LiveTarget(3)
    for step in range(7):
        if step % 3 == 0:
            move(module, step)
        for _ in range(2):  # also again within the step
            found = live.gradient(module, target(), select, step)
            torch.testing.assert_close(found, whole_gradient(module), rtol=1e-10, atol=1e-12)
    always = LiveTarget(1)
    for step in range(3):
        move(module, step)
        torch.testing.assert_close(always.gradient(module, target(), select, step), whole_gradient(module))


def test_it_goes_on_from_its_state_and_draws_no_random_numbers() -> None:
    module, live = Classifier().double(), LiveTarget(4)
    random = torch.get_rng_state()
    found = []
    resumed = LiveTarget(4)
    for step in range(6):
        move(module, step)
        found.append(live.gradient(module, target(), select, step))
        if step >= 2:
            torch.testing.assert_close(resumed.gradient(module, target(), select, step), found[-1], rtol=0, atol=0)
        if step == 1:
            resumed.load_state_dict(live.state_dict())
    assert torch.equal(random, torch.get_rng_state())


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 12))
def test_parts_hold_every_example_in_turn(sizes: list[int], size: int) -> None:
    batches, n = [], 0
    for length in sizes:
        batches.append(torch.arange(n, n + length))
        n += length
    parts = _round_and_round(batches, size)
    seen: list[int] = []
    while len(seen) < 2 * n:
        part = next(parts)
        here = [int(z) for batch in part for z in batch]
        assert sum(map(batch_size, part)) == size
        seen += here
    assert seen == [i % n for i in range(len(seen))]


@pytest.mark.parametrize("every", [1, 2])
def test_a_small_target_is_loaded_once_and_a_large_one_again(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module, times = Classifier().double(), 0

    class Counted:
        def __iter__(self) -> Iterator[Any]:
            nonlocal times
            times += 1
            yield from target()

    small, large = LiveTarget(every), LiveTarget(every)
    found = [small.gradient(module, Counted(), select, step) for step in range(4)]
    assert times == 1
    monkeypatch.setattr(live_target, "_KEPT_BYTES", 0)
    for step in range(4):
        torch.testing.assert_close(large.gradient(module, Counted(), select, step), found[step], rtol=0, atol=0)
    assert times == 5


def test_what_can_be_read_once_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_target, "_KEPT_BYTES", 0)
    module, live, asked = Classifier().double(), LiveTarget(2), (batch for batch in target())
    live.gradient(module, asked, select, 0)
    with pytest.raises(ConfigurationError, match="the target is a generator, which can be read only once"):
        live.gradient(module, asked, select, 1)


def test_a_function_is_read_at_every_step() -> None:
    module, live = Classifier().double(), LiveTarget(5)
    (batch,) = target(N)
    for step in range(3):
        move(module, step)
        found = live.gradient(module, lambda m: m.training_step(batch, 0), select, step)
        torch.testing.assert_close(found, whole_gradient(module))


@pytest.mark.parametrize("reads_first", [True, False])
def test_a_step_that_is_asked_for_again_is_told_by_the_same_part(reads_first: bool) -> None:
    """Where the target was just read whole, too: what its gradient was there is no longer that of the reading before."""
    module, live = Classifier().double(), LiveTarget(3)
    steps = [0, 1] if not reads_first else [0, 1, 3]
    for step in steps:
        move(module, step)
        found = live.gradient(module, target(), select, step)
        torch.testing.assert_close(live.gradient(module, target(), select, step, again=True), found)
    before = whole_gradient(module)
    move(module, 7)
    found = live.gradient(module, target(), select, steps[-1], again=True)
    moved = {k: (found[k] - before[k]).norm() for k in found}
    assert all(m > 0 for m in moved.values())
    torch.testing.assert_close(live.gradient(module, target(), select, steps[-1], again=True), found, rtol=0, atol=0)


def test_what_is_known_of_the_loss_changes_no_gradient() -> None:
    """A batch of the target whose loss is no mean of its examples' own is taken apart, at the first reading and later."""

    class Related(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss: Tensor = super().training_step(batch, batch_idx)
            return loss + self.net(batch[0]).var(0, correction=0).mean()

    module, live = Related().double(), LiveTarget(2)
    for step in range(4):
        move(module, step)
        if step % 2 == 0:
            losses = torch.stack([module.training_step(one, 0) for one in target(1)])
            gradients = torch.autograd.grad(losses.mean(), list(module.parameters()))
            exact = {k: g.flatten()[None] for (k, _), g in zip(module.named_parameters(), gradients, strict=True)}
            torch.testing.assert_close(live.gradient(module, target(), select, step), exact, rtol=1e-9, atol=1e-12)
        else:
            live.gradient(module, target(), select, step)
