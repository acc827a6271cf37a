"""What the commands are given, checked before the work begins: files, a model at its checkpoint, its data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pandas as pd
import torch

from lightning_influence.errors import ConfigurationError, InfluenceError
from lightning_influence.log.format import MANIFEST
from lightning_influence.log.logged_snapshots import LoggedSnapshots
from lightning_influence.log.place import place_of
from lightning_influence.log.steps import LoggedSteps
from lightning_influence.replay.logged_plan import LoggedPlan
from lightning_influence.report.tokens import TokenScores
from lightning_influence.run.data import TrainingData
from lightning_influence.run.lightning_names import either

if TYPE_CHECKING:
    from lightning import LightningDataModule as LightningDataModule
    from lightning import LightningModule as LightningModule
else:  # a command takes those of both packages
    LightningDataModule, LightningModule = either("LightningDataModule"), either("LightningModule")

Ids: TypeAlias = "list[int] | Path | None"
"""Sample ids, or a file of them, one per line; what follows a comma in a line is passed over, and so is a heading."""


def prepared(data: LightningDataModule) -> TrainingData:
    """The data of a datamodule, which is set up here and once."""
    data.prepare_data()
    return TrainingData.of(data)


def queries_of(data: TrainingData) -> list[Any]:
    """The batches of a datamodule's validation loader."""
    return list(data.datamodule.val_dataloader())


def require(**values: object) -> None:
    """Refuse an option that has no value.

    Raises:
        ConfigurationError: naming those that have none.
    """
    missing = " and ".join(f"--{name}" for name, value in values.items() if value is None)
    if missing:
        raise ConfigurationError(f"{missing} missing; name them, or give a file with --config.")


def ids_in(samples: Ids) -> list[int] | None:
    """The ids that `Ids` stands for.

    Raises:
        ConfigurationError: a file that cannot be read, or that holds something else.
    """
    if not isinstance(samples, Path):
        return samples
    first, *rest = [line.split(",")[0].strip() for line in _read("samples", samples).splitlines() if line.strip()] or [
        ""
    ]
    ids = rest if not first.isdecimal() else [first, *rest]
    wrong = [text for text in ids if not text.isdecimal()]
    if wrong or not ids:
        content = f"holds {wrong[0]!r:.40}" if wrong else "holds no id"
        raise ConfigurationError(
            f"--samples {samples} {content}; give a file with a sample id at the start of each line."
        )
    return [int(text) for text in ids]


def groups_in(path: Path | None) -> Mapping[str, list[int]] | Sequence[str | None] | None:
    """Groups as `attribute` takes them, from a file: a label per sample, one per line, an empty one for none; or JSON that maps
    names to sample ids.

    Raises:
        ConfigurationError: a file that cannot be read.
    """
    if path is None:
        return None
    text = _read("groups", path)
    if not text.lstrip().startswith("{"):
        return [line.strip() or None for line in text.splitlines()]
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigurationError(
            f"--groups {path} is not JSON that maps names to sample ids ({error}); or give a label per sample, one per line."
        ) from error


def tokens_in(path: Path | None) -> TokenScores | None:
    """Scores of tokens, from a file that the command ``tokens`` wrote.

    Raises:
        ConfigurationError: a file that cannot be read, or that holds something else.
    """
    if path is None:
        return None
    text = _read("tokens", path)
    try:
        return TokenScores.from_pandas(pd.read_csv(StringIO(text)))
    except (ValueError, ConfigurationError) as error:
        raise ConfigurationError(
            f"--tokens {path} cannot be used ({error}); give what the command tokens wrote."
        ) from error


def tokenizer_of(name: str) -> Any:
    """A Hugging Face tokenizer.

    Raises:
        ConfigurationError: transformers is not installed.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ConfigurationError(
            '--tokenizer needs transformers; pip install "lightning-influence[transformers]"'
        ) from error
    return AutoTokenizer.from_pretrained(name)


def _read(option: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"--{option} {path} cannot be read ({error}); give the path of a text file."
        ) from error


def trained(
    model: LightningModule | None, data: LightningDataModule | None, checkpoint: Path | None, log: str
) -> tuple[LightningModule, TrainingData]:
    """The module at its checkpoint, or without one at the end of a run that can be replayed, and its data."""
    require(model=model, data=data)
    assert model is not None and data is not None
    state = _end_of(log, model) if checkpoint is None else _weights(checkpoint)
    source = log if checkpoint is None else checkpoint
    try:
        model.load_state_dict(state, strict=checkpoint is not None)  # a log leaves out what does not train
    except (AttributeError, RuntimeError) as error:  # names that are no text, values that do not fit
        raise InfluenceError(
            f"{source} does not fit {type(model).__name__}; give the model the arguments it was trained with. {error}"
        ) from error
    return model, prepared(data)


def _end_of(log: str, model: LightningModule) -> Mapping[str, Any]:
    """Parameters and buffers at the end of a run, from its log.

    Raises:
        ConfigurationError: the log does not hold them.
    """
    if place_of(log).file(MANIFEST).exists():
        steps = LoggedSteps(log)
        if steps.end is not None and len(steps) in LoggedSnapshots(steps.reader).steps:
            end = LoggedPlan(steps, model).snapshot(len(steps))
            return {**end.parameters, **end.buffers}
    raise ConfigurationError(
        f"--checkpoint missing, and {log} does not hold the parameters of the run's end; name the checkpoint, or give a file with "
        "--config that does."
    )


def _weights(checkpoint: Path) -> Mapping[str, Any]:
    """The state dict of a checkpoint; nothing that the file holds is run."""
    wanted = "give what trainer.save_checkpoint wrote, or torch.save({'state_dict': model.state_dict()}, path)."
    try:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InfluenceError(
            f"{checkpoint} cannot be read ({error.strerror}); give the path of a checkpoint."
        ) from error
    except Exception as error:  # whatever a damaged file makes of the reader
        _, _, refused = str(error).partition("Unsupported global: GLOBAL ")
        why = f"holds a {refused.split()[0]}" if refused else "is damaged or something else"
        raise InfluenceError(
            f"{checkpoint} {why}, and of a checkpoint tensors and plain values alone are read; {wanted}"
        ) from error
    state = saved.get("state_dict") if isinstance(saved, Mapping) else None
    if not isinstance(state, Mapping):
        held = ", ".join(map(str, list(saved)[:5])) if isinstance(saved, Mapping) else type(saved).__name__
        raise InfluenceError(f"{checkpoint} holds no 'state_dict' ({held or 'nothing'}); {wanted}")
    return state
