"""Every kind of module of `kinds`, in each way of recording, against Lightning itself run again without each sample."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from kinds import KINDS, QUERIES, Base, N, Samples
from modules import fit
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_influence import InfluenceCallback, InfluenceError, attribute
from lightning_influence.run.lightning_task import loss_of, quiet


def samples(kind: type[Base]) -> Samples:
    torch.manual_seed(5)
    return kind.samples(N + QUERIES)


def trained(kind: type[Base], without: int | None = None, callbacks: Sequence[L.Callback] = ()) -> Base:
    module = kind()
    options: dict[str, Any] = {"max_epochs": 2, "precision": "64-true"} | kind.trainer_options
    fit(module, kind.loader(samples(kind)[:N], without), *kind.callbacks(), *callbacks, **options)
    return module


def losses(kind: type[Base], module: Base) -> Tensor:
    module.eval()
    with quiet(module), module.trainer.precision_plugin.forward_context():
        steps = [module.training_step(kind.collate([sample]), 0) for sample in samples(kind)[N:]]
    return torch.stack([loss_of(output).detach() for output in steps])


class Count(L.Callback):
    """Counts batches."""

    batches = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.batches += 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_kind_is_right_or_refused(kind: type[Base], tmp_path: Path) -> None:
    plain = trained(kind)
    before = losses(kind, plain).mean()
    left_out = range(KINDS.index(kind) % 2, N, 2)  # the other half of the samples with the next kind
    truth = torch.stack([losses(kind, trained(kind, z)).mean() - before for z in left_out])
    for record in ("gradients", "replay", "auto"):
        callback, count = InfluenceCallback(tmp_path / record, record=record, on_error="raise", **kind.options), Count()  # type: ignore[arg-type]
        if record in kind.refused or (record == "auto" and {"gradients", "replay"} <= set(kind.refused)):
            with pytest.raises(InfluenceError):
                trained(kind, callbacks=[callback, count])
            assert count.batches < 2 or kind.refused_later
            continue
        module = trained(kind, callbacks=[callback, count])
        for p, q in zip(plain.parameters(), module.parameters(), strict=True):
            assert torch.equal(p, q), "the run ends where it ends without the callback"
        queries = DataLoader(samples(kind)[N:], QUERIES, collate_fn=kind.collate)  # type: ignore[arg-type]
        data = kind.loader(samples(kind)[:N], None) if kind.needs_data else None
        report = attribute(tmp_path / record, queries=queries, model=module, data=data, progress=False)
        known = dict(zip(report.sample_ids.tolist(), report.scores.double().mean(1), strict=True))
        scores = torch.stack([known.get(z, torch.zeros((), dtype=torch.float64)) for z in left_out])
        error = (scores - truth).norm() / truth.norm()
        replayed = record == "replay" or (record == "auto" and "replay" not in kind.refused)
        assert error <= (0.01 if replayed else 0.1), f"{record}: {float(error):.3g}"
