"""A query loss whose gradient is not how it changes is told; one that leaves that part out is right, against retraining."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_wild import QUERIES, Base, N, data, trained
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_influence import InfluenceCallback, InfluenceReport, attribute
from lightning_influence.report.trust import trust
from lightning_influence.scoring.queries import mean_gradients, query_gradients
from lightning_influence.scoring.query_loss import Traits


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class Rounding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x * 4).round() / 4

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Square(torch.autograd.Function):
    """With a backward of its own that is right."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


class Adversarial(Base):
    """The features shall not tell the domain of a sample."""

    def build(self) -> None:
        super().build()
        self.domain = nn.Linear(8, 2)

    def features(self, x: Tensor) -> Tensor:
        return F.gelu(self.body(x))

    def seen_by_domain(self, features: Tensor) -> Tensor:
        return Reversal.apply(features)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        features = self.features(batch[0])
        domain = self.domain(self.seen_by_domain(features))
        return F.cross_entropy(self.head(features), batch[1]) + F.cross_entropy(domain, (batch[0][:, 0] > 0).long())


class Plain(Adversarial):
    def seen_by_domain(self, features: Tensor) -> Tensor:
        return features


class Squares(Adversarial):
    def seen_by_domain(self, features: Tensor) -> Tensor:
        return Square.apply(features)


class Checkpointed(Adversarial):
    def seen_by_domain(self, features: Tensor) -> Tensor:
        return checkpoint(torch.tanh, features, use_reentrant=False)


class Hooked(Adversarial):
    """The gradient is reversed by a hook, of which the graph says nothing."""

    def seen_by_domain(self, features: Tensor) -> Tensor:
        seen = features.view_as(features)
        seen.register_hook(lambda gradient: -gradient)
        return seen


class Rounded(Adversarial):
    def features(self, x: Tensor) -> Tensor:
        return Rounding.apply(super().features(x))

    def seen_by_domain(self, features: Tensor) -> Tensor:
        return features


class Noisy(Plain):
    """It draws, and counts its steps, in evaluation mode as well."""

    steps = 0

    def seen_by_domain(self, features: Tensor) -> Tensor:
        self.steps += 1
        return (1 + self.steps) * features + torch.randn_like(features)


def classifier_alone(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model.head(model.features(batch[0])), batch[1], reduction="none")


def told(module: Base, dtype: torch.dtype) -> list[str]:
    """Warnings of the gradients of queries; what the module, its forward passes and the generators say of them."""
    x, y = data()[1].tensors
    module.to(dtype)
    before = {k: p.detach().clone() for k, p in module.named_parameters()}
    drawn, traits, passes = torch.get_rng_state(), Traits(), list[int]()
    hook = module.body.register_forward_hook(lambda *_: passes.append(1))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        query_gradients(
            module, [(x.to(dtype), y)], list(before), lambda _, g: g.flatten(), traits=traits, progress=False
        )
    hook.remove()
    assert len(passes) <= QUERIES + 4, "the first query, again with its paths open where some stop, and twice beside it"
    assert all(torch.equal(p, before[k]) and p.grad is None for k, p in module.named_parameters())
    assert isinstance(module, Noisy) or torch.equal(drawn, torch.get_rng_state())
    messages = [str(w.message) for w in seen if issubclass(w.category, UserWarning)]
    assert all(traits.wrong and traits.wrong in message for message in messages)
    assert messages or traits.wrong == ""
    return messages


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_a_gradient_that_is_not_the_change_of_the_loss_is_told(dtype: torch.dtype) -> None:
    for right in (Plain, Squares, Checkpointed, Noisy):
        assert told(right(), dtype) == []
    for wrong, named in ((Adversarial, "through Reversal"), (Rounded, "through Rounding"), (Hooked, "along it")):
        (message,) = told(wrong(), dtype)
        assert named in message and "custom backward such as gradient reversal" in message
        assert "Give query_loss(model, batch)" in message


def test_the_size_told_is_that_of_finite_differences() -> None:
    """Along the part that is reversed the loss of the first query changes as the reversed part of the plain module says."""
    module, plain = Adversarial().double(), Plain().double()
    plain.load_state_dict(module.state_dict())
    x, y = data()[1].tensors
    one = (x[:1], y[:1])
    parameters = [plain.body.weight, plain.body.bias]

    def gradient(loss: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    of_classes = gradient(classifier_alone(plain, one).sum())
    of_domain = gradient(plain.training_step(one, 0)) - of_classes
    along = -of_domain / of_domain.norm()
    true, claimed = float(along @ (of_classes + of_domain)), float(along @ (of_classes - of_domain))
    (message,) = told(module, torch.float64)
    assert f"changes by {true:.3g} instead of {claimed:.3g} a unit" in message


def test_a_target_that_is_read_again_is_told_once() -> None:
    """As selection reads it, at every step."""
    module, traits = Adversarial(), Traits()
    names = [k for k, _ in module.named_parameters()]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            mean_gradients(module, [data()[1].tensors], names, lambda _, g: g.flatten(), [{}], traits)
    assert ["custom backward" in str(w.message) for w in seen] == [True]


def losses(module: Base, loss: Callable[[Any, Any], Tensor]) -> Tensor:
    module.eval()
    with torch.no_grad():
        return loss(module, data()[1].tensors)


def test_the_way_round_is_right_and_the_report_tells(tmp_path: Path) -> None:
    module = trained(Adversarial, callbacks=[InfluenceCallback(tmp_path / "log", record="replay")])
    asked: dict[str, Any] = {"queries": DataLoader(data()[1], QUERIES), "model": module, "progress": False}
    with pytest.warns(UserWarning, match="gradient reversal or a straight-through estimator") as seen:
        report = attribute(tmp_path / "log", **asked)
    assert Path(seen[0].filename) == Path(__file__)
    report.save(tmp_path / "report")
    for one in (report, InfluenceReport.load(tmp_path / "report")):
        (item,) = [item for item in trust(one) if item.name == "Query loss"]
        assert item.level == "caution" and item.meaning.startswith("The gradient of the query loss is not how")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        right = attribute(tmp_path / "log", **asked, query_loss=classifier_alone)
    assert "Query loss" not in {item.name for item in trust(right)} and "query_gradient" not in right.metadata
    before = losses(trained(Adversarial), classifier_alone)
    truth = torch.stack([losses(trained(Adversarial, z), classifier_alone) - before for z in range(N)])
    assert (right.scores - truth).norm() <= 0.03 * truth.norm()
