"""Modules as people write them, against Lightning itself run again without a sample, in float64."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import kinds
import lightning as L
import pytest
import torch
from modules import fit
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lightning_influence import InfluenceCallback, InfluenceError, attribute
from lightning_influence.report.trust import trust

N, BATCH, QUERIES = 20, 5, 4


def data() -> tuple[TensorDataset, TensorDataset]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(N + QUERIES, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (N + QUERIES,), generator=generator)
    return TensorDataset(x[:N], y[:N]), TensorDataset(x[N:], y[N:])


class Base(kinds.Base):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


class Contrastive(Base):
    """Every sample is told from the others of its batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z = F.normalize(self(batch[0]), dim=1)
        other = F.normalize(self(batch[0] + 0.1), dim=1)
        return F.cross_entropy(z @ other.T / 0.5, torch.arange(len(z))) + F.cross_entropy(self(batch[0]), batch[1])


class HandWeighted(Base):
    """A weighted mean made by hand."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        weights = 1.0 + batch[0][:, 0].abs()
        return (weights * F.cross_entropy(self(batch[0]), batch[1], reduction="none")).sum() / weights.sum()


class IgnoredLabels(Base):
    """Some labels are left out of the mean."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        labels = torch.where(batch[0][:, 1] > 0.8, -1, batch[1])
        return F.cross_entropy(self(batch[0]), labels, ignore_index=-1)


class SmoothedLabels(Base):
    """Labels smoothed and weighed by their class."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        weight = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
        return F.cross_entropy(self(batch[0]), batch[1], weight=weight, label_smoothing=0.2)


class WeightedSquares(Base):
    """A regression whose mean is divided by the sum of its weights."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0]), F.one_hot(batch[1], 3).double(), weight=1 + batch[0][:, :3].abs())


class Bilinear(Base):
    """A layer without a rule."""

    def build(self) -> None:
        self.body, self.head = nn.Bilinear(3, 3, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.body(x[:, :3], x[:, 3:])))


class OwnParameter(Base):
    """A parameter of the LightningModule itself, without dimensions."""

    def build(self) -> None:
        super().build()
        self.temperature = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.temperature


class FrozenPart(Base):
    """A part in eval mode whose dropout would otherwise be drawn."""

    def build(self) -> None:
        self.body, self.head = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5)), nn.Linear(8, 3)

    def on_train_start(self) -> None:
        self.body.eval()


class BatchAlone(Base):
    """Lightning's signature without the index of the batch."""

    def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
        return F.cross_entropy(self(batch[0]), batch[1])


class ByGlobalStep(Base):
    """A term of the loss that grows with the step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (
            super().training_step(batch, batch_idx)
            + 0.05 * self.global_step * self.head(batch[0].tile(2)[:, :8]).mean()
        )


class PseudoLabels(Base):
    """A target that is the module's own sharpened answer, detached."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        out = self(batch[0])
        target = (out * 2).softmax(1).detach()
        return F.cross_entropy(out, batch[1]) + (out.softmax(1) - target).square().sum(1).mean() * 3


