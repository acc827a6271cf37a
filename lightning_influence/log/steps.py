"""The trajectory log: what is written of each step, and a logged run as a `Trajectory`.

`store` knows how tensors lie on disk; this module knows what they mean. Tensor names in a step's shard:
``sample_ids``, ``loss_weights``, ``micro_batches``, ``gradient/<parameter>``, ``moment/<k>/<parameter>`` (every few
steps; in between they follow from the gradients), ``parameter/<parameter>`` (coupled weight decay only),
``share/<parameter>/<part>`` and, where the loss was one over classes, ``dynamics/<column>`` (`losses.Dynamics`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_influence.core.coordinates import Coordinates, pack_coordinates, unpack_coordinates
from lightning_influence.core.optimizers import UPDATES, Moments, coupling, effective_gradient
from lightning_influence.core.removal import consumed_gradients
from lightning_influence.core.shares import Form, Layout, Stack, pack, unpack
from lightning_influence.core.trajectory import Clip, Hyper, Shares, StepRecord, Vectors
from lightning_influence.errors import CurvatureUnavailable, LogError
from lightning_influence.log.end import End
from lightning_influence.log.format import FINAL as FINAL
from lightning_influence.log.format import decoding, expect
from lightning_influence.log.manifest import Manifest
from lightning_influence.log.reader import StoreReader
from lightning_influence.run.losses import Dynamics, joined
from lightning_influence.run.moment import Moment

LAYOUT = "layout"
MOMENTS_EVERY = 8  # steps

_LARGEST = 1e30  # hyperparameter, which single precision holds
_MOST_MEMBERS = 2**26  # samples of a step times its micro-batches, of which there is a table
_CLIP_RULES = ("none", "norm", "value")

Packed = tuple[dict[str, Tensor], dict[str, Any]]


def pack_step(record: StepRecord, shares: Mapping[str, Shares], *, state: bool, norm: bool = False) -> Packed:
    """Tensors and metadata of one step, as `LoggedTrajectory` reads them back.

    Args:
        state: also gradients, moments and hyperparameters, which are the same on every rank.
        norm: also the clipping without them, of a rank that holds a part of the gradient.
    """
    tensors = {
        "sample_ids": record.sample_ids,
        "loss_weights": record.loss_weights,
        "micro_batches": record.micro_batch_numbers,
    }
    forms = {}
    for name, share in shares.items():
        parts, layout = pack(share)
        forms[name] = layout.to_json()
        tensors |= {f"share/{name}/{key}": value.cpu() for key, value in parts.items()}
    meta: dict[str, Any] = {"shares": forms, "averaged": record.averaged}
    if state or norm:
        meta["clip"] = asdict(record.clip)
    if state:
        tensors |= _pack_state(record)
        meta |= _pack_hyper(record.hyper)
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


def pack_dynamics(dynamics: Dynamics | None) -> dict[str, Tensor]:
    """Tensors of the training dynamics of a step's samples; none where they are not known."""
    return {} if dynamics is None else {f"dynamics/{name}": t for name, t in dynamics.columns().items()}


def pack_layout(keeps: Mapping[str, Coordinates], optimizer: str) -> Packed:
    """The artifact that says which coordinates of which parameters a log holds."""
    tensors: dict[str, Tensor] = {}
    forms: dict[str, Any] = {}
    for name, keep in keeps.items():
        parts, forms[name] = pack_coordinates(keep)
        tensors |= {f"{name}/{key}": value for key, value in parts.items()}
    return tensors, {"parameters": forms, "optimizer": optimizer}


