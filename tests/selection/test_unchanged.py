"""Nothing reachable from a module is changed by reading the target, looking ahead, or trying a step beforehand."""

from __future__ import annotations

import copy
import random
from collections import Counter, deque
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torchmetrics
from modules import digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceCallback, SelectionDataModule
from lightning_influence.run.unchanged import unchanged

BATCH = 8


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(64, 16), nn.GELU(), nn.Linear(16, 10))
        self.keep_state()

    def keep_state(self) -> None:
        """Of what this module holds besides."""

    def note(self, x: Tensor, y: Tensor, logits: Tensor) -> None:
        """Change it."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.net(x)
        self.note(x, y, logits.detach())
        return nn.functional.cross_entropy(logits, y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.net.parameters() if p.requires_grad], lr=1e-2)

    def held(self) -> Any:
        """What has to be as in a run without selection."""
        return {k: v for k, v in vars(self).items() if k in vars(type(self)).get("HELD", ())}


class Metrics(Net):
    HELD = ("seen",)

    def keep_state(self) -> None:
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=10)
        self.all = torchmetrics.CatMetric()
        self.unregistered = [torchmetrics.MeanMetric()]

    def note(self, x: Tensor, y: Tensor, logits: Tensor) -> None:
        self.accuracy.update(logits, y)
        self.all.update(logits.sum(1))
        self.unregistered[0].update(logits.mean())

    def held(self) -> Any:
        metrics = (self.accuracy, self.all, *self.unregistered)
        return [(m.metric_state, m._update_count) for m in metrics]


class Counters(Net):
    HELD = ("steps", "name", "average", "history", "classes", "recent", "table", "ids")

    def keep_state(self) -> None:
        self.steps, self.name, self.average = 0, "0", None
        self.history: list[Any] = []
        self.classes = Counter[int]()
        self.recent: deque[float] = deque(maxlen=3)
        self.table: dict[str, Any] = {"inner": {"sum": torch.zeros(10)}}
        self.ids: set[int] = set()

    def note(self, x: Tensor, y: Tensor, logits: Tensor) -> None:
        self.steps += 1
        self.name = str(self.steps)
        self.average = logits.mean(0) if self.average is None else 0.9 * self.average + 0.1 * logits.mean(0)
        self.history.append(float(logits.mean()))
        self.classes.update(y.tolist())
        self.recent.append(float(logits.sum()))
        self.table["inner"]["sum"] += logits.sum(0)
        self.table[f"step {self.steps}"] = y
        self.ids.update(y.tolist())


class Meter:
    __slots__ = ("n", "sums")

    def __init__(self) -> None:
        self.n, self.sums = 0, np.zeros(10)


class Stats:
    def __init__(self) -> None:
        self.meter, self.n = Meter(), 0


class Objects(Net):
    def keep_state(self) -> None:
        self.stats = Stats()

    def note(self, x: Tensor, y: Tensor, logits: Tensor) -> None:
        self.stats.n += 1
        self.stats.meter.n += len(y)
        self.stats.meter.sums += logits.sum(0).numpy()

    def held(self) -> Any:
        return self.stats.n, self.stats.meter.n, self.stats.meter.sums.tolist()


class Buffers(Net):
    """Statistics in buffers, and a teacher that follows the student."""

    def keep_state(self) -> None:
        self.register_buffer("mean", torch.zeros(64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.hidden = [copy.deepcopy(self.net).requires_grad_(False)]

    @torch.no_grad()
    def note(self, x: Tensor, y: Tensor, logits: Tensor) -> None:
        self.mean.lerp_(x.mean(0), 0.1)
        self.count = self.count + 1
        for teacher in (self.teacher, *self.hidden):
            for p, q in zip(teacher.parameters(), self.net.parameters(), strict=True):
                p.data.mul_(0.9).add_(q.data, alpha=0.1)

    def held(self) -> Any:
        return [self.mean, self.count, *self.teacher.parameters(), *self.hidden[0].parameters()]


class Generators(Net):
    """Generators of its own, which the loss does not read."""

    def keep_state(self) -> None:
        self.torch_s, self.numpy_s, self.python_s = torch.Generator(), np.random.default_rng(0), random.Random(0)
        self.old = np.random.RandomState(0)

    def note(self, x: Tensor, y: Tensor, logits: Tensor) -> None:
        torch.randn(3, generator=self.torch_s), self.numpy_s.random(), self.python_s.random(), self.old.rand()

    def held(self) -> Any:
        return self.torch_s.get_state(), self.numpy_s.bit_generator.state, self.python_s.getstate(), self.old.rand()


class Modes(Net):
    """A part in eval mode, whose dropout therefore draws nothing."""

    def keep_state(self) -> None:
        self.net.insert(1, nn.Sequential(nn.Dropout(0.5)).eval())
        self.net.insert(3, nn.Dropout(0.2))

    def held(self) -> Any:
        return [m.training for m in self.modules()]


class HooksThatCount(Net):
    """Hooks of a layer that count in the module, and one of the module's that prepares batches and counts."""

    def keep_state(self) -> None:
        self.calls = self.batches = 0
        self.net[0].register_forward_hook(lambda *_: self.count())

    def count(self) -> None:
        self.calls += 1

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.batches += 1
        return batch

    def held(self) -> Any:
        return self.calls, self.batches


