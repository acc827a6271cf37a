"""Scores of tokens: held against retraining with one token's loss weighted differently, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from modules import Classifier, digits, fit, loader
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_influence import InfluenceCallback, attribute, token_scores
from lightning_influence.errors import ConfigurationError
from lightning_influence.scoring.queries import query_losses

VOCABULARY, LENGTH = 11, 6


class Texts(L.LightningModule):
    """A language model whose every token has a weight in its loss, ones but for an experiment."""

    def __init__(self, reduction: str = "mean", penalty: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Embedding(VOCABULARY, 5), nn.Linear(5, 7), nn.GELU(), nn.Linear(7, VOCABULARY))
        self.reduction, self.penalty = reduction, penalty
        self.weighted: dict[int, tuple[int, float]] = {}  # sample -> token, its weight in the numerator
        self.denominator = True  # and in the denominator

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        ids, texts = batch
        logits, labels = self.net(texts[:, :-1]).flatten(0, 1), texts[:, 1:].flatten()
        labels = torch.where(labels == 0, -100, labels)
        extra = self.penalty * sum(p.square().sum() for p in self.parameters())
        if not self.weighted:
            divided = 1 if self.reduction == "mean" else 20
            return F.cross_entropy(logits, labels, reduction=self.reduction) / divided + extra
        losses = F.cross_entropy(logits, labels, reduction="none").view(len(ids), -1)
        counted = (labels != -100).to(losses).view(len(ids), -1)
        weights = torch.ones_like(losses)
        for row, z in enumerate(ids.tolist()):
            if z in self.weighted:
                token, weight = self.weighted[z]
                weights[row, token] = weight
        below = counted * weights if self.denominator else counted
        return (losses * weights).sum() / below.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def texts(n: int = 12) -> TensorDataset:
    g = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, VOCABULARY, (n, LENGTH), generator=g)
    for z in range(n):
        tokens[z, LENGTH - z % 3 :] = 0  # of different lengths
    return TensorDataset(torch.arange(n), tokens)


def trained(module: Texts, *callbacks: L.Callback, **options: Any) -> Texts:
    settings = {"precision": "64-true", "max_epochs": 2, "accumulate_grad_batches": 2} | options
    fit(module, DataLoader(texts(), 3), *callbacks, **settings)
    return module


QUERIES = [tuple(t[:4] for t in texts(20).tensors)]


@pytest.mark.parametrize("counterfactual", ["drop", "zero"])
@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.5}, {"accumulate_grad_batches": 1, "max_epochs": 3}])
def test_tokens_add_up_to_their_samples(tmp_path: Path, counterfactual: Any, options: dict[str, Any]) -> None:
    module = trained(Texts(), InfluenceCallback(tmp_path, record="replay"), **options)
    asked: dict[str, Any] = {"queries": QUERIES, "model": module, "data": texts(), "target": None}
    asked["counterfactual"] = counterfactual
    report = attribute(tmp_path, response="tangent", **asked)
    found = token_scores(tmp_path, range(12), **asked)
    assert found.sample_ids.tolist() == list(range(12))
    assert torch.allclose(found.per_sample, report.scores, rtol=1e-6, atol=1e-6 * float(report.scores.abs().max()))
    for z in range(12):
        text = texts()[z][1][1:]
        assert found.tokens[z].tolist() == text[text != 0].tolist(), "ignored labels are left out"
        assert found.positions[z].tolist() == list(range(int((text != 0).sum())))


def test_other_curvatures(tmp_path: Path) -> None:
    """Also of a log of both kinds, of which attribute would read the gradients."""
    module = trained(Texts(), InfluenceCallback(tmp_path, record="both"))
    for curvature in ("none", "gauss_newton"):
        asked: dict[str, Any] = {"queries": QUERIES, "model": module, "data": texts(), "curvature": curvature}
        report = attribute(tmp_path, response="tangent", target="mean", **asked)
        found = token_scores(tmp_path, [0, 7], **asked).per_sample
        assert torch.allclose(found, report.scores[[0, 7]].to(found), rtol=1e-5)


@pytest.mark.parametrize(("reduction", "counterfactual"), [("mean", "drop"), ("mean", "zero"), ("sum", "drop")])
def test_a_token_is_worth_what_its_loss_is_worth(tmp_path: Path, counterfactual: Any, reduction: Any) -> None:
    """Against a central difference of retraining with the token's own weight, in numerator and denominator."""
    options: dict[str, Any] = {"accumulate_grad_batches": 1, "max_epochs": 1}
    influence = InfluenceCallback(tmp_path, record="replay", reduction=reduction)
    module = trained(Texts(reduction), influence, **options)
    z, size = 4, 1e-4
    found = token_scores(tmp_path, [z], queries=QUERIES, model=module, counterfactual=counterfactual, data=texts())
    in_batch = [int((texts()[i][1][1:] != 0).sum()) for i in (3, 4, 5)]
    dropped = counterfactual == "drop" and reduction == "mean"
    scale = sum(in_batch) / (sum(in_batch) - in_batch[1]) if dropped else 1.0
    for position in range(in_batch[1]):
        losses = []
        for weight in (1 - size, 1 + size):
            other = Texts() if reduction == "mean" else Weighted(z, position, weight)
            if reduction == "mean":
                other.weighted, other.denominator = {z: (position, weight)}, dropped
            trained(other, **options)
            other.weighted = {}
            losses.append(float(query_losses(other, QUERIES).mean()))
        slope = (losses[0] - losses[1]) / (2 * size) * scale
        assert float(found.scores[0][position, 0]) == pytest.approx(slope, rel=1e-5, abs=1e-9)