class SelfDistillation(Base):
    """The target of another view of the sample, made under no_grad."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            target = self(batch[0].flip(1)).softmax(1)
        return (
            F.cross_entropy(self(batch[0]), batch[1]) + 2 * (self(batch[0]).softmax(1) - target).square().sum(1).mean()
        )


KINDS = [
    Base,
    Contrastive,
    HandWeighted,
    IgnoredLabels,
    SmoothedLabels,
    WeightedSquares,
    Bilinear,
    OwnParameter,
    FrozenPart,
    BatchAlone,
    ByGlobalStep,
    PseudoLabels,
    SelfDistillation,
]
REFUSED = {Contrastive, HandWeighted, OwnParameter}  # by a log of gradients


def trained(kind: type[Base], without: int | None = None, callbacks: Sequence[L.Callback] = ()) -> Base:
    module, (train, _) = kind(), data()
    batches = [[i for i in range(start, start + BATCH) if i != without] for start in range(0, N, BATCH)]
    fit(module, DataLoader(train, batch_sampler=batches), *callbacks, precision="64-true")  # type: ignore[arg-type]
    return module


def losses(module: Base) -> Tensor:
    x, y = data()[1].tensors
    module.eval()
    step = module.training_step
    alone = isinstance(module, BatchAlone)
    rows = [(x[i : i + 1], y[i : i + 1]) for i in range(QUERIES)]
    return torch.stack([(step(row) if alone else step(row, 0)).detach() for row in rows])  # type: ignore[call-arg]


@functools.cache
def changes_by_retraining(kind: type[Base]) -> Tensor:
    """Of the mean query loss, without each sample."""
    before = losses(trained(kind)).mean()
    return torch.stack([losses(trained(kind, z)).mean() - before for z in range(N)])


@pytest.mark.parametrize("record", ["gradients", "replay"])  # of one kind after another, so that it is retrained once
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_scores_are_those_of_retraining_or_the_run_is_refused(kind: type[Base], record: Any, tmp_path: Path) -> None:
    plain, (_, queries) = trained(kind), data()
    callback = InfluenceCallback(tmp_path / "log", record=record)
    if record == "gradients" and kind in REFUSED:
        with pytest.raises(InfluenceError, match="replay|exclude"):
            trained(kind, callbacks=[callback])
        return
    module = trained(kind, callbacks=[callback])
    for p, q in zip(plain.parameters(), module.parameters(), strict=True):
        assert torch.equal(p, q), "the run ends where it ends without the callback"
    report = attribute(tmp_path / "log", queries=DataLoader(queries, QUERIES), model=module, progress=False)
    truth, scores = changes_by_retraining(kind), report.scores.double().mean(1)
    # Fisher, which a log of gradients has to take, is off by a little, and by more where the loss stops paths
    fisher = 0.3 if kind in (PseudoLabels, SelfDistillation) else 0.1
    assert (scores - truth).norm() <= (fisher if record == "gradients" else 0.03) * truth.norm()


def test_paths_that_the_loss_stops_are_followed(tmp_path: Path) -> None:
    """Without following them, exact curvature is no better than none."""
    for kind, told in ((Base, "none"), (PseudoLabels, "followed"), (SelfDistillation, "followed")):
        log = tmp_path / kind.__name__
        module = trained(kind, callbacks=[InfluenceCallback(log, record="replay")])
        report = attribute(log, queries=DataLoader(data()[1], QUERIES), model=module, progress=False)
        assert report.metadata["stopped_paths"] == told


class AbsoluteErrors(Base):
    """An L1 loss with weights, of which torch 2.13 does not tell a mode."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.l1_loss(self(batch[0]), F.one_hot(batch[1], 3).double(), weight=1 + 5 * batch[0][:, :3].abs())


def test_the_weight_of_an_l1_loss_survives_being_seen(tmp_path: Path) -> None:
    plain, seen = (
        trained(AbsoluteErrors),
        trained(AbsoluteErrors, callbacks=[InfluenceCallback(tmp_path / "log", record="gradients")]),
    )
    for p, q in zip(plain.parameters(), seen.parameters(), strict=True):
        assert torch.equal(p, q)


class Dropped(Base):
    """Dropout in the layers and of the inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(F.gelu(self.body(F.dropout(x, 0.2, self.training))), 0.5, self.training))


class DroppedContrastive(Dropped):
    """Two views of every sample by dropout alone, told from those of the others."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z, other = self(batch[0]), self(batch[0])
        return F.cross_entropy(z, batch[1]) + F.cross_entropy(z @ other.T, torch.arange(len(z)))


def test_removals_are_verified_with_the_random_numbers_of_every_other_sample(tmp_path: Path) -> None:
    for kind, how in ((Dropped, "shares"), (DroppedContrastive, "rerun")):
        log = tmp_path / kind.__name__
        module = trained(kind, callbacks=[InfluenceCallback(log, record="replay")])
        report = attribute(log, queries=DataLoader(data()[1], QUERIES), model=module, progress=False)
        told = report.metadata["removals"]
        assert told["by"] == how
        assert told["verified"] == 3 and told["largest_error"] < 1e-8 if how == "shares" else told["reason"]
    trained(Dropped, callbacks=[InfluenceCallback(tmp_path / "dropped", record="gradients")])
    with pytest.raises(InfluenceError, match=r"miss the effect of a removal by .* of its size \(most at"):
        trained(DroppedContrastive, callbacks=[InfluenceCallback(tmp_path / "contrastive", record="gradients")])


