"""What the tap says of a loss, against autograd in float64 with the sample really left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_influence.run import losses as losses_module
from lightning_influence.run.tap import LossTap

N, TOKENS, CLASSES = 6, 5, 4


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


PARAMETERS = tensor(7, CLASSES, seed=1)
X, Y = tensor(N, TOKENS, 7), torch.randint(0, CLASSES, (N, TOKENS), generator=torch.Generator().manual_seed(2))
IGNORED = Y.masked_fill(tensor(N, TOKENS, seed=3) > 0.5, -100)
IGNORED[2] = -100  # a sample that does not count at all
WEIGHT, PROBABILITIES = tensor(CLASSES, seed=4).exp(), tensor(N, TOKENS, CLASSES, seed=5).softmax(-1)
VALUES, ELEMENT_WEIGHTS = tensor(N, TOKENS, CLASSES, seed=6), tensor(N, TOKENS, CLASSES, seed=7).exp()
BITS = (tensor(N, TOKENS, CLASSES, seed=8) > 0).double()


@dataclass(frozen=True)
class Case:
    """``call(logits (n, tokens, classes), samples)`` is a mean over the tokens and samples chosen."""

    call: Callable[[Tensor, Tensor], Tensor]
    over_classes: bool = False


def over_tokens(target: Tensor, *, flat: bool, **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """A cross-entropy of labels given by index or as probabilities."""

    def call(logits: Tensor, samples: Tensor) -> Tensor:
        own = target[samples]
        if flat:
            return F.cross_entropy(logits.flatten(0, 1), own.flatten(0, 1), **options)
        return F.cross_entropy(logits.transpose(1, 2), own.transpose(1, 2) if own.dim() == 3 else own, **options)

    return call


def elementwise(loss: Callable[..., Tensor], target: Tensor, flat: bool, **options: Any) -> Callable[..., Tensor]:
    def call(logits: Tensor, samples: Tensor) -> Tensor:
        chosen = {k: v[samples] if isinstance(v, Tensor) and len(v) == N else v for k, v in options.items()}
        inputs = logits.sigmoid() if loss is F.binary_cross_entropy else logits
        if flat:
            chosen = {k: v.flatten(0, 1) if isinstance(v, Tensor) and v.dim() == 3 else v for k, v in chosen.items()}
            return loss(inputs.flatten(0, 1), target[samples].flatten(0, 1), **chosen)
        return loss(inputs, target[samples], **chosen)

    return call


CASES: dict[str, Case] = {}
for flat in (False, True):
    named = {
        "plain": over_tokens(Y, flat=flat),
        "ignored": over_tokens(IGNORED, flat=flat),
        "class weights": over_tokens(IGNORED, flat=flat, weight=WEIGHT),
        "smoothing": over_tokens(IGNORED, flat=flat, label_smoothing=0.2),
        "smoothing and class weights": over_tokens(IGNORED, flat=flat, weight=WEIGHT, label_smoothing=0.2),
        "soft": over_tokens(PROBABILITIES, flat=flat),
        "soft, weights and smoothing": over_tokens(PROBABILITIES, flat=flat, weight=WEIGHT, label_smoothing=0.1),
    }
    CASES |= {f"{name}, {flat=}": Case(call, over_classes=True) for name, call in named.items()}
    binary = {
        "bce": elementwise(F.binary_cross_entropy, BITS, flat, weight=ELEMENT_WEIGHTS),
        "bce with logits": elementwise(
            F.binary_cross_entropy_with_logits, BITS, flat, weight=ELEMENT_WEIGHTS, pos_weight=WEIGHT
        ),
    }
    CASES |= {f"{name}, {flat=}": Case(call, over_classes=True) for name, call in binary.items()}
    others = {
        "bce, soft": elementwise(F.binary_cross_entropy_with_logits, PROBABILITIES, flat),
        "mse": elementwise(F.mse_loss, VALUES, flat),
        "mse, weights": elementwise(F.mse_loss, VALUES, flat, weight=ELEMENT_WEIGHTS),
        "l1": elementwise(F.l1_loss, VALUES, flat),
        "l1, weights": elementwise(F.l1_loss, VALUES, flat, weight=ELEMENT_WEIGHTS),
        "smooth l1": elementwise(F.smooth_l1_loss, VALUES, flat, beta=0.3),
        "huber": elementwise(F.huber_loss, VALUES, flat, delta=0.3),
        "huber, weights": elementwise(F.huber_loss, VALUES, flat, weight=ELEMENT_WEIGHTS),
    }
    CASES |= {f"{name}, {flat=}": Case(call) for name, call in others.items()}


def gradient(call: Callable[[Tensor, Tensor], Tensor], samples: Tensor) -> Tensor:
    parameters = PARAMETERS.clone().requires_grad_()
    return torch.autograd.grad(call((X[samples] @ parameters).tanh() * 3, samples), parameters)[0]


@pytest.mark.parametrize("name", CASES)
def test_weights_say_what_a_removal_does(name: str) -> None:
    case, everything = CASES[name], torch.arange(N)
    with LossTap() as tap:
        whole = gradient(case.call, everything)
    assert tap.reduction == "mean"
    weights = tap.sample_weights(N)
    assert weights is not None and weights.dtype == torch.float64
    total = weights.sum()
    own = []
    for z in range(N):
        logits = (X[[z]] @ PARAMETERS).tanh() * 3
        parameters = PARAMETERS.clone().requires_grad_()
        alone = case.call((X[[z]] @ parameters).tanh() * 3, torch.tensor([z]))
        own.append(case.call(logits, torch.tensor([z])))
        if weights[z] == 0:
            assert alone.isnan()
            continue
        share = weights[z] / total * torch.autograd.grad(alone, parameters)[0]
        predicted = (weights[z] * whole - total * share) / (total - weights[z])
        truth = gradient(case.call, everything[everything != z]) - whole
        torch.testing.assert_close(predicted, truth, rtol=1e-9, atol=1e-12)
    assert tap.single is not None
    torch.testing.assert_close(tap.single.losses(N), torch.stack(own), equal_nan=True)
    assert (tap.dynamics(N) is not None) == case.over_classes


@pytest.mark.parametrize("name", CASES)
def test_nothing_that_is_computed_changes(name: str) -> None:
    samples = torch.arange(N)
    plain = gradient(CASES[name].call, samples)
    with LossTap():
        assert torch.equal(gradient(CASES[name].call, samples), plain)


def one_label(dtype: torch.dtype = torch.float64, classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    logits = 3 * tensor(N, classes)
    return logits.to(dtype), torch.tensor([0, 1, 2, 3, 1, -100])


def expected_margin(logits: Tensor, label: int) -> float:
    rest = [float(v) for c, v in enumerate(logits) if c != label]
    return float(logits[label]) - max(rest)


@pytest.mark.parametrize("function", ["cross_entropy", "nll_loss", "soft"])
def test_margins_and_probabilities_of_one_label_a_sample(function: str) -> None:
    logits, target = one_label()
    with LossTap() as tap:
        if function == "cross_entropy":
            F.cross_entropy(logits, target)
        elif function == "nll_loss":
            F.nll_loss(logits.log_softmax(1), target)
        else:
            F.cross_entropy(logits, F.one_hot(target.clamp(min=0), CLASSES).double())
    found = tap.dynamics(N)
    assert found is not None and len(found) == N
    log_probabilities = logits.log_softmax(1)
    for z in range(N - 1):
        label = int(target[z])
        assert found.labels[z] == label
        assert float(found.losses[z]) == pytest.approx(-float(log_probabilities[z, label]), rel=1e-6)
        assert float(found.label_log_probabilities[z]) == pytest.approx(float(log_probabilities[z, label]), rel=1e-6)
        assert float(found.margins[z]) == pytest.approx(expected_margin(logits[z], label), rel=1e-5)
        others = [c for c in range(CLASSES) if c != label]
        assert found.others[z] == max(others, key=lambda c, z=z: float(logits[z, c]))
    assert found.log_probabilities.dtype == torch.float16
    torch.testing.assert_close(found.log_probabilities.double(), log_probabilities, rtol=1e-3, atol=1e-3)
    if function != "soft":
        assert found.labels[-1] == found.others[-1] == -1
        assert found.margins[-1].isnan() and found.losses[-1].isnan()


def test_labels_0_and_1_are_two_classes() -> None:
    logits, target = tensor(N), torch.tensor([0, 1, 1, 0, 1, 0]).double()
    with LossTap() as of_logits:
        F.binary_cross_entropy_with_logits(logits, target)
    with LossTap() as of_probabilities:
        F.binary_cross_entropy(logits.sigmoid()[:, None], target[:, None])
    for tap in (of_logits, of_probabilities):
        found = tap.dynamics(N)
        assert found is not None
        assert found.labels.tolist() == target.tolist() and found.others.tolist() == (1 - target).tolist()
        torch.testing.assert_close(found.margins, ((2 * target - 1) * logits).float())
        torch.testing.assert_close(
            found.log_probabilities[:, 1].float(), F.logsigmoid(logits).float(), rtol=1e-3, atol=1e-3
        )


def test_several_labels_a_sample_are_averaged() -> None:
    logits = (X @ PARAMETERS).tanh() * 3
    with LossTap() as tap:
        F.cross_entropy(logits.flatten(0, 1), IGNORED.flatten(), weight=WEIGHT)
    with LossTap() as unflattened:
        F.cross_entropy(logits.transpose(1, 2), IGNORED, weight=WEIGHT)
    found, same = tap.dynamics(N), unflattened.dynamics(N)
    assert found is not None and same is not None
    for name, column in found.columns().items():
        torch.testing.assert_close(same.columns()[name], column, equal_nan=True)
    assert found.labels.tolist() == [-1] * N and found.log_probabilities.shape == (N, 0)
    for z in range(N):
        margins = [expected_margin(logits[z, t], int(c)) for t, c in enumerate(IGNORED[z]) if c >= 0]
        mean = sum(margins) / len(margins) if margins else float("nan")
        assert float(found.margins[z]) == pytest.approx(mean, rel=1e-5, nan_ok=True)


def test_with_many_classes_the_best_other_is_all_that_is_kept() -> None:
    logits = tensor(N, losses_module.MAX_CLASSES + 1)
    target = torch.arange(N)
    with LossTap() as tap:
        F.cross_entropy(logits, target)
    found = tap.dynamics(N)
    assert found is not None and found.log_probabilities.shape == (N, 0)
    masked = logits.scatter(1, target[:, None], -torch.inf)
    assert found.others.tolist() == masked.argmax(1).tolist() and found.labels.tolist() == target.tolist()


def test_a_large_vocabulary_is_looked_at_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    def call() -> Any:
        with LossTap() as tap:
            F.cross_entropy((X @ PARAMETERS).flatten(0, 1), IGNORED.flatten(), weight=WEIGHT, label_smoothing=0.1)
        return tap.dynamics(N)

    whole = call()
    monkeypatch.setattr(losses_module, "_CHUNK", 3 * CLASSES)
    for name, column in call().columns().items():
        torch.testing.assert_close(column, whole.columns()[name], equal_nan=True)


@pytest.mark.parametrize(
    ("options", "reduction"),
    [
        ({"reduction": "sum"}, "sum"),
        ({"reduction": "none"}, "none"),
        ({}, "mean"),
        pytest.param(
            {"size_average": False}, "sum", marks=pytest.mark.filterwarnings("ignore:size_average and reduce")
        ),
        pytest.param({"reduce": False}, "none", marks=pytest.mark.filterwarnings("ignore:size_average and reduce")),
    ],
)
@pytest.mark.parametrize("loss", [F.cross_entropy, F.mse_loss])
def test_what_is_no_mean_is_seen_and_gives_no_weights(
    loss: Callable[..., Tensor], options: dict[str, Any], reduction: str
) -> None:
    logits, target = one_label()
    target = torch.where(target < 0, 0, target)
    targets = target if loss is F.cross_entropy else VALUES[:, 0]
    with LossTap() as tap:
        loss(logits, targets, **options)
    assert tap.reduction == reduction
    assert (tap.sample_weights(N) is not None) == (reduction == "mean")
    assert tap.single is not None
    each = loss(logits, targets, reduction="none")
    torch.testing.assert_close(tap.single.losses(N), each if each.dim() == 1 else each.mean(1))


def test_no_single_loss_whose_rows_are_those_of_the_samples() -> None:
    logits, target = one_label()
    with LossTap() as several:
        F.cross_entropy(logits, target)
        F.mse_loss(logits, logits)
    with LossTap() as nothing:
        logits.softmax(1)
    with LossTap() as broadcast, pytest.warns(UserWarning, match="target size"):
        F.mse_loss(logits[:, :1], logits[:, 0])
    with LossTap() as without_batch:
        F.cross_entropy(logits[0], target[0])
        F.cross_entropy(logits[0], logits[0].softmax(0))
    with LossTap() as other_rows:
        F.cross_entropy(logits, target)
    for tap in (several, nothing, broadcast, without_batch):
        assert tap.single is None and tap.reduction is None
        assert tap.sample_weights(N) is None and tap.dynamics(N) is None
    assert other_rows.sample_weights(N - 1) is None and other_rows.dynamics(N - 1) is None


def test_no_other_mode_sees_the_look() -> None:
    logits, target = one_label()
    with LossTap() as outer, LossTap() as inner:
        F.cross_entropy(logits, target)
        F.l1_loss(VALUES, BITS, weight=ELEMENT_WEIGHTS)
    assert len(outer.seen) == len(inner.seen) == 2
    for tap in (outer, inner):
        assert tap.seen[1] is not None
        assert torch.equal(tap.seen[1].weights, ELEMENT_WEIGHTS.flatten(1).sum(1))
