"""What the commands are given, checked before the work begins: paths, a model at its checkpoint, its data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_influence.errors import ConfigurationError, InfluenceError
from lightning_influence.run.data import TrainingData
from lightning_influence.run.lightning_names import either

if TYPE_CHECKING:
    from lightning import LightningDataModule as LightningDataModule
    from lightning import LightningModule as LightningModule
else:  # a command takes those of both packages
    LightningDataModule, LightningModule = either("LightningDataModule"), either("LightningModule")


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


def check_writable(name: str, path: Path) -> None:
    """Said before the work rather than after it."""
    if not path.absolute().parent.is_dir():
        raise ConfigurationError(f"--{name} {path}: there is no directory {path.absolute().parent}; create it first.")
    if path.is_dir():
        raise ConfigurationError(f"--{name} {path} is a directory; give the path of a file.")


def trained(
    model: LightningModule | None, data: LightningDataModule | None, checkpoint: Path | None
) -> tuple[LightningModule, TrainingData]:
    """The module at its checkpoint, and its data."""
    require(model=model, data=data, checkpoint=checkpoint)
    assert model is not None and data is not None and checkpoint is not None
    try:
        model.load_state_dict(_weights(checkpoint))
    except (AttributeError, RuntimeError) as error:  # names that are no text, values that do not fit
        raise InfluenceError(
            f"{checkpoint} does not fit {type(model).__name__}; give the model the arguments it was trained with. {error}"
        ) from error
    return model, prepared(data)


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
