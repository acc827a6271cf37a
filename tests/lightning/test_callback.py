"""A Lightning run through the callback: what the log holds is what the optimizer consumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from modules import Classifier, digits, fit, forged, loader, split_digits, two_groups
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, IterableDataset

from lightning_influence import InfluenceCallback, attribute
from lightning_influence.core.removal import consumed_gradients
from lightning_influence.errors import ConfigurationError, InfluenceError, LogCorrupted, LogError, UnsupportedOptimizer
from lightning_influence.log.steps import FINAL, LoggedTrajectory
from lightning_influence.replay.logged_plan import LoggedPlan


class Witness(L.Callback):
    """What really happened, seen independently of the library: batches, parameters, consumed gradients."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.parameters: list[dict[str, torch.Tensor]] = []
        self.consumed: list[dict[str, torch.Tensor]] = []
        self._open: list[Any] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._open:
            self.parameters.append({k: p.detach().clone() for k, p in pl_module.named_parameters()})
            self._steps = trainer.global_step
        self._open.append(batch)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step > self._steps:
            self.consumed.append({k: p.grad.clone() for k, p in pl_module.named_parameters()})
            self.batches.append(self._open)
            self._open = []


TRAINERS = {
    "plain": {},
    "clipped": {"gradient_clip_val": 0.5},
    "clipped by value": {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
    "accumulated": {"accumulate_grad_batches": 2},
    "accumulated, clipped": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3},
    "float64": {"precision": "64-true"},
    "bf16": {"precision": "bf16-mixed"},
}


@pytest.mark.parametrize("name", TRAINERS)
def test_log_holds_what_the_optimizer_consumed(name: str, tmp_path: Path) -> None:
    options = TRAINERS[name]
    tolerance = 2e-2 if name == "bf16" else 1e-5
    module, witness = Classifier(two_groups), Witness()
    data = digits(200)
    fit(module, loader(data, 24), InfluenceCallback(tmp_path / "log"), witness, max_epochs=2, **options)
    run = LoggedTrajectory(tmp_path / "log")
    assert len(run) == len(witness.consumed) > 5
    for t in range(len(run)):
        record, shares = run.record(t), run.shares(t)
        ids = record.sample_ids
        seen = torch.cat([b[0] for b in witness.batches[t]]).float()
        assert torch.equal(digits(200).tensors[0][ids], seen), "sample ids are the dataset's indices"
        for k, consumed in consumed_gradients(record).items():
            reference = witness.consumed[t][k].flatten()
            assert (consumed - reference).norm() <= tolerance * reference.norm().clamp(min=1e-8)
            total = shares[k].combine(torch.ones(1, len(ids), dtype=record.gradients[k].dtype))[0]
            assert (total - record.gradients[k]).norm() <= tolerance * record.gradients[k].norm().clamp(min=1e-8)
    assert run.record(3).hyper["net.0.weight"]["weight_decay"] == 0.3
    assert run.record(3).hyper["net.0.bias"]["weight_decay"] == 0.0
    lrs = [run.record(t).hyper["net.0.weight"]["lr"] for t in range(len(run))]
    assert lrs == sorted(lrs, reverse=True) and lrs[0] == 3e-3 > lrs[-1]


def test_shares_are_the_per_sample_gradients(tmp_path: Path) -> None:
    module, witness = Classifier(), Witness()
    fit(module, loader(digits(100), 16), InfluenceCallback(tmp_path / "log"), witness, precision="64-true")
    run = LoggedTrajectory(tmp_path / "log")

    def loss(parameters: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(functional_call(module, parameters, (x[None],)), y[None])

    module.forward = module.net.forward  # type: ignore[method-assign]
    for t in range(len(run)):
        x, y = (torch.cat(column) for column in zip(*witness.batches[t], strict=True))
        parameters = {k: p.double() for k, p in witness.parameters[t].items()}
        reference = vmap(grad(loss), (None, 0, 0))(parameters, x.double(), y)
        for k, share in run.shares(t).items():
            torch.testing.assert_close(share.dense(), reference[k].flatten(1) / len(x), rtol=1e-8, atol=1e-10)


def test_training_is_bitwise_the_run_without_the_callback(tmp_path: Path) -> None:
    plain, logged = Classifier(two_groups), Classifier(two_groups)
    options = {"max_epochs": 2, "gradient_clip_val": 0.5}
    before = dict(logged.named_modules())
    L.seed_everything(1)
    fit(plain, DataLoader(digits(150), 16, shuffle=True), **options)
    L.seed_everything(1)
    data = DataLoader(digits(150), 16, shuffle=True)
    sampler = data.batch_sampler
    fit(logged, data, InfluenceCallback(tmp_path / "log"), **options)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), logged.parameters(), strict=True))
    assert data.batch_sampler is sampler
    assert dict(logged.named_modules()) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in logged.modules())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("persistent", [False, True])