class MixedUp(Base):
    """Every sample is mixed with a partner that is drawn from the batch.

    Attributes:
        drawn: the partners of each step of the whole run.
        gone: position in its batch of the sample that has left, for a run without it, by step.
    """

    drawn: ClassVar[list[list[int]]] = []
    gone: ClassVar[dict[int, int]] = {}

    def partners(self, n: int) -> Tensor:
        order = torch.randperm(n)
        if not self.gone:
            self.drawn.append(order.tolist())
        elif self.global_step in self.gone:  # whose partner has left takes the partner of that one
            z, whole = self.gone[self.global_step], self.drawn[self.global_step]
            kept = [i for i in range(n + 1) if i != z]
            return torch.tensor([kept.index(whole[i] if whole[i] != z else whole[z]) for i in kept])
        else:
            return torch.tensor(self.drawn[self.global_step])
        return order

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        if not self.training:
            return super().training_step(batch, batch_idx)
        other = self.partners(len(x))
        mixed = self(0.7 * x + 0.3 * x[other])
        return 0.7 * F.cross_entropy(mixed, y) + 0.3 * F.cross_entropy(mixed, y[other])


def test_the_partners_of_all_other_samples_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the truth keeps them, which draws no numbers of its own."""
    with pytest.raises(InfluenceError, match="Samples see each other"):
        trained(MixedUp, callbacks=[InfluenceCallback(tmp_path / "gradients", record="gradients")])
    monkeypatch.setattr(MixedUp, "drawn", [])
    plain = trained(MixedUp)
    before, drawn = losses(plain).mean(), list(MixedUp.drawn)
    module = trained(MixedUp, callbacks=[InfluenceCallback(tmp_path / "log", record="replay")])
    report = attribute(tmp_path / "log", queries=DataLoader(data()[1], QUERIES), model=module, progress=False)
    assert report.metadata["removals"]["by"] == "rerun"
    monkeypatch.setattr(MixedUp, "drawn", drawn)
    truth = []
    for z in range(N):
        monkeypatch.setattr(MixedUp, "gone", {z // BATCH: z % BATCH})
        truth.append(losses(trained(MixedUp, z)).mean() - before)
    expected = torch.stack(truth)
    assert (report.scores.double().mean(1) - expected).norm() <= 0.03 * expected.norm()


class Experts(Base):
    """Every sample goes to one of two layers; now and then one of them has a single sample of the batch."""

    def build(self) -> None:
        self.gate = nn.Linear(6, 2)
        nn.init.constant_(self.gate.bias[:1], 0.8)  # for which samples are few
        self.experts = nn.ModuleList([nn.Linear(6, 3) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x).softmax(1)
        chosen, out = gate.argmax(1), x.new_zeros(len(x), 3)
        for number, expert in enumerate(self.experts):
            rows = chosen == number
            if rows.any():
                out[rows] = expert(x[rows]) * gate[rows, number, None]
        return out


def test_a_removal_that_leaves_a_layer_without_a_gradient_is_told(tmp_path: Path) -> None:
    """Its optimizer then skips the layer, which a gradient of zero does not do; every other score is right."""
    with torch.no_grad():
        batches = trained(Experts).gate(data()[0].tensors[0]).argmax(1).view(-1, BATCH)
    alone = [
        i * BATCH + int((batch == expert).nonzero()[0])
        for i, batch in enumerate(batches)
        for expert in range(2)
        if int((batch == expert).sum()) == 1
    ]
    assert alone, "there is such a sample"
    module = trained(Experts, callbacks=[InfluenceCallback(tmp_path / "log", record="replay")])
    report = attribute(tmp_path / "log", queries=DataLoader(data()[1], QUERIES), model=module, progress=False)
    assert report.metadata["removals"]["skipped"] == len(alone)
    (told,) = [reason for reason in trust(report) if reason.name == "Removals"]
    assert told.level == "approximate" and f"{len(alone)} of them leave a parameter without a gradient" in told.meaning
    others = [z for z in range(N) if z not in alone]
    before = losses(trained(Experts)).mean()
    truth = torch.stack([losses(trained(Experts, z)).mean() - before for z in others])
    assert (report.scores.double().mean(1)[others] - truth).norm() <= 0.03 * truth.norm()


class FixedSize(Base):
    """Takes batches of one size alone while it trains."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0].view(BATCH, 6) if self.training else batch[0]
        return F.cross_entropy(self(x), batch[1])


