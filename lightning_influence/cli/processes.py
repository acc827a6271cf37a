"""The processes that ``torchrun`` has started, as a Fabric."""

from __future__ import annotations

import os

from lightning import Fabric
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment


def launched() -> Fabric | None:
    """A Fabric over the processes that torchrun started, or None where it started none."""
    if not TorchElasticEnvironment.detect():
        return None
    processes, local = (int(os.environ[name]) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    fabric = Fabric(accelerator="auto", devices=local, num_nodes=processes // local, strategy="ddp")
    fabric.launch()
    return fabric
