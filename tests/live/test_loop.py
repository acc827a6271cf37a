"""Loops of one's own, recorded: against training again by hand, and against the same run under Lightning."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, Sampler, TensorDataset

from lightning_influence import (
    FunctionTask,
    InfluenceCallback,
    InfluenceReport,
    attribute,
    check_faithfulness,
    error_proxy,
    recording,
    suspects,
)
from lightning_influence.errors import ConfigurationError, LogError
from lightning_influence.live.loop import LoopRecorder
from lightning_influence.log.steps import LoggedSteps

N, BATCH, EPOCHS, LR = 32, 8, 3, 2e-3


def samples(n: int, seed: int, dtype: torch.dtype = torch.float64) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator, dtype=dtype)
    return TensorDataset(x, (x[:, 0] + x[:, 1] * x[:, 2] > 0).long())


DATA, QUERIES = samples(N, 1), samples(12, 2)
ASKED = [tuple(QUERIES.tensors)]


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.LayerNorm(10), nn.Linear(10, 2)).double()


def loss_of(module: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def adamw(module: nn.Module) -> torch.optim.AdamW:
    """Two groups, as one has them."""
    decayed, plain = (
        [p for p in module.parameters() if p.dim() > 1],
        [p for p in module.parameters() if p.dim() == 1],
    )
    return torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": plain, "lr": LR / 2}], lr=LR)


class Order(Sampler[int]):
    """Another order in every epoch, whoever else draws random numbers: a Trainer draws more of a loader's than a loop."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(5)

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(N, generator=self.generator).tolist())

    def __len__(self) -> int:
        return N


def shuffled() -> DataLoader[Any]:
    return DataLoader(DATA, BATCH, sampler=Order())


def recorded(
    log: Path, record: str = "replay", *, parts: int = 1, clip: float | None = None, **options: Any
) -> FunctionTask:
    """The loop, its steps made of ``parts`` batches, with a schedule."""
    task = FunctionTask(network(), loss_of, optimizer=adamw)
    optimizer, loader = adamw(task.module), shuffled()
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
    with recording(log, task, optimizer, record=record, **options) as recorder:  # type: ignore[arg-type]
        for _ in range(EPOCHS):
            for number, batch in enumerate(recorder.batches(loader)):
                recorder.backward(batch, parts=parts)
                if (number + 1) % parts == 0:
                    if clip is not None:
                        recorder.clip_grad_norm(clip)
                    optimizer.step()
                    optimizer.zero_grad()
                    schedule.step()
    return task


def by_hand(without: int | None = None, *, parts: int = 1, clip: float | None = None) -> nn.Sequential:
    """The same loop in plain torch, without a sample: of its batch the others are averaged."""
    module, loader = network(), shuffled()
    optimizer = adamw(module)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
    x, y = DATA.tensors
    for _ in range(EPOCHS):
        for number, drawn in enumerate(loader.batch_sampler):  # type: ignore[arg-type]
            kept = [z for z in drawn if z != without]
            (loss_of(module, (x[kept], y[kept])) / parts).backward()
            if (number + 1) % parts == 0:
                if clip is not None:
                    torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    return module


@torch.no_grad()
def query_loss(module: nn.Module) -> float:
    return float(loss_of(module.eval(), ASKED[0]))


def scores(log: Path, model: Any, **options: Any) -> InfluenceReport:
    return attribute(log, queries=ASKED, model=model, target="mean", progress=False, **options)


class Doubled(nn.Linear):
    """A layer that no rule covers."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Scaled(nn.Sequential):
    """Reads what a replay does not see, and what changes between the steps."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 2, dtype=torch.float64))
        self.scale = [1.0]


def goes_on(module: nn.Module) -> None:
    if isinstance(module, Scaled):
        module.scale[0] += 1


OPTIONS: dict[str, dict[str, Any]] = {"plain": {}, "accumulated and clipped": {"parts": 2, "clip": 0.5}}


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_recorded_loop_ends_where_it_ends_without(kind: str, tmp_path: Path) -> None:
    for record in ("gradients", "replay", "both"):
        found, expected = recorded(tmp_path / record, record, **OPTIONS[kind]).module, by_hand(**OPTIONS[kind])
        for (name, p), q in zip(found.named_parameters(), expected.parameters(), strict=True):
            assert torch.equal(p, q), name