class LoggedSteps:
    """The steps of a log: everything of them except per-sample gradients.

    Args:
        log: directory written by `InfluenceCallback`, or a reader that has opened it.

    Attributes:
        manifest: what the log is of.
        end: how the run ended; None where it did not.

    Raises:
        LogError: not a log, or a log without a complete step.
        LogCorrupted: what it holds is not what a recorder writes; also raised by every method that reads.
    """

    def __init__(self, log: str | Path | StoreReader) -> None:
        self.reader = log if isinstance(log, StoreReader) else StoreReader(log)
        self._log = log = self.reader.path
        self.manifest = Manifest.of(self.reader)
        with decoding(f"the end of {log}"):
            self.end = End.of(self.reader, self.manifest.shapes)
        if len(self.reader) == 0:
            raise LogError(
                f"the log {log} holds no complete step; let the run take at least one optimizer step with "
                "InfluenceCallback before attributing."
            )
        self._records: dict[int, StepRecord] = {}

    @classmethod
    def of(cls, log: str | Path | LoggedSteps) -> LoggedSteps:
        """Of a directory, or steps that are open already."""
        return log if isinstance(log, LoggedSteps) else cls(log)

    def __len__(self) -> int:
        return len(self.reader)

    def record(self, index: int) -> StepRecord:
        """The step's record; its moments are empty where the log holds no gradients."""
        if index not in self._records:
            start = index // MOMENTS_EVERY * MOMENTS_EVERY
            steps = range(start, min(start + MOMENTS_EVERY, len(self)))
            with decoding(f"one of the steps {steps[0]} to {steps[-1]} of {self._log}"):
                self._records = self._with_moments(steps)
        return self._records[index]

    @property
    def holds_batches(self) -> bool:
        """Whether the log holds the batches of its first step, as it then does of the others."""
        with decoding(f"step 0 of {self._log}"):
            return all("structure" in m for m in self.reader.meta(0)["micro_batches"])

    def moments_of(self, index: int) -> list[Moment | None]:
        """What the training step of each micro-batch read besides its batch, over all ranks; None where nothing was noted."""
        with decoding(f"step {index} of {self._log}"):
            record = self._stored(index)
            noted = [m for rank in range(self.reader.ranks) for m in self.reader.meta(index, rank)["micro_batches"]]
            moments = [
                Moment(
                    int(m["batch_idx"]),
                    int(m["epoch"]),
                    int(m["global_step"]),
                    tuple(map(str, m["in_eval"])),
                    dict(m.get("numbers", {})),
                    tuple(map(float, m.get("rates", ()))),
                    dict(m.get("trainer", {})),
                )
                for m in noted
            ]
            expect(len(moments) in (0, len(record.micro_batch_numbers.unique())), "moments of other micro-batches")
        return [*moments] or [None] * len(record.micro_batch_numbers.unique())

    def drawn(self, index: int) -> list[tuple[int, ...] | None]:
        """The samples that each micro-batch was collated from, over all ranks; None where that is one for each of its rows."""
        with decoding(f"step {index} of {self._log}"):
            record = self._stored(index)
            noted = [m for rank in range(self.reader.ranks) for m in self.reader.meta(index, rank)["micro_batches"]]
            drawn = [tuple(map(int, m["drawn"])) if m.get("drawn") else None for m in noted]
        return drawn or [None] * len(record.micro_batch_numbers.unique())

    @property
    def rows_assumed(self) -> bool:
        """Whether it was taken for granted, somewhere in the run, that rows are in the order in which their samples were drawn."""
        with decoding(f"the last step of {self._log}"):
            last = [self.reader.meta(len(self) - 1, rank)["micro_batches"] for rank in range(self.reader.ranks)]
            return any(m.get("rows") == "assumed" for noted in last for m in noted)

    def sample_ids(self, index: int) -> Tensor:
        """Samples ``(n,)`` that a step consumed."""
        with decoding(f"step {index} of {self._log}"):
            return self._samples(index)[0]

    def dynamics(self, index: int) -> tuple[Tensor, Dynamics] | None:
        """Ids and training dynamics of the step's samples; None where some of them have none."""
        with decoding(f"step {index} of {self._log}"):
            parts = [self._dynamics(index, rank) for rank in range(self.reader.ranks)]
            dynamics = joined(parts)
            return None if dynamics is None else (self._samples(index)[0], dynamics)

    def _dynamics(self, index: int, rank: int) -> Dynamics | None:
        prefix, stored = "dynamics/", self.reader.names(index, rank)
        names = [name for name in stored if name.startswith(prefix)]
        if not names:
            return None
        dynamics = Dynamics(**{name.removeprefix(prefix): self.reader.tensor(index, name, rank) for name in names})
        _check_dynamics(dynamics, len(self.reader.tensor(index, "sample_ids", rank)))
        return dynamics

    def _with_moments(self, steps: range) -> dict[int, StepRecord]:
        """Consecutive records, their moments read where they are stored and followed from there."""
        apply = UPDATES[self.manifest.update].apply
        records, moments = {}, dict[str, Moments]()
        for index in steps:
            record, stored = self._stored(index), set(self.reader.names(index))
            _check_record(record)
            moments |= {k: m for k in record.gradients if (m := self._moments(index, k, stored)) is not None}
            records[index] = replace(record, moments={k: moments[k] for k in record.gradients})
            _check_moments(records[index])
            for k, gradient in consumed_gradients(record).items():
                effective = effective_gradient(gradient, (record.parameters or {}).get(k), record.hyper[k])
                moments[k] = apply(moments[k], effective, record.hyper[k])[1]
        return records

    def _stored(self, index: int) -> StepRecord:
        meta = self.reader.meta(index)
        ids, weights, numbers = self._samples(index)
        hyper = {name: meta["hyper"][i] for name, i in meta["hyper_of"].items()}
        stored = set(self.reader.names(index))
        return StepRecord(
            index=index,
            sample_ids=ids,
            loss_weights=weights,
            micro_batch_numbers=numbers,
            gradients={name: self._state(index, f"gradient/{name}") for name in hyper if f"gradient/{name}" in stored},
            moments={},
            hyper=hyper,
            averaged=meta["averaged"],
            clip=self._clip(index),
            parameters=self._parameters(index, stored) or None,
        )

    def _clip(self, index: int) -> Clip:
        """How a step was clipped; where every process held a part of the gradient, each measured the norm of its own."""
        metas = (self.reader.meta(index, rank) for rank in range(self.reader.ranks))
        clips = [Clip(**meta["clip"]) for meta in metas if "clip" in meta]
        return replace(clips[0], raw_norm=math.hypot(*(clip.raw_norm for clip in clips)))

    def _state(self, index: int, name: str) -> Tensor:
        return self.reader.tensor(index, name)

    def _moments(self, index: int, name: str, stored: set[str]) -> Moments | None:
        """Those before the step; None where they are not stored."""
        keys = [f"moment/{i}/{name}" for i in range(len(UPDATES[self.manifest.update].moments))]
        return tuple(self._state(index, key) for key in keys) if stored.issuperset(keys) else None

    def _parameters(self, index: int, stored: set[str]) -> Vectors:
        prefix = "parameter/"
        return {key[len(prefix) :]: self._state(index, key) for key in stored if key.startswith(prefix)}

    def _samples(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Sample ids, loss weights and micro-batch numbers of all ranks, numbers made distinct."""
        parts, offset = [], 0
        for rank in range(self.reader.ranks):
            keys = ("sample_ids", "loss_weights", "micro_batches")
            ids, weights, numbers = (self.reader.tensor(index, key, rank) for key in keys)
            _check_samples(ids, weights, numbers)
            parts.append((ids, weights, numbers + offset))
            offset += int(numbers.max()) + 1 if len(numbers) else 0
        ids, weights, numbers = (torch.cat(column) for column in zip(*parts, strict=True))
        return ids, weights, numbers


class LoggedTrajectory(LoggedSteps):
    """A run read back from its log, a `Trajectory`. Needs neither model nor data.

    Args:
        log: as of `LoggedSteps`.

    Raises:
        LogError: not a log, a log without a complete step, or one without per-sample gradients.
    """

    def __init__(self, log: str | Path | StoreReader) -> None:
        super().__init__(log)
        log = self.reader.path
        if LAYOUT not in self.reader.artifacts() or self.manifest.record == "replay":
            raise LogError(
                f"the log {log} holds no per-sample gradients, because it was recorded with record='replay'; attribute it "
                "with its model and data, or record with record='gradients' or 'both'."
            )
        with decoding(f"the layout of {log}"):
            layout = self.reader.artifact_meta(LAYOUT)
            self.optimizer: str = layout["optimizer"]
            self.keeps = {
                name: unpack_coordinates(form, self._layout_tensor(name)) for name, form in layout["parameters"].items()
            }
            self.sizes = {name: (keep.size, keep.total) for name, keep in self.keeps.items()}
            _check_layout(self.optimizer, self.keeps, self.manifest.shapes)

    def _layout_tensor(self, name: str) -> Callable[[str], Tensor]:
        return lambda key: self.reader.artifact(LAYOUT, f"{name}/{key}")

    def _stored(self, index: int) -> StepRecord:
        record = super()._stored(index)
        expect(all(g.shape == (self.sizes[k][0],) for k, g in record.gradients.items()), "gradients of another size")
        expect(record.gradients.keys() == self.reader.meta(index)["shares"].keys(), "gradients of other parameters")
        return record

    @property
    def starts(self) -> Sequence[int]:
        return range(0, len(self), MOMENTS_EVERY)

    def shares(self, index: int) -> Mapping[str, Shares]:
        with decoding(f"step {index} of {self._log}"):
            return _LazyShares(self.reader, index, self.sizes)

    def select(self, name: str, values: Tensor) -> Tensor:
        return self.keeps[name].select(values)

    def curvature_product(self, index: int, kind: str, vectors: Vectors) -> Vectors:
        raise CurvatureUnavailable(
            f"curvature={kind!r} needs the model and its data at every step, and this log holds gradients only; "
            "record with InfluenceCallback(record='replay') or use curvature='fisher'."
        )


class _LazyShares(Mapping[str, Shares]):
    """A step's shares, each parameter read from disk when first asked for."""

    def __init__(self, reader: StoreReader, index: int, sizes: Mapping[str, tuple[int, int]]) -> None:
        self._reader, self._index, self._sizes = reader, index, sizes
        self._forms = [reader.meta(index, rank)["shares"] for rank in range(reader.ranks)]
        self._read: dict[str, Shares] = {}

    def __getitem__(self, name: str) -> Shares:
        if name not in self._read:
            of_ranks = [forms[name] for forms in self._forms]
            with decoding(f"the share of {name} in step {self._index}"):
                parts = [self._unpack(name, rank, Layout.from_json(form)) for rank, form in enumerate(of_ranks)]
            self._read[name] = parts[0] if len(parts) == 1 else Stack(parts)
        return self._read[name]

    def _unpack(self, name: str, rank: int, layout: Layout) -> Form:
        read = dict[str, Tensor]()

        def load(key: str) -> Tensor:
            read[key] = self._reader.tensor(self._index, f"share/{name}/{key}", rank)
            return read[key]

        share = unpack(layout, load)
        _check_types_of_share(read)
        samples = len(self._reader.tensor(self._index, "sample_ids", rank))
        expect((share.n_samples, share.n_coordinates) == (samples, self._sizes[name][0]), "a share of another size")
        return share

    def __iter__(self) -> Iterator[str]:
        return iter(self._forms[0])

    def __len__(self) -> int:
        return len(self._forms[0])


# -- what a recorder never writes -----------------------------------------------------------------------------


def _check_layout(optimizer: str, keeps: Mapping[str, Coordinates], shapes: Mapping[str, Any]) -> None:
    expect(optimizer in UPDATES, "an unknown update")
    expect(bool(keeps), "no parameters")
    for name, keep in keeps.items():
        index = keep.index
        expect(list(keep.shape) == list(shapes[name]), "a parameter of another shape")
        expect(
            index is None
            or (index.dtype == torch.int64 and index.dim() == 1 and bool(((index >= 0) & (index < keep.total)).all())),
            "an impossible mask",
        )


def _check_types_of_share(tensors: Mapping[str, Tensor]) -> None:
    """What is multiplied together is of one type: the tensors of a form, but for the places of rows."""
    types: dict[str, set[torch.dtype]] = {}
    for key, tensor in tensors.items():
        part, _, field = key.rpartition("/")
        if field == "rows":
            expect(tensor.dtype == torch.int64, "places that are no whole numbers")
        else:
            expect(tensor.is_floating_point(), "a share that is no numbers")
            types.setdefault(part, set()).add(tensor.dtype)
    expect(all(len(kinds) == 1 for kinds in types.values()), "a share of several types")


def _check_samples(ids: Tensor, weights: Tensor, numbers: Tensor) -> None:
    columns = (ids, weights, numbers)
    expect([c.dtype for c in columns] == [torch.int64, torch.float64, torch.int64], "samples of another type")
    expect(all(c.dim() == 1 and len(c) == len(ids) for c in columns), "samples of another shape")
    expect(bool(weights.isfinite().all()), "weights that are no numbers")
    if len(numbers):
        parts = int(numbers.max()) + 1
        expect(int(numbers.min()) >= 0 and parts <= len(numbers), "micro-batches without samples")
        expect(parts * len(numbers) <= _MOST_MEMBERS, "too many micro-batches")


def _check_record(record: StepRecord) -> None:
    numbers = [v for hyper in record.hyper.values() for v in hyper.values()]
    expect(all(isinstance(v, float | int) and abs(v) <= _LARGEST for v in numbers), "no numbers")
    betas = [v for hyper in record.hyper.values() for k, v in hyper.items() if k.startswith("beta")]
    expect(all(0 <= beta < 1 for beta in betas), "decay rates that are none")
    expect(all(hyper["step"] >= 1 for hyper in record.hyper.values()), "a step before the first")
    expect(record.clip.rule in _CLIP_RULES, "an unknown clipping rule")
    expect(isinstance(record.clip.bound + record.clip.raw_norm, float | int), "a clipping of no numbers")
    for k, gradient in record.gradients.items():
        expect(gradient.dim() == 1 and gradient.is_floating_point(), "a gradient of another type")
        parameter = (record.parameters or {}).get(k, gradient)
        expect(parameter.shape == gradient.shape, "a parameter of another shape")


def _check_dynamics(dynamics: Dynamics, samples: int) -> None:
    *columns, classes = dynamics.columns().values()
    kinds = [torch.float32, torch.float32, torch.float32, torch.int64, torch.int64]
    expect([c.dtype for c in columns] == kinds and classes.dtype == torch.float16, "dynamics of another type")
    expect(all(c.shape == (samples,) for c in columns), "dynamics of another number of samples")
    expect(classes.dim() == 2 and len(classes) == samples, "log-probabilities of another shape")
    for labels in (dynamics.labels, dynamics.others):
        expect(bool((labels >= -1).all()), "an impossible label")
        expect(not classes.shape[1] or bool((labels < classes.shape[1]).all()), "a label beyond the classes")


def _check_moments(record: StepRecord) -> None:
    for k, moments in record.moments.items():
        gradient = record.gradients[k]
        expect(all(m.shape == gradient.shape for m in moments), "moments of another shape")
        expect(all(m.dtype == gradient.dtype for m in moments), "moments of another type")
