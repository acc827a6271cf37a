"""What users are told where something cannot be followed: what was wrong, the cause that was found, and what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.utilities import CombinedLoader
from modules import Classifier, fit, loader, split_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lightning_influence import InfluenceCallback, SelectionDataModule, attribute, error_proxy
from lightning_influence.errors import ConfigurationError, CurvatureUnavailable, InfluenceError, ReplayDrift

TRAIN, VAL = split_digits(64, 8)
QUERIES = DataLoader(VAL, 4)
Run = Callable[[Path], object]


def record(module: L.LightningModule, path: Path, data: Any = None, **options: Any) -> L.LightningModule:
    options.setdefault("on_error", "raise")
    trainer = {k: options.pop(k) for k in ("precision", "callbacks", "max_epochs") if k in options}
    others = trainer.pop("callbacks", [])
    fit(module, loader(TRAIN) if data is None else data, InfluenceCallback(path, **options), *others, **trainer)
    return module


def replayed(path: Path, **options: Any) -> Any:
    module = record(Classifier(), path, record="replay")
    return attribute(path, **{"queries": QUERIES, "model": module, "progress": False, **options})


# -- queries -----------------------------------------------------------------------------------------------


class Data(L.LightningDataModule):
    def val_dataloader(self) -> Any:
        return QUERIES


@pytest.mark.parametrize(
    "queries", [Data(), VAL, Data().val_dataloader, [next(iter(QUERIES))]], ids=lambda q: type(q).__name__
)
def test_queries_in_every_form_are_taken(queries: Any, tmp_path: Path) -> None:
    assert replayed(tmp_path, queries=queries, target="mean").scores.isfinite().all()


ASKED: dict[str, tuple[dict[str, Any], str]] = {
    "one batch": ({"queries": next(iter(QUERIES))}, r"wrap it in a list: queries=\[batch\]"),
    "a string": ({"queries": "val"}, "give a loader, a list of batches"),
    "several loaders": ({"queries": [QUERIES, QUERIES]}, "join their datasets .*ConcatDataset"),
    "fewer samples than the run's": (
        {"data": TensorDataset(*(t[:10] for t in TRAIN.tensors))},
        "10 samples.*the log has sample",
    ),
}


@pytest.mark.parametrize("name", ASKED)
def test_what_cannot_be_asked(name: str, tmp_path: Path) -> None:
    options, told = ASKED[name]
    module = record(Classifier(), tmp_path, record="replay", store_batches=False if "data" in options else None)
    with pytest.raises(InfluenceError, match=told):
        attribute(tmp_path, **{"queries": QUERIES, "model": module, "progress": False, **options})


def test_a_model_without_weights(tmp_path: Path) -> None:
    record(Classifier(), tmp_path)
    with torch.device("meta"):
        model = Classifier()
    with pytest.raises(ConfigurationError, match="meta device.*[Ll]oad"):
        attribute(tmp_path, queries=QUERIES, model=model, progress=False)


# -- modules that a log of gradients cannot follow ---------------------------------------------------------


class Packed(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 10)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0].view(-1, 8, 8)
        lengths = 1 + torch.arange(len(x)) % 8
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return F.cross_entropy(self.out(self.rnn(packed)[1][0][0]), batch[1])


class BatchSecond(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0), nn.Linear(8, 10)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0].view(-1, 8, 8).transpose(0, 1)
        return F.cross_entropy(self.out(self.layer(x).mean(0)), batch[1])


class Remembers(Classifier):
    """A queue of what was seen before."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.ones(4, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z = self.net(batch[0])
        loss = F.cross_entropy(z, batch[1]) + 0.1 * (z @ self.queue.T).logsumexp(1).mean()
        self.queue = torch.cat([z.detach(), self.queue])[:4]
        return loss


class OwnClipping(Classifier):
    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        nn.utils.clip_grad_norm_(self.parameters(), 1e3)


class TwoSteps(Classifier):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure)
        optimizer.step()


class Thaws(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)


OWN = torch.Generator()


def one_row_less(samples: list[Any]) -> Any:
    """With noise that cannot be drawn again."""
    x, y = default_collate(samples)
    return x[1:] + torch.randn((), generator=OWN), y[1:]