@pytest.mark.parametrize("kind", OPTIONS)
def test_scores_are_what_training_again_says(kind: str, tmp_path: Path) -> None:
    task = recorded(tmp_path / "log", **OPTIONS[kind])
    report, whole = scores(tmp_path / "log", task), query_loss(by_hand(**OPTIONS[kind]))
    truth = torch.tensor([query_loss(by_hand(z, **OPTIONS[kind])) - whole for z in range(N)], dtype=torch.float64)
    found = report.scores[:, 0].double()
    assert report.sample_ids.tolist() == list(range(N))
    assert spearmanr(found, truth).statistic > 0.99
    assert float((found - truth).norm() / truth.norm()) < 0.05


class Lit(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return loss_of(self.net, batch)

    def configure_optimizers(self) -> Any:
        optimizer = adamw(self)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.parametrize("record", ["gradients", "replay"])
@pytest.mark.parametrize("kind", OPTIONS)
def test_scores_are_those_of_the_same_run_under_lightning(kind: str, record: str, tmp_path: Path) -> None:
    parts, clip = OPTIONS[kind].get("parts", 1), OPTIONS[kind].get("clip")
    module = Lit()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        accumulate_grad_batches=parts,
        gradient_clip_val=clip,
        callbacks=[InfluenceCallback(tmp_path / "lit", record=record)],  # type: ignore[arg-type]
        **quiet,  # type: ignore[arg-type]
    )
    trainer.fit(module, shuffled())
    task = recorded(tmp_path / "plain", record, **OPTIONS[kind])
    for p, q in zip(module.parameters(), task.module.parameters(), strict=True):
        assert torch.equal(p, q)
    own, lit = scores(tmp_path / "plain", task), scores(tmp_path / "lit", module)
    assert torch.equal(own.sample_ids, lit.sample_ids)
    torch.testing.assert_close(own.scores, lit.scores, rtol=1e-5, atol=1e-12)
    assert own.metadata["curvature"] == lit.metadata["curvature"] == ("hessian" if record == "replay" else "fisher")


def test_a_lightning_module_may_train_in_a_plain_loop(tmp_path: Path) -> None:
    module = Lit()
    optimizer = adamw(module)
    with recording(tmp_path / "lit", module, optimizer, record="replay") as recorder:
        for batch in recorder.batches(DataLoader(DATA, BATCH)):
            recorder.backward(batch)
            optimizer.step()
            optimizer.zero_grad()

    def loop(recorder: LoopRecorder, optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
        for batch in recorder.batches(DataLoader(DATA, BATCH)):
            recorder.backward(batch)
            optimizer.step()
            optimizer.zero_grad()

    task = run(tmp_path / "plain", loop, record="replay")
    assert torch.equal(scores(tmp_path / "lit", module).scores, scores(tmp_path / "plain", task).scores)


def test_the_loader_of_an_earlier_epoch_is_let_go(tmp_path: Path) -> None:
    task, loaders = FunctionTask(network(), loss_of), [DataLoader(DATA, BATCH) for _ in range(2)]
    samplers, optimizer = [loader.batch_sampler for loader in loaders], adamw(task.module)
    with recording(tmp_path / "log", task, optimizer, record="replay") as recorder:
        for number in (0, 1, 0):
            for batch in recorder.batches(loaders[number]):
                recorder.backward(batch)
                optimizer.step()
                optimizer.zero_grad()
            assert loaders[1 - number].batch_sampler is samplers[1 - number], "its own again"
    assert [loader.batch_sampler for loader in loaders] == samplers
    assert LoggedSteps(tmp_path / "log").record(2 * len(samplers[0])).sample_ids.tolist() == list(range(BATCH))


def test_a_loss_may_run_in_mixed_precision(tmp_path: Path) -> None:
    def autocast_loss(module: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(module, batch)

    data, queries = samples(N, 1, torch.float32), samples(12, 2, torch.float32)
    for record in ("gradients", "replay"):
        torch.manual_seed(0)
        task = FunctionTask(nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 2)), autocast_loss)
        optimizer = adamw(task.module)
        with recording(tmp_path / record, task, optimizer, record=record) as recorder:  # type: ignore[arg-type]
            for batch in recorder.batches(DataLoader(data, BATCH)):
                optimizer.zero_grad()
                recorder.backward(batch)
                optimizer.step()
    report = attribute(tmp_path / "replay", queries=[tuple(queries.tensors)], model=task, progress=False)
    removals = report.metadata["removals"]
    assert removals["by"] == "shares" and removals["verified"] == 3, removals
    assert 1e-3 < removals["largest_error"] < 5e-2, "half precision is seen, and allowed for"


