"""Samples are taken out of a loader or a datamodule; everything else of it stays."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.data import _replace_dunder_methods, _update_dataloader
from modules import Classifier, digits, fit
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    Sampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_influence import without
from lightning_influence.errors import ConfigurationError

N = 30
GONE = {0, 7, 8, 29}


def numbered(batch_size: int, **options: Any) -> DataLoader[Any]:
    """A loader whose samples are their ids."""
    return DataLoader(TensorDataset(torch.arange(N)), batch_size, **options)


def drawn(loader: Any) -> list[list[int]]:
    return [ids.tolist() for (ids,) in loader]


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_those_of_before_without_the_samples(workers: int) -> None:
    def shuffled() -> DataLoader[Any]:
        seeded = torch.Generator().manual_seed(3)
        return numbered(8, shuffle=True, generator=seeded, num_workers=workers, persistent_workers=workers > 0)

    whole, given = shuffled(), shuffled()
    rest = without(given, GONE)
    for _ in range(2):
        before = drawn(whole)
        assert drawn(rest) == [[z for z in batch if z not in GONE] for batch in before]
        assert sum(map(len, before)) == N
    assert len(rest) == len(whole) and rest.dataset is given.dataset and rest.num_workers == workers
    assert sum(map(len, drawn(given))) == N, "what was given is not changed"


def test_batches_of_one_sample_are_left_out_whole_and_counted() -> None:
    rest = without(numbered(1, shuffle=True), GONE)
    batches = drawn(rest)
    assert len(rest) == len(batches) == N - len(GONE) and {z for (z,) in batches} == set(range(N)) - GONE

    class Validated(Classifier):
        validations = 0

        def on_validation_end(self) -> None:
            self.validations += 1

    module, x, y = Validated(width=4), *digits(N).tensors
    fit(module, without(DataLoader(TensorDataset(x, y), 1), GONE), val=DataLoader(TensorDataset(x, y), 10), max_epochs=2, num_sanity_val_steps=0)  # fmt: skip
    assert module.validations == 2, "the trainer sees where an epoch ends"
    assert module.trainer.global_step == 2 * (N - len(GONE))


def test_a_datamodule_keeps_all_but_its_training_loader() -> None:
    class Data(L.LightningDataModule):
        def __init__(self) -> None:
            super().__init__()
            self.was_set_up = 0

        def setup(self, stage: str) -> None:
            self.was_set_up += 1
            self.made = digits(N)

        def train_dataloader(self) -> Any:
            return DataLoader(self.made, 10)

        def val_dataloader(self) -> Any:
            return DataLoader(self.made, 5)

    given = Data()
    rest = without(given, GONE)
    seen: list[int] = []

    class Counts(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append(len(batch[1]))
            return super().training_step(batch, batch_idx)

    fit(Counts(width=4), rest)
    assert seen == [7, 10, 9], "of the datamodule that was set up"
    assert isinstance(rest, Data) and rest.was_set_up == 1 and given.was_set_up == 0
    assert len(rest.val_dataloader().dataset) == N
    given.setup("fit")
    assert [len(y) for _, y in given.train_dataloader()] == [10, 10, 10]


@pytest.mark.parametrize("in_hook", [False, True])
def test_where_lightning_deals_the_data_out_to_processes_they_stay_out(in_hook: bool) -> None:
    """It makes the batch sampler anew, from the arguments that it saw or from its attributes."""
    watched = (_replace_dunder_methods(DataLoader, "dataset"), _replace_dunder_methods(BatchSampler))
    with ExitStack() as stack:
        if in_hook:
            for each in watched:
                stack.enter_context(each)
        rest = without(without(numbered(8, shuffle=True), [7, 8]), [0, 29])
    sampler = DistributedSampler(rest.dataset, 2, 1, shuffle=False)  # type: ignore[var-annotated]
    of_process = [z for z in range(N) if z % 2]
    whole = [of_process[i : i + 8] for i in range(0, len(of_process), 8)]
    assert drawn(_update_dataloader(rest, sampler)) == [[z for z in batch if z not in GONE] for batch in whole]


def test_a_batch_sampler_of_one_s_own_is_kept() -> None:
    class Halves(Sampler[list[int]]):
        def __init__(self) -> None:
            self.epoch = 0

        def __iter__(self) -> Any:
            self.epoch += 1
            yield from (list(range(15)), list(range(15, N)))

        def __len__(self) -> int:
            return 2

    given = DataLoader(TensorDataset(torch.arange(N)), batch_sampler=Halves())
    rest = without(given, GONE)
    assert drawn(rest) == [[z for z in part if z not in GONE] for part in (range(15), range(15, N))]
    assert rest.batch_sampler.epoch == 1 and given.batch_sampler.epoch == 0 and len(rest) == 2  # type: ignore[union-attr]
    with pytest.raises(ConfigurationError, match="the batches of a list"):
        without(DataLoader(TensorDataset(torch.arange(4)), batch_sampler=[[0, 1], [2, 3]]), [0])


def test_what_cannot_be_left_out_is_refused() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(range(5))

    class Two(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            return [numbered(8), numbered(8)]

    with pytest.raises(ConfigurationError, match="sample 30 is not one of the 30 of the training data"):
        without(numbered(8), [3, 30])
    with pytest.raises(ConfigurationError, match="DataLoader of a Stream"):
        without(DataLoader(Stream()), [1])
    with pytest.raises(ConfigurationError, match="out of a TensorDataset"):
        without(digits(N), [1])
    with pytest.raises(ConfigurationError, match="out of a list"):
        without(Two(), [1]).train_dataloader()
    with pytest.raises(ConfigurationError, match=r"nothing is left of the batch of the samples \[28, 29\]"):
        drawn(without(numbered(2), [28, 29]))
    weighted = DataLoader(TensorDataset(torch.arange(N)), 1, sampler=WeightedRandomSampler(torch.ones(N), 200))
    with pytest.raises(ConfigurationError, match="nothing is left"):
        drawn(without(weighted, GONE))
