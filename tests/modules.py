"""Small Lightning modules and real data for the tests."""

from __future__ import annotations

import functools
import io
import multiprocessing
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence.log.format import FINAL
from lightning_influence.log.reader import StoreReader
from lightning_influence.log.writer import StoreWriter

OptimizerFactory = Callable[[L.LightningModule], Any]


@functools.cache
def _load_digits() -> Any:
    return load_digits(return_X_y=True)  # read from a file of text


def digits(n: int | None = None, dtype: torch.dtype = torch.float32) -> TensorDataset:
    """scikit-learn's 8 x 8 digits, pixels in [0, 1]."""
    x, y = _load_digits()
    return TensorDataset(torch.tensor(x[:n] / 16, dtype=dtype), torch.tensor(y[:n]))


def split_digits(n_train: int, n_val: int, dtype: torch.dtype = torch.float32) -> tuple[TensorDataset, TensorDataset]:
    whole = digits(n_train + n_val, dtype).tensors
    return TensorDataset(*(t[:n_train] for t in whole)), TensorDataset(*(t[n_train:] for t in whole))


def two_groups(module: L.LightningModule) -> Any:
    """Two parameter groups and a cosine schedule."""
    first, *rest = module.parameters()
    optimizer = torch.optim.AdamW(
        [{"params": [first], "lr": 3e-3, "weight_decay": 0.3}, {"params": rest, "lr": 1e-3, "weight_decay": 0.0}]
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Classifier(L.LightningModule):
    """A GELU network under cross-entropy."""

    def __init__(
        self,
        optimizer: OptimizerFactory = lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3),
        width: int = 16,
        activation: type[torch.nn.Module] = torch.nn.GELU,
        net: torch.nn.Module | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = net or torch.nn.Sequential(
                torch.nn.Linear(64, width),
                activation(),
                torch.nn.Linear(width, width),
                activation(),
                torch.nn.Linear(width, 10),
            )
        self.make_optimizer = optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = torch.nn.functional.cross_entropy(self.net(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", torch.nn.functional.cross_entropy(self.net(x), y))

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self)


def fit(
    module: L.LightningModule,
    loader: Any,
    *callbacks: L.Callback,
    val: Any = None,
    ckpt_path: Any = None,
    **options: Any,
) -> L.Trainer:
    """A quiet deterministic fit on the CPU."""
    defaults: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(callbacks=list(callbacks), **(defaults | options))
    trainer.fit(module, loader, val, ckpt_path=ckpt_path)
    return trainer


def trainer_under(strategy: Any) -> L.Trainer:
    """A trainer on the CPU that says that it uses a strategy, also one that Lightning accepts beside a GPU only."""
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False)
    trainer._accelerator_connector.strategy = strategy
    return trainer


def loader(data: TensorDataset, batch_size: int = 16, seed: int = 0, **options: Any) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(data, batch_size, shuffle=True, generator=generator, **options)


def hooks_of(module: torch.nn.Module) -> int:
    """Hooks of any kind on a module, its layers and parameters."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    on_layers = sum(len(getattr(layer, kind)) for layer in module.modules() for kind in kinds)
    on_parameters = sum(
        len(p._backward_hooks or ()) + len(getattr(p, "_post_accumulate_grad_hooks", None) or ())
        for p in module.parameters()
    )
    return on_layers + on_parameters


class Forked:
    """A process that begins with everything imported, which takes a new one seconds, and what it prints."""

    def __init__(self, work: Callable[..., object], *args: object) -> None:
        fork = multiprocessing.get_context("fork")
        self._told, end = fork.Pipe(duplex=False)
        self._process = fork.Process(target=self._run, args=(end, work, *args))
        self._process.start()
        end.close()

    @staticmethod
    def _run(end: Connection, work: Callable[..., object], *args: object) -> None:
        out, err = io.StringIO(), io.StringIO()
        try:
            with redirect_stdout(out), redirect_stderr(err):
                work(*args)
        finally:
            end.send((out.getvalue(), err.getvalue()))

    def wait(self) -> tuple[int | None, str, str]:
        """The exit code, and what went to stdout and to stderr."""
        out, err = self._told.recv()
        self._process.join()
        return self._process.exitcode, out, err


def forged(log: Path, where: Path, forge: Callable[[str, dict[str, Any], dict[str, Any]], object]) -> Path:
    """The log written anew, so that its checksums agree, with what ``forge`` makes of the content."""
    reader = StoreReader(log)
    with StoreWriter(where) as writer:
        manifest = dict(reader.manifest)
        forge("manifest", {}, manifest)
        writer.write_manifest(manifest)
        for name in reader.artifacts():
            tensors = {k: reader.artifact(name, k) for k in reader.artifact_names(name)}
            meta = reader.artifact_meta(name)
            if name != FINAL:
                forge(name, tensors, meta)
                writer.save(name, tensors, meta)
        for step in range(len(reader)):
            tensors, meta = {k: reader.tensor(step, k) for k in reader.names(step)}, reader.meta(step)
            forge("step", tensors, meta)
            writer.append(step, tensors, meta)
        tensors, meta = {}, reader.artifact_meta(FINAL)
        forge(FINAL, tensors, meta)
        writer.save(FINAL, tensors, meta)
    return where
