"""The trajectory log: what is written of each step, and a logged run as a `Trajectory`.

`store` knows how tensors lie on disk; this module knows what they mean. Tensor names in a step's shard:
``sample_ids``, ``loss_weights``, ``micro_batches``, ``gradient/<parameter>``, ``moment/<k>/<parameter>`` (every few
steps; in between they follow from the gradients), ``parameter/<parameter>`` (coupled weight decay only) and
``share/<parameter>/<part>``.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_influence.compression import Form, Keep, Stack, pack, pack_keep, unpack, unpack_keep
from lightning_influence.errors import CurvatureUnavailable, LogError
from lightning_influence.optimizers import UPDATES, Moments, coupling, effective_gradient
from lightning_influence.removal import consumed_gradients
from lightning_influence.store import FINAL as FINAL
from lightning_influence.store import StoreReader
from lightning_influence.trajectory import Clip, Hyper, Shares, StepRecord, Vectors

LAYOUT = "layout"
MOMENTS_EVERY = 8  # steps

Packed = tuple[dict[str, Tensor], dict[str, Any]]


def pack_step(record: StepRecord, shares: Mapping[str, Shares], *, state: bool) -> Packed:
    """Tensors and metadata of one step, as `LoggedTrajectory` reads them back.

    Args:
        state: also gradients, moments and hyperparameters, which are the same on every rank.
    """
    tensors = {
        "sample_ids": record.sample_ids,
        "loss_weights": record.loss_weights,
        "micro_batches": record.micro_batches,
    }
    forms = {}
    for name, share in shares.items():
        parts, forms[name] = pack(share)
        tensors |= {f"share/{name}/{key}": value.cpu() for key, value in parts.items()}
    meta: dict[str, Any] = {"shares": forms, "averaged": record.averaged}
    if state:
        tensors |= _pack_state(record)
        meta |= {"clip": asdict(record.clip), **_pack_hyper(record.hyper)}
    return tensors, meta


def _pack_state(record: StepRecord) -> dict[str, Tensor]:
    tensors = {f"gradient/{name}": g for name, g in record.gradients.items()}
    for name, moments in record.moments.items():
        tensors |= {f"moment/{i}/{name}": moment for i, moment in enumerate(moments)}
    for name, parameter in (record.parameters or {}).items():
        if coupling(record.hyper[name]):
            tensors[f"parameter/{name}"] = parameter
    return tensors


def _pack_hyper(hyper: Mapping[str, Hyper]) -> dict[str, Any]:
    """Hyperparameters, each distinct set written once."""
    distinct: list[dict[str, float]] = []
    of = {}
    for name, values in hyper.items():
        if dict(values) not in distinct:
            distinct.append(dict(values))
        of[name] = distinct.index(dict(values))
    return {"hyper": distinct, "hyper_of": of}


def pack_layout(keeps: Mapping[str, Keep], optimizer: str) -> Packed:
    """The artifact that says which coordinates of which parameters a log holds."""
    tensors: dict[str, Tensor] = {}
    forms: dict[str, Any] = {}
    for name, keep in keeps.items():
        parts, forms[name] = pack_keep(keep)
        tensors |= {f"{name}/{key}": value for key, value in parts.items()}
    return tensors, {"parameters": forms, "optimizer": optimizer}


def checksum(parameter: Tensor) -> int:
    """CRC32 of a parameter's bytes, by which a log knows the model it ended with."""
    return zlib.crc32(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)