BOTH = ("gradients", "replay")
REFUSED: dict[str, tuple[Run, str]] = {
    "packed sequences": (lambda p: record(Packed(), p, record="gradients"), r"LSTM.*packed sequence.*replay"),
    "the batch second": (
        lambda p: record(BatchSecond(), p, record="gradients"),
        "batch in its second dimension; build it with batch_first=True",
    ),
    "a collate function that drops rows": (
        lambda p: record(Classifier(), p, DataLoader(TRAIN, 8, collate_fn=one_row_less)),
        "a batch of 8 samples has 7 rows: the collate function drops, adds or joins rows.*sample_ids",
    ),
    "a queue": (lambda p: record(Remembers(), p, record="replay"), "the buffer queue keeps something of the samples"),
    "own clipping": (lambda p: record(OwnClipping(), p), "configure_gradient_clipping.*gradient_clip_val"),
    "two steps at once": (lambda p: record(TwoSteps(), p), "optimizer_step is overridden and steps twice"),
    "a callback that unfreezes": (
        lambda p: record(Classifier(), p, record="gradients", callbacks=[Thaws()], max_epochs=2),
        "Thaws.*net.0.weight.*exclude=",
    ),
    "two training loaders": (
        lambda p: record(Classifier(), p, CombinedLoader({"a": loader(TRAIN), "b": loader(TRAIN)})),
        "sample_ids=",
    ),
    "reentrant checkpointing": (
        lambda p: record(Reentrant(), p, record="replay"),
        "use_reentrant=False",
    ),
    "a parameter that no module owns": (
        lambda p: record(Astray(), p),
        r"a parameter of shape \(7,\) that Astray does not own.*Assign it to the module as an nn.Parameter",
    ),
    "a sparse embedding": (
        lambda p: record(Classifier(net=nn.Sequential(nn.Embedding(9, 4, sparse=True))), p),
        r"net.0 \(Embedding\) has sparse=True.*sparse=False",
    ),
    "a complex parameter": (lambda p: record(Turning(), p), r"turn is complex \(torch.complex64\).*view_as_complex"),
}


class Astray(Classifier):
    """The optimizer has a parameter that the module keeps in a plain list."""

    def configure_optimizers(self) -> Any:
        self.plain = [nn.Parameter(torch.zeros(7))]
        return torch.optim.AdamW([*self.parameters(), *self.plain])


class Turning(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.ones(1, dtype=torch.complex64))


class Bare(Classifier):
    """A parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * self.scale


class Functional(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1]) + self.net[0].weight.square().sum()


UNSELECTED: dict[str, tuple[Callable[[], L.LightningModule], list[L.Callback]]] = {
    "packed sequences": (Packed, []),
    "a parameter of its own": (Bare, []),
    "a weight outside its layer": (Functional, []),
    "a callback that unfreezes": (Classifier, [Thaws()]),
    "a reparametrized layer": (
        lambda: Classifier(net=nn.Sequential(nn.utils.weight_norm(nn.Linear(64, 8)), nn.Linear(8, 10))),
        [],
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", UNSELECTED)
def test_selection_inside_the_step_recommends_what_it_has(name: str) -> None:
    make, callbacks = UNSELECTED[name]
    with pytest.raises(ConfigurationError, match="select in rounds") as told:
        fit(make(), SelectionDataModule(loader(TRAIN), QUERIES, every=1), *callbacks, max_epochs=2)
    assert "record=" not in str(told.value)


class Reentrant(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        return F.cross_entropy(checkpoint(self.net, batch[0].requires_grad_(), use_reentrant=True), batch[1])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_a_run_that_is_refused_is_told_why(name: str, tmp_path: Path) -> None:
    run, told = REFUSED[name]
    with pytest.raises(ConfigurationError, match=re.compile(told, re.DOTALL)):
        run(tmp_path / "log")


# -- replay ------------------------------------------------------------------------------------------------


class Hooked(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net[0].weight.register_hook(lambda g: 0.5 * g)


class Halves(Classifier):
    def on_after_backward(self) -> None:
        for p in self.parameters():
            p.grad.mul_(0.5)


class ByList(Classifier):
    """The weight of a term is kept in a list that a hook writes."""

    def __init__(self) -> None:
        super().__init__()
        self.annealed = [0.0]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.annealed[0] = batch_idx

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (1 + self.annealed[0])


CALLS: list[int] = []  # which no module holds


class Restless(Classifier):
    """What a step gives depends on how often it was called."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        CALLS.append(0)
        return super().training_step(batch, batch_idx) * (1 + 0.1 * len(CALLS))


