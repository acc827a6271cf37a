"""Training dynamics out of a log, and the wrong labels that they find."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from modules import Classifier, digits, fit, loader
from scipy.integrate import quad
from sklearn.metrics import average_precision_score
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceCallback, suspects, training_dynamics
from lightning_influence.cli import main
from lightning_influence.errors import ConfigurationError, LogCorrupted, LogError
from lightning_influence.log.reader import StoreReader
from lightning_influence.log.steps import LoggedSteps
from lightning_influence.log.writer import StoreWriter
from lightning_influence.run.losses import MAX_CLASSES
from lightning_influence.trust import dynamics as dynamics_module
from lightning_influence.trust.dynamics import confusion, contradiction, epoch_weights, visit_numbers

N = 24


class Remembers(Classifier):
    """Keeps what it computed, batch by batch: logits, labels and which samples they are of."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[Tensor, Tensor, Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, ids = batch
        logits = self.net(x)
        self.kept.append((logits.detach().double(), y, ids))
        return F.cross_entropy(logits, y)


def recorded(
    log: Path, record: Any = "replay", epochs: int = 3, **options: Any
) -> tuple[Remembers, Tensor, Tensor, list[int]]:
    """A run, and of its visits in their order logits, labels and sample ids."""
    module, data = Remembers(), TensorDataset(*digits(N).tensors, torch.arange(N))
    fit(module, loader(data, 5), InfluenceCallback(log, record=record), max_epochs=epochs, **options)
    logits, labels, ids = (torch.cat(column) for column in zip(*module.kept[-5 * epochs :], strict=True))
    return module, logits, labels, ids.tolist()