class LoggedSteps:
    """The steps of a log: everything of them except per-sample gradients.

    Raises:
        LogError: not a log, or a log without a complete step.
    """

    def __init__(self, log: str | Path) -> None:
        self.reader = StoreReader(log)
        if len(self.reader) == 0:
            raise LogError(
                f"the log {log} holds no complete step; let the run take at least one optimizer step with "
                "InfluenceCallback before attributing."
            )
        self._records: dict[int, StepRecord] = {}

    def __len__(self) -> int:
        return len(self.reader)

    def record(self, index: int) -> StepRecord:
        """The step's record; its moments are empty where the log holds no gradients."""
        if index not in self._records:
            start = index // MOMENTS_EVERY * MOMENTS_EVERY
            self._records = self._with_moments(range(start, min(start + MOMENTS_EVERY, len(self))))
        return self._records[index]

    def _with_moments(self, steps: range) -> dict[int, StepRecord]:
        """Consecutive records, their moments read where they are stored and followed from there."""
        apply = UPDATES[self.reader.manifest["update"]].apply
        found, now = {}, dict[str, Moments]()
        for index in steps:
            record, stored = self._stored(index), set(self.reader.names(index))
            now |= {k: m for k in record.gradients if (m := self._moments(index, k, stored)) is not None}
            found[index] = replace(record, moments={k: now[k] for k in record.gradients})
            for k, gradient in consumed_gradients(record).items():
                effective = effective_gradient(gradient, (record.parameters or {}).get(k), record.hyper[k])
                now[k] = apply(now[k], effective, record.hyper[k])[1]
        return found

    def _stored(self, index: int) -> StepRecord:
        meta = self.reader.meta(index)
        ids, weights, micro_batches = self._samples(index)
        hyper = {name: meta["hyper"][i] for name, i in meta["hyper_of"].items()}
        stored = set(self.reader.names(index))
        return StepRecord(
            index=index,
            sample_ids=ids,
            loss_weights=weights,
            micro_batches=micro_batches,
            gradients={name: self._state(index, f"gradient/{name}") for name in hyper if f"gradient/{name}" in stored},
            moments={},
            hyper=hyper,
            averaged=meta["averaged"],
            clip=Clip(**meta["clip"]),
            parameters=self._parameters(index, stored) or None,
        )

    def _state(self, index: int, name: str) -> Tensor:
        return self.reader.tensor(index, name)

    def _moments(self, index: int, name: str, stored: set[str]) -> Moments | None:
        """Those before the step; None where they are not stored."""
        keys = [f"moment/{i}/{name}" for i in range(len(UPDATES[self.reader.manifest["update"]].moments))]
        return tuple(self._state(index, key) for key in keys) if stored.issuperset(keys) else None

    def _parameters(self, index: int, stored: set[str]) -> Vectors:
        prefix = "parameter/"
        return {key[len(prefix) :]: self._state(index, key) for key in stored if key.startswith(prefix)}

    def _samples(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Sample ids, loss weights and micro-batch numbers of all ranks, numbers made distinct."""
        parts, offset = [], 0
        for rank in range(self.reader.ranks):
            numbers = self.reader.tensor(index, "micro_batches", rank) + offset
            offset = int(numbers.max()) + 1 if len(numbers) else offset
            ids, weights = (self.reader.tensor(index, key, rank) for key in ("sample_ids", "loss_weights"))
            parts.append((ids, weights, numbers))
        ids, weights, numbers = (torch.cat(column) for column in zip(*parts, strict=True))
        return ids, weights, numbers


class LoggedTrajectory(LoggedSteps):
    """A run read back from its log, a `Trajectory`. Needs neither model nor data.

    Args:
        log: directory written by `InfluenceCallback`.

    Raises:
        LogError: not a log, a log without a complete step, or one without per-sample gradients.
    """

    def __init__(self, log: str | Path) -> None:
        super().__init__(log)
        if LAYOUT not in self.reader.artifacts():
            raise LogError(
                f"the log {log} holds no per-sample gradients, because it was recorded with record='replay'; attribute it "
                "with its model and data, or record with record='gradients' or 'both'."
            )
        layout = self.reader.artifact_meta(LAYOUT)
        self.optimizer: str = layout["optimizer"]
        self.keeps = {name: unpack_keep(form, self._layout_tensor(name)) for name, form in layout["parameters"].items()}
        self.sizes = {name: (keep.size, keep.total) for name, keep in self.keeps.items()}

    def _layout_tensor(self, name: str) -> Callable[[str], Tensor]:
        return lambda key: self.reader.artifact(LAYOUT, f"{name}/{key}")

    def shares(self, index: int) -> Mapping[str, Shares]:
        return _LazyShares(self.reader, index)

    def select(self, name: str, values: Tensor) -> Tensor:
        return self.keeps[name].select(values)

    def curvature_product(self, index: int, kind: str, vectors: Vectors) -> Vectors:
        raise CurvatureUnavailable(
            f"curvature={kind!r} needs the model and its data at every step, and this log holds gradients only; "
            "record with InfluenceCallback(record='replay') or use curvature='fisher'."
        )


class _LazyShares(Mapping[str, Shares]):
    """A step's shares, each parameter read from disk when first asked for."""

    def __init__(self, reader: StoreReader, index: int) -> None:
        self._reader, self._index = reader, index
        self._forms = [reader.meta(index, rank)["shares"] for rank in range(reader.ranks)]
        self._read: dict[str, Shares] = {}

    def __getitem__(self, name: str) -> Shares:
        if name not in self._read:
            parts = [self._unpack(name, rank, forms[name]) for rank, forms in enumerate(self._forms)]
            self._read[name] = parts[0] if len(parts) == 1 else Stack(parts)
        return self._read[name]

    def _unpack(self, name: str, rank: int, form: dict[str, Any]) -> Form:
        return unpack(form, lambda key: self._reader.tensor(self._index, f"share/{name}/{key}", rank))

    def __iter__(self) -> Iterator[str]:
        return iter(self._forms[0])

    def __len__(self) -> int:
        return len(self._forms[0])
