"""A training loader whose batches are chosen just before they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from lightning_influence.run.random_state import random_state
from lightning_influence.run.rows import row_order
from lightning_influence.run.sample_ids import RecordedBatchSampler
from lightning_influence.run.task import as_task
from lightning_influence.run.trainer import ranks_of
from lightning_influence.run.unchanged import Apart
from lightning_influence.selection.lookahead import Candidates
from lightning_influence.selection.selector import Scorer, Selector


@dataclass
class _Epoch:
    """Where an epoch stands; batches are lists of indices into the dataset.

    Attributes:
        size: samples of a full batch.
        seed: of the random numbers that loader workers draw.
        drawn: batches to be decided about.
        further: passes over the data that follow, where they are drawn beforehand.
        waiting: kept samples that do not yet fill a batch.
        kept: batches to be delivered.
        delivered: number of batches that were.
    """

    size: int
    seed: int
    drawn: list[list[int]]
    further: list[list[list[int]]]
    waiting: list[int] = field(default_factory=list)
    kept: list[list[int]] = field(default_factory=list)
    delivered: int = 0


class SelectingLoader:
    """The loader that Lightning trains from while samples are selected in rounds.

    Its length is known, so Lightning fetches nothing ahead and every round sees the run where it stands. Several
    processes deal out among them the batches that the first one draws, and each selects on its own; they have
    equally many batches, so none waits for another. A run that is resumed inside an epoch keeps the decisions already made.

    Args:
        selector: decides, by its scorer.
        loader: of a map-style dataset.
        trainer: of the run.
    """

    def __init__(self, selector: Selector, loader: DataLoader[Any], trainer: L.Trainer) -> None:
        assert selector.scorer is not None
        self.selector, self.loader, self.trainer = selector, loader, trainer
        self.settings, self.ranks = selector.settings, ranks_of(trainer)
        self._scorer: Scorer = selector.scorer
        self._row_order = row_order(loader, as_task(trainer.lightning_module))
        self.dataset, self.num_workers, self.collate_fn = loader.dataset, loader.num_workers, loader.collate_fn
        self._due: list[list[int]] = []  # batches that are being delivered
        self.batch_sampler = RecordedBatchSampler(self._due)  # where `SampleIds` listens
        self._epoch: _Epoch | None = None
        self._resumed: _Epoch | None = None
        self._tried = False
        self._seeds = torch.Generator()  # by which workers are seeded
        self._delivers: DataLoader[Any] | None = None  # by workers that outlive an epoch
        overfits = trainer.overfit_batches > 0  # type: ignore[attr-defined]
        self._in_order = overfits and not isinstance(loader.sampler, SequentialSampler)

    @property
    def _n_batches(self) -> int:
        """Batches of an epoch that Lightning will ask for; it reckons with a fraction of ``len`` on its own."""
        limit = self.trainer.limit_train_batches
        return min(len(self), limit) if isinstance(limit, int) else int(len(self) * limit)

    def __len__(self) -> int:
        return -(-len(self.loader) // self.ranks.size)

    def __iter__(self) -> Iterator[Any]:
        # random numbers are drawn as and when the loader itself draws them, so that the order of the data is the same; but
        # first Lightning asks for an iterator only to see whether there is one, as it does not of a DataLoader
        if not self._tried or self._resumed is not None:
            self._tried = True
            return self._deliver(self._begin)
        seed = self._draw_seed()
        if self.num_workers == 0:
            return self._deliver(lambda: self._begin(seed))
        epoch = self._begin(seed)
        return self._deliver(lambda: epoch)

    def _draw_seed(self) -> int:
        """Workers of the run are seeded as those of the loader itself would be, which draws once for all that outlive an epoch."""
        if self.loader.persistent_workers and self._epoch is not None:
            return self._epoch.seed
        generator = self.loader.generator or torch.default_generator
        self._seeds.set_state(generator.get_state())
        return int(torch.empty((), dtype=torch.int64).random_(generator=generator))

    def _deliver(self, begin: Callable[[], _Epoch]) -> Iterator[Any]:
        resumes = self._resumed is not None
        epoch = self._epoch = begin()
        if resumes:
            self._seeds.manual_seed(epoch.seed)
        while epoch.delivered < self._n_batches and (epoch.kept or epoch.drawn):
            if not epoch.kept:
                self._decide(epoch)
            self._due[:] = epoch.kept[: self._n_batches - epoch.delivered]
            for batch in self._due_batches():
                epoch.kept.pop(0)
                epoch.delivered += 1
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where each process stands in its epoch, and the random numbers by which the next ones are drawn."""
        inside = self._epoch is not None and self._epoch.delivered < self._n_batches
        epoch = asdict(self._epoch) if self._epoch is not None and inside else None
        generator = self.loader.generator
        return {"epochs": self.ranks.gather(epoch), "generator": None if generator is None else generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a `state_dict`; with another number of processes, from the beginning of the epoch."""
        epochs = state_dict["epochs"]
        epoch = epochs[self.ranks.rank] if len(epochs) == self.ranks.size else None
        self._resumed = None if epoch is None else _Epoch(**epoch)
        if self.loader.generator is not None and state_dict["generator"] is not None:
            self.loader.generator.set_state(state_dict["generator"])

    def _begin(self, seed: int | None = None) -> _Epoch:
        """An epoch from its beginning, or from where it was resumed."""
        resumed, self._resumed = self._resumed, None
        if resumed is not None:
            return resumed
        seed = self._draw_seed() if seed is None else seed
        passes = [self._draw()]
        if self.ranks.size > 1 and passes[0]:
            # processes need further passes at different times, so all that may be needed are agreed on beforehand
            passes += [self._draw() for _ in range(self._most_passes(len(passes[0][0])) - 1)]
        first, *further = [self._own(drawn) for drawn in self.ranks.first(passes)]
        return _Epoch(len(first[0]) if first else 0, seed, first, further)

    def _own(self, drawn: list[list[int]]) -> list[list[int]]:
        """This process's batches among those that were drawn."""
        padded = drawn + drawn[: -len(drawn) % self.ranks.size]
        return padded[self.ranks.rank :: self.ranks.size][: self._n_batches]

    def _decide(self, epoch: _Epoch) -> None:
        """One selection round."""
        length = self._round(len(epoch.drawn))
        batches = self._select(epoch.drawn, length)
        epoch.drawn = epoch.drawn[length:]
        if self.settings.rebatch:
            epoch.waiting += [z for batch in batches for z in batch]
            size = epoch.size
            batches = [epoch.waiting[i : i + size] for i in range(0, len(epoch.waiting) - size + 1, size)]
            epoch.waiting = epoch.waiting[len(batches) * size :]
            epoch.drawn = epoch.drawn or (epoch.further.pop(0) if self.ranks.size > 1 else self._own(self._draw()))
        epoch.kept = batches

    def _most_passes(self, size: int) -> int:
        """Passes that fill the epoch even if every batch keeps no more than its floor."""
        if not self.settings.rebatch:
            return 1
        return 2 + -(-size // max(1, round(self.settings.floor * size)))

    def _draw(self) -> list[list[int]]:
        loader, sampler = self.loader, self.loader.batch_sampler
        assert sampler is not None
        if self._in_order:  # as Lightning takes the batches to overfit
            assert loader.batch_size is not None and isinstance(loader.dataset, Sized)
            sampler = BatchSampler(SequentialSampler(loader.dataset), loader.batch_size, loader.drop_last)
        asked = min(len(loader), self._n_batches * self.ranks.size)
        ahead = loader.num_workers * (loader.prefetch_factor or 0)
        # workers may run past the end of a sampler, which draws random numbers there; without them nobody does
        past_the_end = ahead > 0 and asked + ahead > len(loader)
        return [[int(z) for z in batch] for batch in islice(sampler, None if past_the_end else asked + ahead)]

    def _round(self, available: int) -> int:
        """Batches that the next round decides about."""
        every = self.settings.every
        return available if every == "epoch" else min(available, int(every) * self.trainer.accumulate_grad_batches)

    def _select(self, drawn: list[list[int]], length: int) -> list[list[int]]:
        """The first ``length`` batches without what the policy removes."""
        ahead = drawn[: length + self.settings.horizon * self.trainer.accumulate_grad_batches]
        sample_ids = torch.tensor([z for batch in drawn[:length] for z in batch])
        batches = torch.tensor([i for i, batch in enumerate(drawn[:length]) for _ in batch])
        left = torch.ones(len(sample_ids), dtype=torch.bool)
        scores = torch.zeros(len(sample_ids))
        for policy in self.settings.portions:
            batches_kept = [sample_ids[left & (batches == i)].tolist() for i in range(length)]
            scores[left] = self._scores([*batches_kept, *ahead[length:]], length).to(scores)
            left = self.selector.decide(policy, scores, sample_ids, batches, left) > 0
        self.selector.note(self.trainer, sample_ids, scores, left.float())
        return [sample_ids[left & (batches == i)].tolist() for i in range(length)]

    def _scores(self, batches: list[list[int]], length: int) -> Tensor:
        per_step = self.trainer.accumulate_grad_batches
        with random_state(None):
            candidates = self._candidates(batches)
            steps = [candidates[i : i + per_step] for i in range(0, len(candidates), per_step)]
            return torch.cat(self._scorer(self.trainer, steps, -(-length // per_step)))

    def _candidates(self, batches: list[list[int]]) -> list[Candidates]:
        drawn = [torch.tensor(ids) for ids in batches]
        if not self._scorer.reads_batches:
            return [Candidates(None, ids) for ids in drawn]
        task = as_task(self.trainer.lightning_module)
        seeds = self._seeds.clone_state()  # so that what is scored is what is delivered, if it is kept
        with task.unchanged(), Apart(self.loader)():
            fetched = [task.prepared(batch) for batch in self._fetch(batches, seeds)]
        order = self._row_order
        return [
            Candidates(b, ids, None if order is None else order(b, ids)) for b, ids in zip(fetched, drawn, strict=True)
        ]

    def _due_batches(self) -> Iterable[Any]:
        if not self.loader.persistent_workers:
            return self._fetch(self.batch_sampler, self._seeds)
        if self._delivers is None:
            self._delivers = self._fetch(self.batch_sampler, self._seeds, persistent=True)
        return self._delivers

    def _fetch(
        self, batches: Sequence[list[int]] | RecordedBatchSampler, seeds: torch.Generator, *, persistent: bool = False
    ) -> DataLoader[Any]:
        """The collated batches, by the wrapped loader's own workers and collate function."""
        loader = self.loader
        workers = loader.num_workers if persistent else min(loader.num_workers, len(batches))
        return DataLoader(
            loader.dataset,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            worker_init_fn=loader.worker_init_fn,
            generator=seeds,
            multiprocessing_context=loader.multiprocessing_context if workers else None,
            prefetch_factor=loader.prefetch_factor if workers else None,
            persistent_workers=persistent,
        )