@pytest.mark.parametrize("record", ["gradients", "replay", "both"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_log_holds_what_the_training_step_computed(record: Any, accumulated: int, tmp_path: Path) -> None:
    _, logits, labels, visited = recorded(tmp_path / "log", record, 2, accumulate_grad_batches=accumulated)
    steps = LoggedSteps(tmp_path / "log")
    found = [steps.dynamics(i) for i in range(len(steps))]
    assert all(step is not None for step in found)
    ids = torch.cat([step[0] for step in found if step])
    assert ids.tolist() == visited
    column = {name: torch.cat([s[1].columns()[name] for s in found if s]) for name in found[0][1].columns()}  # type: ignore[index]
    assert column["labels"].tolist() == labels.tolist()
    torch.testing.assert_close(column["losses"], F.cross_entropy(logits, labels, reduction="none").float())
    torch.testing.assert_close(column["log_probabilities"], logits.log_softmax(1).half(), rtol=2e-3, atol=1e-3)
    for row, (values, label) in enumerate(zip(logits.tolist(), labels.tolist(), strict=True)):
        best = max((v, c) for c, v in enumerate(values) if c != label)
        assert float(column["margins"][row]) == pytest.approx(values[label] - best[0], rel=1e-4, abs=1e-5)
        assert int(column["others"][row]) == best[1]


def test_dynamics_that_no_recorder_writes_are_refused(tmp_path: Path) -> None:
    recorded(tmp_path / "log", epochs=1)
    reader = StoreReader(tmp_path / "log")
    tensors = {name: reader.tensor(0, name) for name in reader.names(0)}
    damaged = {
        "labels": tensors["dynamics/labels"] + 100,
        "losses": tensors["dynamics/losses"].double(),
        "margins": tensors["dynamics/margins"][1:],
        "log_probabilities": tensors["dynamics/log_probabilities"][0],
    }
    for name, tensor in damaged.items():
        path = tmp_path / name
        with StoreWriter(path) as writer:
            writer.write_manifest(dict(reader.manifest))
            writer.append(0, tensors | {f"dynamics/{name}": tensor}, reader.meta(0))
        with pytest.raises(LogCorrupted):
            LoggedSteps(path).dynamics(0)


def test_a_changed_byte_is_an_error(tmp_path: Path) -> None:
    recorded(tmp_path / "log", "gradients", epochs=1)
    shard = tmp_path / "log" / "rank-0" / "step-00000001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1  # of the log-probabilities, which lie last
    shard.write_bytes(bytes(content))
    with pytest.raises(LogCorrupted, match="log_probabilities"):
        suspects(tmp_path / "log")


def test_tables_are_those_of_the_logits(tmp_path: Path) -> None:
    _, logits, labels, visited = recorded(tmp_path / "log", epochs=4)
    found = training_dynamics(tmp_path / "log")
    table, ranked = found.to_pandas(), found.suspects(N).set_index("sample_id")
    assert table.sample_id.tolist() == list(range(N)) and (table.visits == 4).all()
    for z in range(N):
        rows = [i for i, visit in enumerate(visited) if visit == z]
        own, label = logits[rows].numpy(), int(labels[rows[0]])
        probabilities = np.exp(own) / np.exp(own).sum(1, keepdims=True)
        confidence = probabilities[:, label]
        margins = own[:, label] - np.delete(own, label, 1).max(1)
        row = table.iloc[z]
        assert row.label == label
        assert row.confidence == pytest.approx(confidence.mean(), rel=1e-4)
        assert row.variability == pytest.approx(confidence.std(), rel=1e-3, abs=1e-6)
        assert row.correctness == pytest.approx((own.argmax(1) == label).mean())
        assert row.loss == ranked.loss[z] == pytest.approx(-np.log(confidence).mean(), rel=1e-4)
        assert row.margin == ranked.margin[z] == pytest.approx(margins.mean(), rel=1e-4, abs=1e-5)
        assert ranked.last_margin[z] == pytest.approx(margins[-1], rel=1e-4, abs=1e-5)
        assert ranked.last_loss[z] == pytest.approx(-np.log(confidence[-1]), rel=1e-4)
    (points, *_) = found.plot().axes[0].collections
    assert points.get_offsets().shape == (N, 2)
    assert repr(found) == f"TrainingDynamics({N} samples, {4 * N} visits)"


def test_suspicion_is_the_margin_of_the_weighted_average(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamics_module, "_CONFUSION_PASSES", 0)
    _, logits, labels, visited = recorded(tmp_path / "log", epochs=4)
    found = suspects(tmp_path / "log", N).set_index("sample_id")
    fitted = logits.argmax(1) == labels
    weights = [0.0] + [(int((~fitted[e * N : (e + 1) * N]).sum()) + 1) / (N + 2) for e in range(1, 4)]
    for z in range(N):
        rows = [i for i, visit in enumerate(visited) if visit == z]
        average = sum(w * logits[i].log_softmax(0) for w, i in zip(weights, rows, strict=True)) / sum(weights)
        label = int(labels[rows[0]])
        others = {c: float(average[c] - average[label]) for c in range(10) if c != label}
        best = max(others, key=others.__getitem__)
        assert found.suspicion[z] == pytest.approx(others[best], abs=5e-3)
        assert found.suggested[z] == best
        share = sum(w for w, i in zip(weights, rows, strict=True) if int(logits[i].argmax()) == best) / sum(weights)
        assert found.share[z] == pytest.approx(share, abs=1e-6)


def test_visits_are_counted() -> None:
    ids = torch.tensor([7, 3, 7, 9, 3, 7, 3, 1])
    assert visit_numbers(ids).tolist() == [0, 0, 1, 0, 1, 2, 2, 0]


def test_an_epoch_counts_by_what_is_not_yet_fitted() -> None:
    numbers = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    margins = torch.tensor([-1.0, -1.0, -1.0, -1.0, 2.0, -3.0, 1.0, 1.0])
    torch.testing.assert_close(epoch_weights(numbers, margins), torch.tensor([0, 3 / 5, 1 / 4], dtype=torch.float64))


def test_confusions_are_posterior_means_of_poisson_rates() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (400,), generator=generator)
    classes = torch.where(
        torch.rand(400, generator=generator) < 0.9, labels, torch.randint(0, 4, (400,), generator=generator)
    )
    classes[(labels == 1).nonzero()[:30, 0]] = 2
    found = confusion(labels, classes, 4)
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    counts = {(i, j): int(((labels == i) & (classes == j)).sum()) for i, j in pairs}
    rate = sum(counts.values()) / sum(3 * int((labels == i).sum()) for i in range(4))
    expected = {(i, j): rate * int((labels == i).sum()) for i, j in pairs}
    excess = sum((counts[p] - expected[p]) ** 2 - expected[p] for p in pairs)
    shape = dynamics_module._CONFUSION_STRENGTH * sum(e**2 for e in expected.values()) / excess
    for i, j in pairs:

        def posterior(r: float, power: float = 0.0, i: int = i, j: int = j) -> float:
            if r == 0:
                return 0.0
            log = (counts[i, j] + shape - 1 + power) * math.log(r) - (expected[i, j] + shape) * r
            return math.exp(log + expected[i, j] + shape)  # the constant keeps it in range

        mean = quad(lambda r: posterior(r, 1.0), 0, 30)[0] / quad(posterior, 0, 30)[0]
        assert float(found[i, j]) == pytest.approx(math.log(mean), rel=1e-5, abs=1e-6)
    assert found[1, 2] == found.max() > 0.1 and found.diag().tolist() == [0] * 4


def test_pairs_that_are_confused_alike_change_nothing() -> None:
    labels = torch.arange(5).repeat_interleave(20)
    classes = labels.clone()
    for i in range(5):
        classes[20 * i : 20 * i + 4] = torch.tensor([c for c in range(5) if c != i])
    assert not confusion(labels, classes, 5).any()


def test_a_confused_pair_settles_what_is_undecided() -> None:
    """Of 100 samples labelled 0, 30 are plainly of class 1; one more could be of 1 or of 2."""
    probabilities = torch.full((300, 3), 0.02)
    labels = torch.arange(3).repeat_interleave(100)
    probabilities[torch.arange(300), labels] = 0.96
    probabilities[:30] = torch.tensor([0.02, 0.96, 0.02])
    probabilities[99] = torch.tensor([0.34, 0.32, 0.34])
    suspicion, suggested = contradiction(probabilities.log(), labels)
    assert suggested[99] == 1 and suspicion[99] > 0
    assert set(suspicion.argsort(descending=True)[:31].tolist()) == {*range(30), 99}


def wrong_labels(n: int, pair: bool) -> tuple[TensorDataset, Tensor, Tensor]:
    x, y = digits(n).tensors
    generator = torch.Generator().manual_seed(1)
    if pair:
        bad = ((y == 1) | (y == 8)) & (torch.rand(n, generator=generator) < 0.25)
        labels = torch.where(bad, 9 - y, y)
    else:
        bad = torch.rand(n, generator=generator) < 0.1
        labels = torch.where(bad, (y + torch.randint(1, 10, (n,), generator=generator)) % 10, y)
    return TensorDataset(x, labels), bad, y


@pytest.mark.parametrize("pair", [False, True], ids=["any class", "a pair"])
def test_wrong_labels_are_found(pair: bool, tmp_path: Path) -> None:
    data, bad, truth = wrong_labels(500, pair)
    module = Classifier(lambda m: torch.optim.AdamW(m.parameters(), lr=3e-3), width=64)
    fit(module, loader(data, 32), InfluenceCallback(tmp_path / "log", record="replay"), max_epochs=40)
    table = suspects(tmp_path / "log", 500).sort_values("sample_id")
    precision = {
        name: average_precision_score(bad, values)
        for name, values in (("ours", table.suspicion), ("AUM", -table.margin), ("last loss", table.last_loss))
    }
    # AUM is as good where any class may be taken for any other; what it does not know is that a pair is confused
    assert precision["ours"] > (0.75 if pair else 0.95)
    assert precision["ours"] > precision["AUM"] + (0.02 if pair else -0.01)
    assert precision["ours"] > precision["last loss"] + (0.15 if pair else 0.05)
    found = suspects(tmp_path / "log", int(bad.sum()))
    right = [int(truth[z]) == label for z, label in zip(found.sample_id, found.suggested, strict=True) if bad[z]]
    assert np.mean(right) > 0.85, "the suggested label is mostly the true one"
    assert (suspects(tmp_path / "log").suspicion > 0).all()


def test_a_look_at_the_end_is_one_more_visit(tmp_path: Path) -> None:
    module, *_ = recorded(tmp_path / "log", epochs=2)
    x, y = digits(N).tensors
    data = DataLoader(TensorDataset(x, y, torch.arange(N)), 7)
    before = {name: t.clone() for name, t in module.state_dict().items()}
    table = suspects(tmp_path / "log", N, model=module, data=data).sort_values("sample_id")
    assert module.training and all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    with torch.no_grad():
        losses = F.cross_entropy(module.net(x), y, reduction="none")
    np.testing.assert_allclose(table.last_loss, losses, rtol=1e-4)
    assert not np.allclose(table.suspicion, suspects(tmp_path / "log", N).sort_values("sample_id").suspicion)
    with pytest.raises(ConfigurationError, match="model was given without data"):
        suspects(tmp_path / "log", model=module)
    with pytest.raises(ConfigurationError, match="data was given without model"):
        suspects(tmp_path / "log", data=data)


def test_a_single_epoch_counts(tmp_path: Path) -> None:
    recorded(tmp_path / "log", epochs=1)
    table = suspects(tmp_path / "log", N)
    assert len(table) == N and table.notna().all(axis=None)


class Words(L.LightningModule):
    """Several labels a sample, or more classes than are kept."""

    def __init__(self, classes: int, tokens: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head, self.shape = torch.nn.Linear(64, classes * tokens), (tokens, classes)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.head(x).unflatten(1, self.shape)
        labels = (y[:, None] + torch.arange(self.shape[0])) % 10
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@pytest.mark.parametrize(("classes", "tokens"), [(MAX_CLASSES + 1, 1), (10, 4)])
def test_without_log_probabilities_margins_rank(classes: int, tokens: int, tmp_path: Path) -> None:
    data, bad, _ = wrong_labels(200, pair=False)
    fit(Words(classes, tokens), loader(data), InfluenceCallback(tmp_path / "log", record="replay"), max_epochs=6)
    table = suspects(tmp_path / "log", 200).sort_values("sample_id")
    assert average_precision_score(bad, table.suspicion) > 0.7
    if tokens == 1:
        first = table[table.suspicion > 0]
        assert ((first.suggested != first.label) & (first.suggested < 10)).all()
    else:
        assert (table.suggested == -1).all() and (table.label == -1).all()


class Squares(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.net(batch[0]), F.one_hot(batch[1], 10).float())


def test_a_log_without_a_loss_over_classes_says_so(tmp_path: Path) -> None:
    fit(Squares(), loader(digits(N)), InfluenceCallback(tmp_path / "log", record="replay"))
    with pytest.raises(LogError, match="no training dynamics"):
        suspects(tmp_path / "log")


def test_the_command_line_tells_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded(tmp_path / "log")
    table = suspects(tmp_path / "log")
    assert main(["suspects", str(tmp_path / "log"), "--k=3", f"--out={tmp_path / 'found.csv'}"]) == 0
    told = capsys.readouterr().out
    assert f"{len(table)} samples" in told and str(table.sample_id[0]) in told
    assert len((tmp_path / "found.csv").read_text().splitlines()) == len(table) + 1
    assert main(["suspects", str(tmp_path / "log"), "--k=0"]) == 2
    assert "--k 0" in capsys.readouterr().err