def test_the_error_proxy_the_check_and_suspects_take_a_plain_loop(tmp_path: Path) -> None:
    task = recorded(tmp_path / "log", "both")
    proxy = error_proxy(tmp_path / "log", queries=ASKED, model=task, pairs=4, progress=False)
    assert proxy.curvature == "hessian" and 0 < float(proxy.relative()[1.0]) < 1
    check = check_faithfulness(
        tmp_path / "log", model=task, data=DATA, queries=ASKED, removals=6, target="mean", ceiling=False, progress=False
    )
    whole, drawn = query_loss(by_hand()), [int(z) for z in check.removals]  # type: ignore[call-overload]
    truth = [query_loss(by_hand(z)) - whole for z in drawn]
    torch.testing.assert_close(check.truth[:, 0], torch.tensor(truth, dtype=torch.float64), rtol=1e-6, atol=1e-12)
    assert check.levels["system"] < 1e-9
    assert len(suspects(tmp_path / "log", 5)) == 5
    assert len(suspects(tmp_path / "log", 5, model=task, data=DATA)) == 5


def test_retraining_needs_an_optimizer(tmp_path: Path) -> None:
    task = recorded(tmp_path / "log")
    with pytest.raises(ConfigurationError, match="optimizer="):
        check_faithfulness(
            tmp_path / "log", model=FunctionTask(task.module, loss_of), data=DATA, queries=ASKED, progress=False
        )


Loop = Callable[[LoopRecorder, torch.optim.Optimizer, nn.Module], object]


def run(log: Path, loop: Loop, **options: Any) -> FunctionTask:
    task = FunctionTask(network(), loss_of)
    optimizer = adamw(task.module)
    with recording(log, task, optimizer, **options) as recorder:
        loop(recorder, optimizer, task.module)
    return task


