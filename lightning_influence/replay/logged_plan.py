"""What a log holds so that its run can be run again: written during training, read as a `replay.Plan`.

In a step's shard: ``random/<m>/<generator>`` before each micro-batch's training step, and either the batch,
``batch/<m>/<leaf>``, or ``fetch/<m>/<generator>``, the random state when its samples were fetched, and
``fingerprint/<m>`` of what came. Every few steps an artifact ``snapshot-<step>``: ``parameter/<name>``, ``moment/<k>/<name>``, ``buffer/<name>``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_influence.core.optimizers import UPDATES
from lightning_influence.errors import ConfigurationError, CurvatureUnavailable, ReplayDrift
from lightning_influence.log.format import decoding, expect
from lightning_influence.log.logged_snapshots import LoggedSnapshots
from lightning_influence.log.reader import StoreReader
from lightning_influence.log.steps import LoggedSteps
from lightning_influence.replay.plan import PlannedMicroBatch, PlannedStep, State
from lightning_influence.run.batches import fingerprint, unpack_batch
from lightning_influence.run.data import TrainingData
from lightning_influence.run.random_state import random_state
from lightning_influence.run.task import as_task

_SAME = 1e-4  # relative difference of two fingerprints of one batch

# -- reading -----------------------------------------------------------------------------------------------


class LoggedPlan:
    """A logged run as a `replay.Plan`.

    Args:
        steps: the log.
        model: a `Task`, or the `LightningModule` that was trained, which prepares the data.
        data: the training data, where batches were not stored: a `LightningDataModule`, a `DataLoader`, or a
            dataset whose samples the default collate function takes.

    Raises:
        CurvatureUnavailable: the log was not recorded for replay.
    """

    def __init__(self, steps: LoggedSteps, model: Any, data: Any = None) -> None:
        self._steps, self._reader, self._task = steps, steps.reader, as_task(model)
        self._snapshots = LoggedSnapshots(self._reader)
        self.snapshots = self._snapshots.steps
        if 0 not in self.snapshots or steps.manifest.record == "gradients":
            raise CurvatureUnavailable(
                "this log cannot be replayed, because it was recorded with record='gradients'; record with "
                "InfluenceCallback(record='replay' or 'both'), or use curvature='fisher'."
            )
        self.optimizer = steps.manifest.update
        self.versions = steps.manifest.versions  # of the packages that the run had
        self._data = TrainingData.of(data)
        self._first_in: dict[str, int] = {}  # the first snapshot that holds a parameter: before it, it did not train
        for start in reversed(self.snapshots):
            names = self._snapshots.names(start)
            self._first_in |= {k.removeprefix("parameter/"): start for k in names if k.startswith("parameter/")}

    def __len__(self) -> int:
        return len(self._reader)

    def sample_ids(self, index: int) -> Tensor:
        return self._steps.sample_ids(index)

    def step(self, index: int) -> PlannedStep:
        record = self._steps.record(index)
        with decoding(f"step {index}"):
            recorded = [
                (rank, number, entry)
                for rank in range(self._reader.ranks)
                for number, entry in enumerate(self._reader.meta(index, rank)["micro_batches"])
            ]
            positions = [record.micro_batch_numbers == position for position in range(len(recorded))]
            expect(all(bool(own.any()) for own in positions), "a micro-batch without samples")
            expect(sum(int(own.sum()) for own in positions) == len(record.sample_ids), "samples of no micro-batch")
            weights = [record.loss_weights[own] for own in positions]
            factors = [float(w.sum() if record.averaged else w[0]) for w in weights]
        micro_batches = []
        moments = self._steps.moments_of(index)
        for (rank, number, entry), moment, own, factor in zip(recorded, moments, positions, factors, strict=True):
            assert moment is not None
            read = _Read(self._reader, index, rank)
            ids = entry.get("drawn") or record.sample_ids[own].tolist()
            batch = self._batch(read, number, entry, ids)
            less = self._less(read, number, entry, ids)
            random = read.generators(f"random/{number}/")
            with decoding(f"the random state of step {index}"):
                _try_random_state(random)
            micro_batches.append(PlannedMicroBatch(batch, moment, factor, int(own.sum()), random, less))
        return PlannedStep(
            micro_batches,
            record.sample_ids,
            record.loss_weights,
            record.micro_batch_numbers,
            record.hyper,
            record.clip,
            record.averaged,
        )

    def snapshot(self, index: int) -> State:
        device = self._task.device
        tensors: dict[str, dict[str, Tensor]] = {"parameter": {}, "buffer": {}}
        moments: dict[str, dict[int, Tensor]] = {}
        with decoding(f"the snapshot before step {index}"):
            for name in self._snapshots.names(index):
                kind, rest = name.split("/", 1)
                tensor = self._snapshots.tensor(index, name).to(device)
                if kind == "moment":
                    order, parameter = rest.split("/", 1)
                    moments.setdefault(parameter, {})[int(order)] = tensor
                else:
                    tensors[kind][rest] = tensor
        late = {k: start for k, start in self._first_in.items() if k not in tensors["parameter"]}
        for k, start in late.items():
            tensors["parameter"][k] = self._snapshots.tensor(start, f"parameter/{k}").to(device)
            moments[k] = {
                i: torch.zeros_like(tensors["parameter"][k]) for i in range(len(UPDATES[self.optimizer].moments))
            }
        ordered = {
            k: tuple(_unrounded(m, p) for _, m in sorted(moments.get(k, {}).items()))
            for k, p in tensors["parameter"].items()
        }
        state = State(tensors["parameter"], ordered, tensors["buffer"])
        with decoding(f"the snapshot before step {index}"):
            self._check(state)
        return state

    def _check(self, state: State) -> None:
        """A snapshot holds what the module has, in its shapes."""
        buffers = dict(self._task.module.named_buffers())
        self._check_parameters(state.parameters)
        n_moments = len(UPDATES[self.optimizer].moments)
        for k, p in state.parameters.items():
            alike = all(m.shape == p.shape and m.dtype == p.dtype for m in state.moments[k])
            expect(alike and len(state.moments[k]) == n_moments, f"moments of {k} that are none")
        for k, b in state.buffers.items():
            expect(b.dtype.is_floating_point == buffers[k].dtype.is_floating_point, f"{k} of another type")

    def _check_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        own = dict(self._task.module.named_parameters())
        for k, p in parameters.items():
            expect(p.shape == own[k].shape and p.is_floating_point(), f"{k} of another shape or type")

    def parameters(self, index: int) -> dict[str, Tensor]:
        kind = "parameter/"
        with decoding(f"the snapshot before step {index}"):
            held = [n.removeprefix(kind) for n in self._snapshots.names(index) if n.startswith(kind)]
            starts = {k: index if k in held else start for k, start in self._first_in.items()}
            parameters = {k: self._snapshots.tensor(s, kind + k).to(self._task.device) for k, s in starts.items()}
            self._check_parameters(parameters)
            return parameters

    def _batch(self, read: _Read, number: int, entry: dict[str, Any], ids: list[int]) -> Any:
        if "structure" in entry:
            with decoding(f"a batch of step {read.index}"):
                batch = unpack_batch(entry["structure"], lambda key: read.tensor(f"batch/{number}/{key}"))
            return self._task.to_device(batch)
        if self._data.dataset is None:
            raise ConfigurationError(
                "the log holds sample ids but not the batches; give attribute(..., data=...) the training data, or record "
                "with InfluenceCallback(store_batches=True)."
            )
        batch = self._collated(read, number, ids)
        recorded, computed = read.tensor(f"fingerprint/{number}"), fingerprint(batch)
        if recorded.shape != computed.shape or not torch.allclose(computed, recorded, rtol=_SAME, atol=_SAME):
            raise ReplayDrift(
                f"step {read.index}: data gives another batch for samples {ids[:4]}... than the run saw. Give the same "
                "data, transforms and collate function; augmentation in loader workers cannot be repeated, so record that "
                "with InfluenceCallback(store_batches=True)."
            )
        return batch

    def _less(
        self, read: _Read, number: int, entry: dict[str, Any], ids: list[int]
    ) -> Callable[[frozenset[int]], Any] | None:
        """The batch without some samples, where it is not the batch without their rows."""
        if entry.get("recollated"):
            return lambda gone: self._collated(read, number, ids, gone)
        structures = entry.get("less")
        if not structures:
            return None

        def stored(gone: frozenset[int]) -> Any:
            own = gone.intersection(ids)
            if len(own) > 1:
                raise ConfigurationError(
                    f"step {read.index} relates its samples (a graph), and of its batch the log holds what is left without one "
                    f"sample, not without the {len(own)} that a group has in it. Record with "
                    "InfluenceCallback(store_batches=False), so that batches are collated from the data, or leave groups out."
                )
            (z,) = own
            with decoding(f"a batch of step {read.index}"):
                batch = unpack_batch(structures[str(z)], lambda key: read.tensor(f"less/{number}/{z}/{key}"))
            return self._task.to_device(batch)

        return stored

    def _collated(self, read: _Read, number: int, ids: list[int], gone: Collection[int] = ()) -> Any:
        with random_state(read.generators(f"fetch/{number}/") or None):
            batch = self._data.batch(ids, gone)
        precision = self._steps.manifest.precision
        return self._task.prepared(batch, datamodule=self._data.datamodule, precision=precision)


def _try_random_state(state: Mapping[str, Tensor]) -> None:
    try:
        with random_state(state):
            pass
    except RuntimeError as error:  # torch's word for a state that is none
        raise ValueError(str(error)) from error


@dataclass(frozen=True)
class _Read:
    """One process's part of a step."""

    reader: StoreReader
    index: int
    rank: int

    def tensor(self, name: str) -> Tensor:
        return self.reader.tensor(self.index, name, self.rank)

    def generators(self, prefix: str) -> dict[str, Tensor]:
        names = [name for name in self.reader.names(self.index, self.rank) if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.tensor(name) for name in names}


def _unrounded(moment: Tensor, p: Tensor) -> Tensor:
    """A moment that was rounded to bfloat16 for its snapshot, in the type of its parameter again."""
    return moment.to(p.dtype) if moment.dtype == torch.bfloat16 else moment
