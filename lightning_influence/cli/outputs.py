"""What the commands write and print."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import lightning
import torch
from torch import nn

from lightning_influence.errors import ConfigurationError
from lightning_influence.report.tables import write_csv

if TYPE_CHECKING:
    import pandas as pd


def check_writable(name: str, path: Path | None) -> None:
    """Said before the work rather than after it; nothing of a file that is not asked for."""
    if path is None:
        return
    if not path.absolute().parent.is_dir():
        raise ConfigurationError(f"--{name} {path}: there is no directory {path.absolute().parent}; create it first.")
    if path.is_dir():
        raise ConfigurationError(f"--{name} {path} is a directory; give the path of a file.")


def write_table(table: pd.DataFrame, path: Path | None) -> None:
    """Write a table as CSV, where a file is asked for, and say so."""
    if path is not None:
        write_csv(table, path)
        print(f"wrote {path}")


def write_ids(sample_ids: Iterable[int], path: Path) -> None:
    """Write sample ids as `inputs.Ids` reads them, one per line."""
    path.write_text("".join(f"{z}\n" for z in sample_ids))


def write_weights(module: nn.Module, path: Path) -> None:
    """Write a module's state as ``--checkpoint`` and ``load_from_checkpoint`` read it."""
    torch.save({"state_dict": module.state_dict(), "pytorch-lightning_version": lightning.__version__}, path)


def printable(text: str) -> str:
    """What a file says, without the codes that would steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