def test_sample_ids_under_workers(workers: int, persistent: bool, tmp_path: Path) -> None:
    if persistent and not workers:
        pytest.skip("persistence is the workers'")
    data, witness = digits(70), Witness()
    batches = DataLoader(data, 16, shuffle=True, num_workers=workers, persistent_workers=persistent)
    fit(Classifier(), batches, InfluenceCallback(tmp_path / "log"), witness, max_epochs=3)
    run = LoggedTrajectory(tmp_path / "log")
    assert len(run) == 15 and len(run.record(4).sample_ids) == 70 - 4 * 16
    for t in range(15):
        assert torch.equal(data.tensors[0][run.record(t).sample_ids], witness.batches[t][0][0])


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        x, y = digits(48).tensors
        return iter({"x": x[i], "y": y[i], "id": 1000 + i} for i in range(48))


class Streaming(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step((batch["x"], batch["y"]), batch_idx)


def test_an_iterable_dataset_needs_ids(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="iterable dataset.*sample_ids"):
        fit(Streaming(), DataLoader(Stream(), 16), InfluenceCallback(tmp_path / "log"))
    for number, source in enumerate(["id", lambda batch: batch["id"]]):
        fit(Streaming(), DataLoader(Stream(), 16), InfluenceCallback(tmp_path / f"{number}", sample_ids=source))
        assert LoggedTrajectory(tmp_path / f"{number}").record(1).sample_ids.tolist() == list(range(1016, 1032))
    with pytest.raises(ConfigurationError, match="no such key, but .*'id'"):
        fit(Streaming(), DataLoader(Stream(), 16), InfluenceCallback(tmp_path / "key", sample_ids="index"))
    with pytest.raises(ConfigurationError, match="one integer per sample"):
        fit(Streaming(), DataLoader(Stream(), 16), InfluenceCallback(tmp_path / "x", sample_ids=lambda b: b["x"]))


class Manual(Classifier):
    automatic_optimization = False


class Poisoned(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if batch_idx == 3 else loss


class OwnClipping(Classifier):
    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        self.clip_gradients(optimizer, 0.01, "norm")


def two_optimizers(module: Classifier) -> Any:
    return [torch.optim.AdamW(module.net[0].parameters()), torch.optim.AdamW(module.net[2].parameters())]


def test_bad_runs_are_refused(tmp_path: Path) -> None:
    def run(module: Classifier) -> None:
        fit(module, loader(digits(100)), InfluenceCallback(tmp_path / "log", existing="overwrite", on_error="raise"))

    with pytest.raises(ConfigurationError, match="manual optimization"):
        run(Manual())
    with pytest.raises(UnsupportedOptimizer, match="RMSprop"):
        run(Classifier(lambda m: torch.optim.RMSprop(m.parameters())))
    with pytest.raises(ConfigurationError, match="configure_gradient_clipping"):
        run(OwnClipping())
    with pytest.raises(InfluenceError, match="step 3.*nan"):
        run(Poisoned())
    assert len(LoggedTrajectory(tmp_path / "log")) == 3, "the steps before the loss broke are kept"


def test_one_pattern_is_a_pattern(tmp_path: Path) -> None:
    fit(Classifier(), loader(digits(32)), InfluenceCallback(tmp_path / "log", exclude="net.0.*"))
    assert "net.0.weight" not in LoggedTrajectory(tmp_path / "log").sizes
    assert "net.2.weight" in LoggedTrajectory(tmp_path / "log").sizes


class NoSteps(L.Callback):
    """Fails where a step is taken."""

    def on_train_batch_start(self, *_: Any) -> None:
        raise AssertionError("the run began")


@pytest.mark.parametrize(
    ("val", "options", "says"),
    [
        (None, {}, "give fit a validation loader"),
        ([], {}, "has no batch|give fit a validation loader"),
        (DataLoader(digits(4), 2), {"limit_val_batches": 0}, "limit_val_batches=0 above 0"),
        ([DataLoader(digits(4), 2)] * 2, {"num_sanity_val_steps": 0}, "this run has 2"),
        ({"a": DataLoader(digits(4), 2), "b": DataLoader(digits(4), 2)}, {"num_sanity_val_steps": 0}, "this run has 2"),
    ],
    ids=["none", "empty", "limited", "list", "dict"],
)
def test_a_report_that_cannot_be_made_is_refused_before_training(
    val: Any, options: dict[str, Any], says: str, tmp_path: Path
) -> None:
    report = InfluenceCallback(tmp_path / "log", report=True)
    with pytest.raises(ConfigurationError, match=says):
        fit(Classifier(), loader(digits(32)), report, NoSteps(), val=val, **options)
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("val", [DataLoader(digits(4), 2), [DataLoader(digits(4), 2)], {"a": DataLoader(digits(4), 2)}])
def test_a_report_needs_no_validation_run(val: Any, tmp_path: Path) -> None:
    report = InfluenceCallback(tmp_path / "log", report=True)
    options = {"num_sanity_val_steps": 0, "check_val_every_n_epoch": 5}
    (tmp_path / "log").mkdir()
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "log" / "report.html").symlink_to(tmp_path / "precious")
    fit(Classifier(), loader(digits(32)), report, val=val, **options)
    assert report.report is not None
    assert (tmp_path / "precious").read_text() == "precious", "no report is written through a link"


W = "net.0.weight"
FORGERIES: dict[str, tuple[str, Callable[[dict[str, Any], dict[str, Any]], object]]] = {
    "an update that is not known": ("manifest", lambda _, meta: meta.update(update="x")),
    "an update that is a list": ("manifest", lambda _, meta: meta.update(update=["adam"])),
    "no update": ("manifest", lambda _, meta: meta.pop("update")),
    "coverage in words": ("manifest", lambda _, meta: meta.update(coverage={"trained": "x", "recorded": 1})),
    "shapes in a list": ("manifest", lambda _, meta: meta.update(shapes=[1])),
    "excluded numbers": ("manifest", lambda _, meta: meta.update(excluded=[1])),
    "a final parameter that is not known": (FINAL, lambda _, meta: meta.update(checksums={"x": 1})),
    "no checksums": (FINAL, lambda _, meta: meta.pop("checksums")),
    "a layout without parameters": ("layout", lambda _, meta: meta.pop("parameters")),
    "a layout of a shape in words": ("layout", lambda _, meta: meta["parameters"][W].update(shape="xy")),
    "no hyperparameters": ("step", lambda _, meta: meta.pop("hyper")),
    "hyperparameters of another number": ("step", lambda _, meta: meta["hyper_of"].update({W: 7})),
    "hyperparameters in words": ("step", lambda _, meta: meta["hyper"][0].update(lr="x")),
    "clipping that is a list": ("step", lambda _, meta: meta.update(clip=[])),
    "clipping by another rule": ("step", lambda _, meta: meta["clip"].update(rule="x")),
    "clipping in words": ("step", lambda _, meta: meta["clip"].update(bound="x", raw_norm="y")),
    "no shares": ("step", lambda _, meta: meta.pop("shares")),
    "no share of a gradient": ("step", lambda _, meta: meta["shares"].pop(W)),
    "a share of an unknown form": ("step", lambda _, meta: meta["shares"].update({W: {"form": "x"}})),
    "a deep share": ("step", lambda _, meta: meta["shares"].update({W: nested(400)})),
    "ids of another type": ("step", lambda tensors, _: tensors.update(sample_ids=torch.rand(16))),
    "a weight too few": ("step", lambda tensors, _: tensors.update(loss_weights=torch.rand(15).double())),
    "no first moments": ("step", lambda tensors, _: tensors.pop(f"moment/0/{W}", None)),
    "moments of another shape": ("step", lambda tensors, _: tensors.update({f"moment/0/{W}": torch.rand(3)})),
    "a gradient of another size": ("step", lambda tensors, _: tensors.update({f"gradient/{W}": torch.rand(3)})),
    "micro-batches in words": ("step", lambda _, meta: meta.update(micro_batches=["x"])),
    "a batch of an unknown kind": ("step", lambda _, meta: meta["micro_batches"][0].update(structure=[])),
    "a snapshot of an unknown kind": (
        "snapshot-00000000",
        lambda tensors, _: tensors.update({"x": torch.rand(3)}),
    ),
}


def nested(depth: int) -> dict[str, Any]:
    form: dict[str, Any] = {"form": "x"}
    for _ in range(depth):
        form = {"form": "sum", "parts": [form]}
    return form


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> tuple[Classifier, Path]:
    module, log = Classifier(), tmp_path_factory.mktemp("log")
    fit(module, loader(digits(32)), InfluenceCallback(log, record="both"))
    return module, log


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_log_is_corrupted(forgery: str, tmp_path: Path, pristine: tuple[Classifier, Path]) -> None:
    where, change = FORGERIES[forgery]
    module, whole = pristine
    log = forged(whole, tmp_path / "log", lambda place, *content: change(*content) if place == where else None)
    queries = DataLoader(digits(8), 4)

    def read() -> None:
        for curvature in ("fisher", "hessian"):  # read back, and replayed
            attribute(log, queries=queries, model=module, curvature=curvature, progress=False)

    with pytest.raises(LogCorrupted):
        read()


def test_a_log_written_anew_is_the_log(tmp_path: Path, pristine: tuple[Classifier, Path]) -> None:
    module, whole = pristine
    log = forged(whole, tmp_path / "log", lambda *_: None)
    options = {"queries": DataLoader(digits(8), 4), "model": module, "progress": False}
    assert torch.equal(attribute(log, **options).scores, attribute(whole, **options).scores)


def test_a_log_is_not_overwritten_silently(tmp_path: Path) -> None:
    fit(Classifier(), loader(digits(50)), InfluenceCallback(tmp_path / "log"))
    with pytest.raises(LogError, match="4 steps"):
        fit(Classifier(), loader(digits(50)), InfluenceCallback(tmp_path / "log"))
    assert len(LoggedTrajectory(tmp_path / "log")) == 4


def test_bad_logs_and_queries_are_refused(tmp_path: Path) -> None:
    train, val = split_digits(64, 8)
    module, queries = Classifier(), DataLoader(val, 4)
    fit(module, loader(train), InfluenceCallback(tmp_path / "log"))
    with pytest.raises(LogError, match="no such directory|not a log|does not exist"):
        attribute(tmp_path / "nowhere", queries=queries, model=module)
    (tmp_path / "empty").mkdir()
    with pytest.raises(LogError, match="not a log"):
        attribute(tmp_path / "empty", queries=queries, model=module)
    with pytest.raises(LogError, match="another model.*net.0.weight"):
        attribute(tmp_path / "log", queries=queries, model=Classifier(width=8))
    with pytest.raises(ConfigurationError, match="training_step cannot take"):
        attribute(tmp_path / "log", queries=[torch.zeros(3, 7)], model=module)
    with pytest.raises(ConfigurationError, match="no batch"):
        attribute(tmp_path / "log", queries=[], model=module)
    with pytest.raises(ConfigurationError, match="one loss per example"):
        attribute(tmp_path / "log", queries=queries, model=module, query_loss=lambda m, b: b[0].mean())
    with pytest.raises(ConfigurationError, match="3 weights"):
        attribute(tmp_path / "log", queries=queries, model=module, target=[1.0, 2.0, 3.0])
    with pytest.warns(UserWarning, match="differ from those at the end"):
        attribute(tmp_path / "log", queries=queries, model=Classifier(seed=5))


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_moments_between_follow_from_the_gradients(tmp_path: Path, momentum: float | None) -> None:
    """What the log derives equals the optimizer's own moments, which snapshots hold at every step."""

    def optimizer(m: torch.nn.Module) -> torch.optim.Optimizer:
        if momentum:
            return torch.optim.SGD(m.parameters(), lr=0.1, momentum=momentum, weight_decay=0.1)
        return torch.optim.Adam(m.parameters(), lr=1e-2, weight_decay=0.1)

    module = Classifier(optimizer)
    influence = InfluenceCallback(tmp_path / "log", record="both", snapshot_every=1, compression="full")
    fit(module, loader(digits(96), 8), influence, max_epochs=2, gradient_clip_val=0.3)
    run = LoggedTrajectory(tmp_path / "log")
    plan = LoggedPlan(run, module)
    assert len(run) == 24
    derived = 0
    for step in (23, 5, 12, 0):
        record, state = run.record(step), plan.snapshot(step)
        derived += "moment/0/net.0.weight" not in run.reader.names(step)
        for k, moments in record.moments.items():
            for own, theirs in zip(moments, state.moments[k], strict=True):
                torch.testing.assert_close(own, theirs.flatten(), rtol=1e-5, atol=1e-8)
    assert derived == 3
