"""Data that is read beside the run leaves no trace in it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from modules import Classifier, digits, fit
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, random_split

from lightning_influence import InfluenceCallback
from lightning_influence.run.unchanged import Apart


class Stateful(Dataset[Any]):
    def __init__(self) -> None:
        self.whole = digits(48)
        self.torch_s, self.numpy_s, self.python_s = torch.Generator(), np.random.default_rng(0), random.Random(0)
        self.reads, self.counts, self.recent = 0, torch.zeros(48), list[int]()
        self.opened: Any = None

    def __len__(self) -> int:
        return 48

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        self.opened = self.opened or object()
        self.reads += 1
        self.counts[i] += 1
        self.recent = [*self.recent[-3:], i]
        x, y = self.whole[i]
        noise = torch.rand((), generator=self.torch_s) + self.numpy_s.random() + self.python_s.random()
        return x + 0.05 * noise + 1e-3 * self.reads, y

    def state(self) -> Any:
        generators = self.torch_s.get_state().tolist(), self.numpy_s.bit_generator.state, self.python_s.getstate()
        return *generators, self.reads, self.counts.tolist(), self.recent


def test_a_reading_leaves_no_trace_and_goes_on_where_it_ended() -> None:
    data, alike = Stateful(), Stateful()
    apart = Apart(DataLoader(Subset(data, range(40)), 8))
    before = data.state()
    with apart():
        first = [data[0], data[1]]
    assert data.state() == before
    assert data.opened is not None, "what was opened stays open"
    outside = data[5]
    with apart():
        again = data[2]
    for found, expected in zip([*first, again], [alike[i] for i in range(3)], strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    fresh = Stateful()
    torch.testing.assert_close(outside, fresh[5], rtol=0, atol=0)
    assert data.state() == fresh.state()


def test_an_error_leaves_no_trace() -> None:
    data = Stateful()
    before = data.state()
    with pytest.raises(ZeroDivisionError), Apart(data)():
        data[0][0] / 0, 1 / 0
    assert data.state() == before


class Endless(Sampler[int]):
    """Moves itself on while it is read."""

    position = 0

    def __iter__(self) -> Iterator[int]:
        while self.position < 40:
            self.position += 1
            yield self.position - 1
        self.position = 0

    def __len__(self) -> int:
        return 40


def test_a_sampler_that_moves_itself_on_comes_to_its_end() -> None:
    order = Endless()
    batches, apart, seen = iter(DataLoader(digits(40), 8, sampler=order)), Apart(order), 0
    while True:
        with apart():
            batch = next(batches, None)
        assert order.position == 0
        if batch is None:
            break
        seen += len(batch[0])
    assert seen == 40


@pytest.mark.parametrize("options", [{}, {"limit_train_batches": 3, "check_val_every_n_epoch": 5}], ids=str)
def test_a_report_does_not_ask_for_the_validation_loader_before_the_run_does(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """It may be made with random numbers, and counted."""

    class Data(L.LightningDataModule):
        asked = 0

        def train_dataloader(self) -> Any:
            return DataLoader(digits(48), 8, shuffle=True)

        def val_dataloader(self) -> Any:
            self.asked += 1
            return DataLoader(random_split(digits(20), [15, 5])[0], 5)

    ends = []
    for callbacks in ([], [InfluenceCallback(tmp_path, record="gradients", report=True)]):
        data, module = Data(), Classifier()
        torch.manual_seed(0)
        fit(module, data, *callbacks, max_epochs=2, num_sanity_val_steps=0, **options)
        ends.append([p.tolist() for p in module.parameters()])
        assert data.asked == (1 if callbacks or not options else 0)
    assert ends[0] == ends[1] and (tmp_path / "report.html").exists()


@pytest.mark.parametrize("record", ["gradients", "both"])
def test_recording_and_its_report_do_not_move_the_data_on(record: Any, tmp_path: Path) -> None:
    ends = []
    for callbacks in ([], [InfluenceCallback(tmp_path, record=record, report=True)]):
        data, module = Stateful(), Classifier()
        torch.manual_seed(0)
        train, val = (DataLoader(Subset(data, part), 8) for part in (range(40), range(40, 48)))
        fit(module, train, *callbacks, val=val, max_epochs=2)
        ends.append((data.state(), [p.tolist() for p in module.parameters()]))
    assert ends[0] == ends[1]