def test_a_batch_that_is_passed_over_takes_its_samples_with_it(tmp_path: Path) -> None:
    def loop(recorder: LoopRecorder, optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
        for number, batch in enumerate(recorder.batches(DataLoader(DATA, BATCH))):
            if number == 1:
                continue
            optimizer.zero_grad()
            recorder.backward(batch)
            optimizer.step()
            if number == 2:
                break
        for batch in recorder.batches(DataLoader(DATA, BATCH)):
            optimizer.zero_grad()
            recorder.backward(batch)
            optimizer.step()
            break

    run(tmp_path / "log", loop)
    steps = LoggedSteps(tmp_path / "log")
    assert [int(steps.sample_ids(t)[0]) for t in range(len(steps))] == [0, 2 * BATCH, 0]


def test_gradients_that_are_dropped_are_in_no_step(tmp_path: Path) -> None:
    def loop(recorder: LoopRecorder, optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
        for number, batch in enumerate(recorder.batches(DataLoader(DATA, BATCH))):
            recorder.backward(batch)
            if number != 1:
                optimizer.zero_grad()
                continue
            optimizer.step()
            optimizer.zero_grad()

    run(tmp_path / "log", loop, record="both")
    steps = LoggedSteps(tmp_path / "log")
    assert [steps.sample_ids(t).tolist() for t in range(len(steps))] == [list(range(BATCH, 2 * BATCH))]


def test_the_last_step_may_come_after_its_epoch(tmp_path: Path) -> None:
    def loop(recorder: LoopRecorder, optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
        for batch in recorder.batches(DataLoader(DATA, BATCH)):
            recorder.backward(batch, parts=N // BATCH)
        optimizer.step()

    task = run(tmp_path / "log", loop, record="replay")
    scores(tmp_path / "log", task)  # no warning that parameters were changed, which would be an error here


def clips_by_hand(recorder: LoopRecorder, optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    for batch in recorder.batches(DataLoader(DATA, BATCH)):
        recorder.backward(batch)
        nn.utils.clip_grad_norm_(module.parameters(), 1e-3)
        optimizer.step()


def leaves_gradients(recorder: LoopRecorder, optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    for batch in recorder.batches(DataLoader(DATA, BATCH)):
        recorder.backward(batch)
        optimizer.step()


def runs_a_batch_twice(recorder: LoopRecorder, optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    for batch in recorder.batches(DataLoader(DATA, BATCH)):
        recorder.backward(batch)
        recorder.backward(batch)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(DATA)


def streams(recorder: LoopRecorder, optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    next(recorder.batches(DataLoader(Stream(), BATCH)))


@pytest.mark.parametrize(
    ("loop", "says"),
    [
        (clips_by_hand, "recorder's clip_grad_norm"),
        (leaves_gradients, "zero_grad"),
        (runs_a_batch_twice, "once for each batch"),
        (streams, "sample_ids"),
    ],
)
def test_loops_that_cannot_be_followed_are_refused(loop: Loop, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=says):
        run(tmp_path / "log", loop)


@pytest.mark.parametrize(
    "options", [{"record": "x"}, {"compression": "x"}, {"existing": "resume"}, {"snapshot_every": 0}, {"mask_size": 0}]
)
def test_unknown_choices_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        run(tmp_path / "log", lambda *_: None, **options)
    assert not (tmp_path / "log").exists()


def test_a_log_is_not_written_over(tmp_path: Path) -> None:
    recorded(tmp_path / "log")
    with pytest.raises(LogError, match="existing='overwrite'"):
        recorded(tmp_path / "log")
    recorded(tmp_path / "log", existing="overwrite")


def test_nothing_is_left_in_a_run(tmp_path: Path) -> None:
    task, loader = FunctionTask(network(), loss_of), DataLoader(DATA, BATCH)
    optimizer, sampler = adamw(task.module), loader.batch_sampler
    hooks = copy.copy(optimizer._optimizer_step_pre_hooks), copy.copy(optimizer._optimizer_step_post_hooks)

    def broken() -> None:
        with recording(tmp_path / "log", task, optimizer, record="both") as recorder:
            for batch in recorder.batches(loader):
                recorder.backward(batch)
                optimizer.step()
                raise RuntimeError("it went away")

    with pytest.raises(RuntimeError, match="went away"):
        broken()
    assert loader.batch_sampler is sampler
    assert (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks) == hooks
    assert not any(m._forward_hooks for m in task.module.modules())
    assert len(LoggedSteps(tmp_path / "log")) == 1
    with pytest.warns(UserWarning, match="did not finish"):
        scores(tmp_path / "log", task)


@pytest.mark.parametrize(
    ("task", "kept", "reason"),
    [
        (FunctionTask(network(), loss_of), "both", ""),
        (FunctionTask(nn.Sequential(Doubled(6, 2)).double(), loss_of), "replay", "no rule for 0"),
        (
            FunctionTask(network(), lambda m, b: F.cross_entropy(m(b[0] - b[0].mean(0)), b[1])),
            "replay",
            "see each other",
        ),
        (FunctionTask(Scaled(), lambda m, b: m.scale[0] * loss_of(m, b)), "gradients", "run again"),
    ],
    ids=["both", "no rule", "sees the batch", "no replay"],
)
def test_by_default_what_is_possible_is_recorded(
    task: FunctionTask, kept: str, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As the callback does, and with the same line."""
    optimizer = adamw(task.module)
    plain, options = copy.deepcopy(task), {"store_batches": False} if kept == "both" else {}
    by_itself = adamw(plain.module)
    for batch in DataLoader(DATA, BATCH):
        by_itself.zero_grad()
        plain.loss(batch).backward()
        by_itself.step()
        goes_on(plain.module)
    with caplog.at_level(logging.INFO), recording(tmp_path, task, optimizer, **options) as recorder:  # type: ignore[arg-type]
        for batch in recorder.batches(DataLoader(DATA, BATCH)):
            optimizer.zero_grad()
            recorder.backward(batch)
            optimizer.step()
            goes_on(task.module)
    assert all(torch.equal(p, q) for p, q in zip(task.module.parameters(), plain.module.parameters(), strict=True))
    assert LoggedSteps(tmp_path).manifest.record == kept
    assert repr(recorder) == f"LoopRecorder(4 steps in {str(tmp_path)!r}, record={kept!r})"
    assert sum(f"go to {tmp_path}" in line for line in caplog.messages) == 1
    assert sum("There are no" in line or "goes on with no" in line for line in caplog.messages) == bool(reason)
    assert any(reason in line for line in caplog.messages)
    if kept == "both":
        assert scores(tmp_path, task, data=DATA).provenance.curvature == "hessian"
        with pytest.warns(UserWarning, match="Fisher"):
            scores(tmp_path, task)
    elif kept == "gradients":
        assert scores(tmp_path, task, curvature="fisher").scores.any()
    else:
        assert scores(tmp_path, task).provenance.curvature == "hessian"


def test_another_model_is_refused(tmp_path: Path) -> None:
    task = recorded(tmp_path / "log")
    with pytest.raises(ConfigurationError, match=r"FunctionTask\(module, loss\)"):
        scores(tmp_path / "log", task.module)
    with pytest.raises(LogError, match="another model"):
        scores(tmp_path / "log", FunctionTask(nn.Sequential(nn.Linear(6, 2)), loss_of))
