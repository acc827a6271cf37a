"""What a log is of: the content of its manifest."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from lightning_influence.capture import GradientCapture
from lightning_influence.capture.step import StepOptions
from lightning_influence.core.optimizers import UPDATES
from lightning_influence.errors import LogCorrupted
from lightning_influence.log.reader import StoreReader
from lightning_influence.run.optimizer import trained_by, update_name
from lightning_influence.run.sharding import class_of

RECORDS = ("gradients", "replay", "both")
"""Ways of recording."""

LEFT_OUT = {"replay": "snapshots for replay", "gradients": "per-sample gradients"}
"""What a log lacks, in words, whose run was to be recorded in a way that turned out to be impossible."""

_PACKAGES = ("lightning-influence", "torch", "lightning", "safetensors", "transformers", "peft")
_LARGEST = 2**63


@dataclass(frozen=True)
class Recorded:
    """Numbers of coordinates.

    Attributes:
        trained: of the parameters that the optimizer moved.
        recorded: of those whose per-sample gradients a log can hold.
    """

    trained: int
    recorded: int

    def __post_init__(self) -> None:
        for name, n in asdict(self).items():
            _expect(type(n) is int and 0 <= n < _LARGEST, f"coverage: {name}", n)


@dataclass(frozen=True)
class Mask:
    """Which coordinates of a parameter are kept where a mask chooses them."""

    size: int
    seed: int

    def __post_init__(self) -> None:
        for name, n in asdict(self).items():
            _expect(type(n) is int, f"mask: {name}", n)


@dataclass(frozen=True)
class Manifest:
    """What a log is of.

    Attributes:
        module, optimizer: names of the classes.
        update: the optimizer's rule, a key of `UPDATES`.
        record: what was recorded, one of `RECORDS`.
        frozen_batch_norm: whether batch normalisation trained with its running statistics.
        parameters: how per-sample gradients of each parameter are had, for people to read.
        shapes: of every parameter of the module.
        excluded: patterns of parameters that were left out.
        compression, mask: how much was kept of per-sample gradients.
        reduction: of the training loss.
        precision: of the run, by Lightning's names.
        versions: of the packages that recorded.
        budget: bytes of a sample and step within which masks were chosen; None where they were not.
        run: an identity made when the run began, by which a log that was moved or copied is recognised as the same.

    Raises:
        ValueError: content of another type, or an unknown update or way of recording.
    """

    module: str
    optimizer: str
    update: str
    record: str
    frozen_batch_norm: bool
    parameters: Sequence[Mapping[str, Any]]
    shapes: Mapping[str, Sequence[int]]
    excluded: Sequence[str]
    coverage: Recorded
    compression: str
    mask: Mask
    reduction: str
    precision: str
    versions: Mapping[str, str] = field(default_factory=dict)
    budget: int | None = None
    run: str | None = None

    def __post_init__(self) -> None:
        for name in ("module", "optimizer", "update", "record", "compression", "reduction", "precision"):
            _expect(isinstance(getattr(self, name), str), name, getattr(self, name))
        _expect(self.update in UPDATES, "update", self.update)
        _expect(self.record in RECORDS, "record", self.record)
        _expect(isinstance(self.frozen_batch_norm, bool), "frozen_batch_norm", self.frozen_batch_norm)
        _expect(isinstance(self.parameters, Sequence), "parameters", self.parameters)
        _expect(isinstance(self.shapes, Mapping), "shapes", self.shapes)
        for name, shape in self.shapes.items():
            sizes = isinstance(shape, Sequence) and all(type(n) is int and 0 <= n < _LARGEST for n in shape)
            _expect(sizes, f"shapes: that of {name}", shape)
        texts = isinstance(self.excluded, Sequence) and all(isinstance(pattern, str) for pattern in self.excluded)
        _expect(texts and not isinstance(self.excluded, str), "excluded", self.excluded)
        _expect(isinstance(self.versions, Mapping), "versions", self.versions)
        _expect(self.budget is None or type(self.budget) is int, "budget", self.budget)
        _expect(self.run is None or isinstance(self.run, str), "run", self.run)

    @classmethod
    def of_run(
        cls,
        module: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        capture: GradientCapture | None,
        options: StepOptions,
        *,
        record: str,
        compression: str,
        mask: Mask,
        precision: str,
        budget: int | None = None,
    ) -> Manifest:
        """Of a run that is about to be recorded.

        Args:
            capture: of its per-sample gradients; None where they are not recorded.
        """
        trained = sum(p.numel() for p in trained_by(optimizer, module).values())
        return cls(
            module=f"{class_of(module).__module__}.{class_of(module).__qualname__}",
            optimizer=type(optimizer).__name__,
            update=update_name(optimizer),
            record=record,
            frozen_batch_norm=options.frozen_batch_norm,
            parameters=[] if capture is None else capture.table,
            shapes={k: list(p.shape) for k, p in module.named_parameters()},
            excluded=list(options.exclude),
            coverage=Recorded(
                trained, trained if capture is None else sum(p.numel() for p in capture.parameters.values())
            ),
            compression=compression,
            mask=mask,
            reduction=options.reduction,
            precision=precision,
            versions=_versions(),
            budget=budget,
        )

    def without_gradients(self) -> Manifest:
        """The same of a run whose per-sample gradients are not recorded after all; as `of_run` without a capture."""
        trained = self.coverage.trained
        return replace(self, record="replay", parameters=[], coverage=Recorded(trained, trained))

    @classmethod
    def of(cls, reader: StoreReader) -> Manifest:
        """Of a store.

        What a process has given up by itself, as its part of the log notes, is not recorded.

        Raises:
            LogCorrupted: it does not say what a manifest says.
        """
        manifest = cls._written(reader)
        if LEFT_OUT["gradients"] in reader.missing:
            manifest = manifest.without_gradients()
        if LEFT_OUT["replay"] in reader.missing:
            manifest = replace(manifest, record="gradients")
        return manifest

    @classmethod
    def _written(cls, reader: StoreReader) -> Manifest:
        content = reader.manifest
        try:
            own = {f.name: content[f.name] for f in fields(cls) if f.name not in ("run", "budget")}
            own |= {"coverage": Recorded(**own["coverage"]), "mask": Mask(**own["mask"])}
            return cls(**own, budget=content.get("budget"), run=content.get("run"))
        except (TypeError, ValueError) as error:
            raise LogCorrupted(
                f"the manifest of {reader.path} is not that of a run: {error!s:.200}. Restore the log from a copy, or give a "
                "directory that InfluenceCallback wrote."
            ) from error

    def to_json(self) -> dict[str, Any]:
        """As `StoreWriter.write_manifest` takes it."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def _expect(holds: bool, name: str, value: Any) -> None:
    if not holds:
        raise ValueError(f"{name} is {value!r:.100}")


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue  # an optional one
    return versions
