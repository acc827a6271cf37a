"""The loop: suspects, retraining without them, and what that changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kinds
import pytest
import torch
from kinds import N as N_KIND
from modules import Classifier, digits, fit, loader, two_groups
from test_kinds import losses, samples, trained
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceCallback, attribute, clean, compare, suspects, training_dynamics, without
from lightning_influence.errors import ConfigurationError

N, HELD = 300, 100


def wrongly_labelled() -> tuple[TensorDataset, TensorDataset, torch.Tensor]:
    """Digits of which a tenth has a wrong label, held-out ones, and the ids of the wrong ones."""
    x, y = digits(N + HELD).tensors
    wrong = torch.randperm(N, generator=torch.Generator().manual_seed(1))[: N // 10]
    labels = y[:N].clone()
    labels[wrong] = (labels[wrong] + 3) % 10
    return TensorDataset(x[:N], labels), TensorDataset(x[N:], y[N:]), wrong


def test_cleaning_lowers_the_validation_loss(tmp_path: Path) -> None:
    train, held, wrong = wrongly_labelled()
    module = Classifier(lambda m: torch.optim.AdamW(m.parameters(), lr=5e-3), width=24)
    fit(module, loader(train, 20), InfluenceCallback(tmp_path, record="replay"), max_epochs=8)
    batches = [tuple(held.tensors)]
    options: dict[str, Any] = {"queries": batches, "model": module, "data": train, "progress": False}
    dry = clean(tmp_path, **options, k=30, dry_run=True)
    assert dry.after is None and len(dry.removed) == 30
    found = clean(tmp_path, **options, k=30)
    assert found.removed == dry.removed and torch.equal(found.predicted, dry.predicted)
    assert len(set(found.removed) & set(wrong.tolist())) >= 15  # chance would find 3
    assert found.before is not None and found.after is not None and found.accuracy is not None
    assert found.after.mean() < found.before.mean()
    assert found.predicted.mean() < 0 and found.accuracy[1] >= found.accuracy[0]
    assert found.model is not None
    with torch.no_grad():
        logits = found.model.net(held.tensors[0])  # type: ignore[operator]
    assert found.accuracy[1] == pytest.approx(float((logits.argmax(1) == held.tensors[1]).float().mean()))
    assert "30 samples removed" in repr(found)
    with pytest.raises(ConfigurationError, match="no sample to leave out"):
        clean(tmp_path, **options, samples=[])


def test_training_without_the_samples_ends_where_cleaning_does(tmp_path: Path) -> None:
    """The user's own run over what `without` leaves is that of `clean`, and its log knows the samples by the same ids."""
    train, held, _ = wrongly_labelled()

    def run(data: Any, log: str) -> Classifier:
        module = Classifier(two_groups, width=8)
        options: dict[str, Any] = {"max_epochs": 2, "gradient_clip_val": 0.5, "accumulate_grad_batches": 2}
        fit(module, data, InfluenceCallback(tmp_path / log, record="replay"), **options)
        return module

    module = run(loader(train, 20), "whole")
    gone = suspects(tmp_path / "whole", 12).sample_id
    found = clean(
        tmp_path / "whole", queries=[tuple(held.tensors)], model=module, data=train, samples=gone, progress=False
    )
    assert found.model is not None
    own = run(without(loader(train, 20), gone), "rest").state_dict()
    assert all(torch.equal(value, own[name]) for name, value in found.model.state_dict().items())
    assert training_dynamics(tmp_path / "rest").sample_ids.tolist() == sorted(set(range(N)) - set(gone))