DRIFTS: dict[type[Classifier], str] = {
    Hooked: "A hook on net.0.weight changes its gradient",
    Halves: "Halves.on_after_backward is overridden",
    ByList: "attributes annealed",
    Restless: "replayed twice, gives two gradients of net",
}


@pytest.mark.parametrize("kind", DRIFTS, ids=lambda kind: kind.__name__)
def test_a_replay_that_drifts_names_what_it_found(kind: type[Classifier], tmp_path: Path) -> None:
    if kind is Halves:  # known while recording, of every run that is recorded
        with pytest.raises(ConfigurationError, match="on_after_backward"):
            record(kind(), tmp_path, record="replay")
        return
    module = record(kind(), tmp_path, record="replay", verify=False)
    with pytest.raises(ReplayDrift, match=rf"step \d: the replayed gradient has norm .* {DRIFTS[kind]}"):
        attribute(tmp_path, queries=QUERIES, model=module, progress=False)


# -- operations that lack a derivative -----------------------------------------------------------------------


class Aligned(Classifier):
    """A loss of torch that can be differentiated once."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        spread = self.net(x).log_softmax(1).expand(4, -1, -1)
        return F.ctc_loss(spread, 1 + y[:, None] % 9, torch.full_like(y, 4), torch.ones_like(y), zero_infinity=True)


class AlignedAndTaught(Aligned):
    """The same beside a loss that stops its gradient along one path, which only a second derivative follows."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        logits = self.net(batch[0])
        taught = (logits.softmax(1) - (2 * logits).softmax(1).detach()).square().sum(1).mean()
        return super().training_step(batch, batch_idx) + taught


class Squash(torch.autograd.Function):
    """An operation of a user's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (1 - ctx.saved_tensors[0].tanh().square())


class Squashed(Classifier):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(Squash.apply(self.net(batch[0])), batch[1])


class Penalised(Classifier):
    """A gradient with respect to the inputs is a part of the loss."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x = batch[0].clone().requires_grad_()
        losses = F.cross_entropy(self.net(x), batch[1], reduction="none")
        (slope,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
        return losses.mean() + 0.1 * slope.square().sum(1).mean()


def proxy(path: Path, **options: Any) -> Any:
    return error_proxy(path, pairs=2, **options)


@pytest.mark.parametrize(
    ("kind", "ask", "message"),
    [
        (
            Aligned,
            proxy,
            r"differentiated three times \(.*ctc_loss.*\); use curvature='fisher' with a log of gradients",
        ),
        (
            Aligned,
            partial(attribute, curvature="gauss_newton"),
            r"differentiated forwards \(.*ctc_loss.*\); use curvature='hessian'",
        ),
        (Squashed, partial(attribute, curvature="gauss_newton"), "differentiated forwards .*; use curvature='hessian'"),
        (Squashed, proxy, "differentiated three times .*; use curvature='fisher' with a log of gradients"),
        (AlignedAndTaught, attribute, r"differentiated twice \(.*ctc_loss.*\); use curvature='none'"),
        (Penalised, proxy, "differentiated three times .*; use curvature='fisher'"),
    ],
)
def test_an_operation_without_a_derivative_is_named_with_what_works(
    kind: type[Classifier], ask: Callable[..., Any], message: str, tmp_path: Path
) -> None:
    module = record(kind(), tmp_path, record="both" if kind is not Penalised else "replay")
    options: dict[str, Any] = {"queries": QUERIES, "model": module, "progress": False}
    with pytest.raises(CurvatureUnavailable, match=message):
        ask(tmp_path, **options)
    # what the message says to do
    instead = re.search("curvature='(.*?)'", message)
    assert instead is not None
    if kind is not Penalised:  # of which there are no gradients in the log
        options["curvature"] = instead[1]
        result = ask(tmp_path, **options) if ask is proxy else attribute(tmp_path, **options)
        assert result is not None