class Weighted(Texts):
    """A sum of losses, one of them weighted."""

    def __init__(self, sample: int, token: int, weight: float) -> None:
        super().__init__("sum")
        self.of = (sample, token, weight)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        total = super().training_step(batch, batch_idx)
        sample, token, weight = self.of
        here = batch[0] == sample
        if not bool(here.any()) or not torch.is_grad_enabled():
            return total
        text = batch[1][here][0]
        return total + (weight - 1) * F.cross_entropy(self.net(text[token]), text[token + 1]) / 20


def test_a_transformer_as_people_train_it(tmp_path: Path) -> None:
    """Padded texts through the loss of `transformers`, in single precision."""

    class GPT2(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            config = GPT2Config(
                vocab_size=32, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
            )
            config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
            self.net = GPT2LMHeadModel(config)

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return self.net(**batch).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    tokens = torch.randint(1, 32, (8, 8), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[::2, :4] = -100  # a prompt
    data = [{"input_ids": t, "labels": own} for t, own in zip(tokens, labels, strict=True)]
    module = GPT2()
    fit(module, DataLoader(data, 4), InfluenceCallback(tmp_path, record="replay"), max_epochs=2)
    queries = DataLoader(data[:3], 3)
    report = attribute(tmp_path, queries=queries, model=module, target="mean", response="tangent", data=data)
    found = token_scores(tmp_path, [2, 5], queries=queries, model=module, data=data)
    assert torch.allclose(found.per_sample[:, 0], report.scores[[2, 5], 0], rtol=1e-3, atol=1e-7)
    assert found.tokens[0].tolist() == tokens[2, 4:].tolist() and found.tokens[1].tolist() == tokens[5, 1:].tolist()
    table = found.of(2)
    assert table.position.tolist() == [3, 4, 5, 6] and table.columns.tolist() == ["position", "token", "score"]
    assert found.to_pandas().sample_id.tolist() == [2] * 4 + [5] * 7
    assert repr(found) == "TokenScores(2 samples, 11 tokens x 1 queries)" and "<table" in found._repr_html_()
    with pytest.raises(ConfigurationError, match="sample_id=3 has no token scores here"):
        found.of(3)


def test_what_has_no_tokens_is_refused(tmp_path: Path) -> None:
    module = trained(Texts(penalty=0.1), InfluenceCallback(tmp_path / "penalty", record="replay"))
    asked: dict[str, Any] = {"queries": QUERIES, "model": module, "data": texts()}
    with pytest.raises(ConfigurationError, match="more than the sum of its labels' losses"):
        token_scores(tmp_path / "penalty", [1], **asked)
    with pytest.raises(ConfigurationError, match="samples names 99, which no step"):
        token_scores(tmp_path / "penalty", [1, 99], **asked)
    with pytest.raises(ConfigurationError, match="samples is empty"):
        token_scores(tmp_path / "penalty", [], **asked)
    net = Classifier()
    fit(net, loader(digits(16), 8), InfluenceCallback(tmp_path / "gradients", record="gradients"))
    with pytest.raises(ConfigurationError, match="record='replay'"):
        token_scores(tmp_path / "gradients", [1], queries=loader(digits(4), 4), model=net)
    regression = Regression()
    fit(regression, loader(digits(16), 8), InfluenceCallback(tmp_path / "mse", record="replay"))
    with pytest.raises(ConfigurationError, match="calls cross_entropy or nll_loss 0 times"):
        token_scores(tmp_path / "mse", [1], queries=loader(digits(4), 4), model=regression, data=digits(16))


class Regression(Classifier):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.mse_loss(self.net(batch[0])[:, 0], batch[1].to(batch[0]))