def test_queries_are_evaluated_once_for_each_training(tmp_path: Path) -> None:
    """Loss and accuracy come out of the same pass, also of a loss of the user's own; one that names no classes has no accuracy."""
    train, held, _ = wrongly_labelled()
    module = Classifier(width=8)
    fit(module, loader(train, 20), InfluenceCallback(tmp_path, record="replay"))
    calls: list[int] = []

    def own(model: Any, batch: Any) -> torch.Tensor:
        if not torch.is_grad_enabled():
            calls.append(len(batch[1]))
        return torch.nn.functional.cross_entropy(model.net(batch[0]), batch[1], reduction="none")

    def squares(model: Any, batch: Any) -> torch.Tensor:
        return model.net(batch[0]).square().mean(1)

    x, y = held.tensors
    options: dict[str, Any] = {"queries": [(x[:60], y[:60]), (x[60:], y[60:])], "model": module, "data": train}
    options |= {"samples": [0, 1], "progress": False}
    plain, asked = clean(tmp_path, **options), clean(tmp_path, **options, query_loss=own)
    assert calls == [60, 40, 60, 40], "once with the samples and once without"
    assert plain.accuracy == asked.accuracy and plain.before is not None and asked.before is not None
    torch.testing.assert_close(plain.before, asked.before)
    assert clean(tmp_path, **options, query_loss=squares).accuracy is None
    assert list(plain.to_pandas().columns[1:3]) == ["predicted_change", "change"]


@pytest.mark.filterwarnings("ignore")
def test_graphs_are_queries_of_one_loss_each(tmp_path: Path) -> None:
    """A batch of graphs has a row a node; each graph is a query, as in `attribute`, and lost and right as one."""
    kind = kinds.Nodes
    module = trained(kind, callbacks=[InfluenceCallback(tmp_path, record="replay")])
    held = DataLoader(samples(kind)[N_KIND:], kinds.QUERIES, collate_fn=kind.collate)  # type: ignore[arg-type]
    data = kind.loader(samples(kind)[:N_KIND], None)
    found = clean(tmp_path, queries=held, model=module, data=data, samples=[1], progress=False)
    before, after = losses(kind, trained(kind)), losses(kind, trained(kind, 1))
    assert found.before is not None and found.after is not None and found.accuracy is not None
    torch.testing.assert_close(found.before, before, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.after, after, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        assert found.accuracy[0] == pytest.approx(_share_right(kind, module))

    def own(model: Any, batch: Any) -> torch.Tensor:
        return model.training_step(batch, 0)[None]

    asked = clean(
        tmp_path, queries=held, model=module, data=data, samples=[1], query_loss=own, dry_run=True, progress=False
    )
    torch.testing.assert_close(asked.predicted, found.predicted)


def _share_right(kind: type[kinds.Base], module: kinds.Base) -> float:
    """Written out: the scores of the classes of each graph, and whether that of its label is the largest."""
    right = []
    for x, edges, y in samples(kind)[N_KIND:]:
        hidden = module.body(x)
        message = torch.zeros_like(hidden)
        for source, end in edges.T.tolist():
            message[end] += hidden[source]
        scores = module.head(torch.nn.functional.gelu(hidden + message).sum(0))
        right.append(float(scores.argmax() == y))
    return sum(right) / len(right)


def test_reports_select_and_compare(tmp_path: Path) -> None:
    train, held, _ = wrongly_labelled()
    module = Classifier(width=8)
    fit(module, loader(train, 20), InfluenceCallback(tmp_path, record="gradients"))
    options: dict[str, Any] = {
        "queries": [tuple(held.tensors)],
        "model": module,
        "curvature": "none",
        "progress": False,
    }
    report = attribute(tmp_path, **options)
    worst = report.select(5)
    assert worst == report.bottom(5).sample_id.tolist()
    assert len(report.select()) == int((report.mean < 0).sum())
    assert report.select(3, by="suspicion") == report.suspects(3).sample_id.tolist()
    with pytest.raises(ConfigurationError, match="choose one of harm, suspicion"):
        report.select(by="size")  # type: ignore[arg-type]
    tangent = attribute(tmp_path, **options, response="tangent")
    table = compare(report, tangent)
    assert len(table) == N and table.change.abs().is_monotonic_decreasing
    row = table.iloc[0]
    assert row.change == pytest.approx(
        float(tangent.mean[int(row.sample_id)] - report.mean[int(row.sample_id)]), rel=1e-4
    )
