"""Which rows of a batch are which sample, also where samples are drawn at random each time, and what is said where it is not known."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from modules import Classifier, digits, fit
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_influence import InfluenceCallback, attribute
from lightning_influence.log.steps import LoggedSteps
from lightning_influence.run.batches import leaves
from lightning_influence.run.random_state import read_random_state
from lightning_influence.run.rows import RowOrder


class Noisy(Dataset[Any]):
    """Digits with noise that is drawn when they are fetched."""

    def __init__(self, n: int = 24) -> None:
        self.x, self.y = digits(n).tensors

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index] + 0.1 * torch.randn(64), self.y[index]


def brightest_first(samples: list[Any]) -> Any:
    x, y = default_collate(samples)
    order = x.sum(1).argsort()
    return x[order], y[order]


def fetched(data: Noisy, ids: list[int], collate: Any) -> tuple[Any, dict[str, Tensor]]:
    state = read_random_state()
    return collate([data[z] for z in ids]), state


def test_samples_that_are_drawn_at_random_in_this_process_are_known_by_content() -> None:
    torch.manual_seed(3)
    data, ids = Noisy(), [5, 2, 9, 7]
    batch, state = fetched(data, ids, brightest_first)
    order = RowOrder(data, brightest_first)
    rows = order(batch, torch.tensor(ids), state)
    assert sorted(rows.tolist()) == sorted(ids) and rows.tolist() != ids and not order.assumed
    nearest = torch.cdist(batch[0], data.x).argmin(1)
    assert torch.equal(rows, nearest)
    blind = RowOrder(data, brightest_first)
    assert blind(batch, torch.tensor(ids)).tolist() == ids and blind.assumed


def test_a_batch_that_is_collated_without_a_sample_has_the_others_as_they_were() -> None:
    torch.manual_seed(4)
    data, ids = Noisy(), [5, 2, 9]
    batch, state = fetched(data, ids, default_collate)
    for row, z in enumerate(ids):
        rest = RowOrder(data, default_collate).less(torch.tensor(ids), state)[z]
        others = [i for i in range(3) if i != row]
        for one, whole in zip(leaves(rest), leaves(batch), strict=True):
            assert torch.equal(one, whole[others])


@pytest.mark.parametrize("record", ["gradients", "replay"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_report_says_that_the_order_of_rows_was_assumed(record: Any, workers: int, tmp_path: Path) -> None:
    module = Classifier()
    loader = DataLoader(Noisy(), 8, num_workers=workers)
    fit(module, loader, InfluenceCallback(tmp_path / "log", record=record, store_batches=True))
    assert LoggedSteps.of(tmp_path / "log").rows_assumed == bool(workers)
    queries = [tuple(t[:4] for t in digits(40).tensors)]
    report = attribute(tmp_path / "log", queries=queries, model=module, target="mean", progress=False)
    page = report.to_html(tmp_path / "report.html").read_text()
    assert ("order in which they were drawn" in page) == bool(workers)
    assert report.metadata.get("rows") == ("assumed" if workers else None)


class OwnGenerators(Dataset[Any]):
    """Draws from generators of its own, one of them inside a transform, and counts."""

    def __init__(self) -> None:
        self.x, self.y = digits(24).tensors
        self.own, self.fetched = torch.Generator().manual_seed(1), 0
        self.transforms = [partial(self._jitter, np.random.default_rng(2)), self.Shift(random.Random(3))]

    class Shift:
        def __init__(self, generator: random.Random) -> None:
            self.generator = generator

        def __call__(self, x: Tensor) -> Tensor:
            return x + 0.1 * self.generator.random()

    @staticmethod
    def _jitter(generator: np.random.Generator, x: Tensor) -> Tensor:
        return x * (1 + 0.1 * float(generator.normal()))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.fetched += 1
        x = self.x[index] + 0.1 * torch.randn(64, generator=self.own)
        for transform in self.transforms:
            x = transform(x)
        return x + 1e-3 * self.fetched, self.y[index]


@pytest.mark.parametrize("record", ["gradients", "replay"])
def test_a_dataset_with_generators_of_its_own_gives_what_it_would(record: Any, tmp_path: Path) -> None:
    ends = []
    for callbacks in ([], [InfluenceCallback(tmp_path, record=record, on_error="raise")]):
        module = Classifier()
        fit(module, DataLoader(OwnGenerators(), 8), *callbacks, max_epochs=2)
        ends.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(*ends)
    assert LoggedSteps.of(tmp_path).rows_assumed