class FixedSizeContrastive(FixedSize):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z = self(batch[0])
        loss = super().training_step(batch, batch_idx)
        return loss + F.cross_entropy(z @ z.T, torch.arange(len(z))) + F.linear(batch[0], self.body.weight).mean()


@pytest.mark.parametrize("record", ["gradients", "replay"])
def test_a_step_that_takes_no_fewer_samples_is_scored_and_told(record: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"queries": DataLoader(data()[1], QUERIES), "progress": False}
    scores = []
    for kind in (Base, FixedSize):
        log = tmp_path / kind.__name__
        module = trained(kind, callbacks=[InfluenceCallback(log, record=record)])
        scores.append(attribute(log, model=module, **options))
    torch.testing.assert_close(scores[1].scores, scores[0].scores)
    told = scores[1].metadata["removals"]
    assert told["verified"] == 0 and "does not take a batch without one of its samples" in told["reason"]
    if record == "replay":
        module = trained(FixedSizeContrastive, callbacks=[InfluenceCallback(tmp_path / "log", record="replay")])
        with pytest.raises(
            InfluenceError, match="take a batch without one .* have to be measured, because .* of any size"
        ):
            attribute(tmp_path / "log", model=module, **options)


def test_a_report_says_how_removals_were_found(tmp_path: Path) -> None:
    for kind, how in ((Base, "shares"), (Contrastive, "rerun")):
        log = tmp_path / kind.__name__
        module = trained(kind, callbacks=[InfluenceCallback(log, record="replay")])
        report = attribute(log, queries=DataLoader(data()[1], QUERIES), model=module, progress=False)
        told = report.metadata["removals"]
        assert told["by"] == how
        assert (told["verified"] == 3 and told["largest_error"] < 1e-8) if how == "shares" else told["reason"]


@pytest.mark.parametrize("record", ["gradients", "replay"])
def test_rows_that_the_collate_function_sorts_are_known_by_content(record: Any, tmp_path: Path) -> None:
    def collate(samples: list[Any]) -> Any:
        x, y = default_collate(samples)
        order = x[:, 0].argsort()
        return x[order], y[order]

    train, queries = data()
    reports = []
    for name, function in (("sorted", collate), ("as drawn", default_collate)):
        module = Base()
        loader = DataLoader(train, BATCH, collate_fn=function)
        callback = InfluenceCallback(tmp_path / name, record=record)
        L.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[callback]).fit(
            module, loader
        )
        reports.append(attribute(tmp_path / name, queries=DataLoader(queries, QUERIES), model=module, progress=False))
    torch.testing.assert_close(reports[0].scores, reports[1].scores, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("kind", [Base, Contrastive], ids=lambda kind: kind.__name__)
def test_chosen_samples_have_the_scores_that_they_have_among_all(kind: type[Base], tmp_path: Path) -> None:
    module = trained(kind, callbacks=[InfluenceCallback(tmp_path / "log", record="replay")])
    options: dict[str, Any] = {"queries": DataLoader(data()[1], QUERIES), "model": module, "progress": False}
    whole, some = attribute(tmp_path / "log", **options), attribute(tmp_path / "log", samples=[13, 2], **options)
    assert some.sample_ids.tolist() == [2, 13]
    torch.testing.assert_close(some.scores, whole.scores[[2, 13]], rtol=1e-6, atol=1e-12)
    with pytest.raises(InfluenceError, match="samples names 99"):
        attribute(tmp_path / "log", samples=[99], **options)


def test_what_is_not_verified_is_said(tmp_path: Path) -> None:
    module = trained(HandWeighted, callbacks=[InfluenceCallback(tmp_path / "log", record="replay")])
    options: dict[str, Any] = {"queries": DataLoader(data()[1], QUERIES), "model": module, "progress": False}
    told = attribute(tmp_path / "log", verify=False, **options).metadata["removals"]
    assert told == {"by": "shares", "reason": "verify=False", "verified": 0, "largest_error": 0.0}
    assert attribute(tmp_path / "log", **options).metadata["removals"]["by"] == "rerun"