class PreparesInPlace(Net):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch[0].mul_(2).sub_(1)
        return batch


class Gradients(Net):
    """A frozen part that keeps a gradient, and modules that others hold."""

    def keep_state(self) -> None:
        self.extra = nn.Parameter(torch.ones(3), requires_grad=False)

    @torch.no_grad()
    def note(self, x: Tensor, y: Tensor, logits: Tensor) -> None:
        self.extra.grad = torch.ones(3) if self.extra.grad is None else self.extra.grad.add_(1)
        self.extra.data.mul_(1.5)

    def held(self) -> Any:
        return self.extra, self.extra.grad


class OfTheClass(Net):
    """What it counts belongs to its class."""

    seen = 0
    history: list[float] = []  # noqa: RUF012

    def keep_state(self) -> None:
        type(self).seen = 0
        self.history.clear()
        if hasattr(type(self), "latest"):
            del type(self).latest

    def note(self, x: Tensor, y: Tensor, logits: Tensor) -> None:
        type(self).seen += 1
        self.history.append(float(logits.mean()))
        type(self).latest = getattr(type(self), "latest", 0) + float(x.mean())  # type: ignore[attr-defined]

    def held(self) -> Any:
        return self.seen, self.history, self.latest  # type: ignore[attr-defined]


TABLE = [Metrics, Counters, Objects, Buffers, Generators, Modes, HooksThatCount, PreparesInPlace, Gradients, OfTheClass]
RUNS: dict[str, dict[str, Any]] = {
    "inside the step": {"every": 1, "refresh_target_every": 4},
    "inside the step, target read at every step": {"every": 1, "refresh_target_every": 1},
    "rounds": {"every": "epoch"},
    "look-ahead": {"every": 2, "horizon": 1},
}


def loader(n: int = 24, start: int = 0) -> DataLoader[Any]:
    x, y = digits(n + start).tensors
    return DataLoader(TensorDataset(x[start:].clone(), y[start:]), BATCH)


class Data(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader(16, 40)


def train(kind: type[Net], data: Any, *callbacks: L.Callback) -> tuple[Net, Any]:
    torch.manual_seed(1)
    module = kind()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    end = Held()
    run = L.Trainer(accelerator="cpu", callbacks=[*callbacks, end], max_epochs=2, **quiet)
    run.fit(module, data)
    return module, end.held


class Held(L.Callback):
    """What the module holds at the end, and the random states there."""

    def on_train_end(self, run: L.Trainer, module: Any) -> None:
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        self.held = copy.deepcopy((module.held(), [m.training for m in module.modules()], states))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple, deque)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("kind", TABLE, ids=lambda kind: kind.__name__)
def test_what_a_module_holds_is_that_of_a_run_without(kind: type[Net], tmp_path: Path) -> None:
    plain, held = train(kind, Data())
    runs: dict[str, tuple[Any, list[L.Callback]]] = {
        name: (SelectionDataModule(Data(), keep=1.0, **options), []) for name, options in RUNS.items()
    }
    for record in ("gradients", "both"):
        runs[f"recorded as {record}"] = Data(), [InfluenceCallback(tmp_path / record, record=record, report=True)]  # type: ignore[arg-type]
    for name, (data, callbacks) in runs.items():
        module, now = train(kind, data, *callbacks)
        assert same(held, now), name
        assert same(plain.state_dict(), module.state_dict()), name


def test_attributes_of_the_datamodule_are_as_they_were() -> None:
    class Counting(Data):
        def __init__(self) -> None:
            super().__init__()
            self.prepared, self.scale = 0, torch.ones(())

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            self.prepared += 1
            self.scale = 0.5 * self.scale
            return batch

    plain = Counting()
    train(Net, plain)
    for name, options in RUNS.items():
        data = Counting()
        train(Net, SelectionDataModule(data, keep=1.0, **options))
        assert data.prepared == plain.prepared and torch.equal(data.scale, plain.scale), name


def test_what_was_added_is_gone_and_what_was_removed_is_back() -> None:
    module = Counters()
    module.table["first"] = 1
    kept, inner = module.average, module.table["inner"]
    with suppress(KeyError), unchanged(module):
        module.new, module.average = 1, torch.ones(3)  # type: ignore[assignment]
        module.extra = nn.Linear(2, 2)
        module.table.pop("first")
        module.table["inner"] = {}
        del module.history
        module.net[0].eval()
        raise KeyError
    assert not hasattr(module, "new") and not hasattr(module, "extra") and module.average is kept
    assert list(module.table) == ["inner", "first"] and module.table["inner"] is inner
    assert module.history == [] and all(m.training for m in module.modules())


def test_objects_of_libraries_are_left_alone() -> None:
    """They may have threads, files and connections."""
    import queue

    module = Net()
    module.queue = queue.Queue()  # type: ignore[assignment]
    with unchanged(module):
        module.queue.put(1)
    assert module.queue.qsize() == 1
