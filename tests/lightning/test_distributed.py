"""Two processes give the scores of one that saw the same global batches."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from modules import Classifier, fit, loader, split_digits, trainer_under
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Sampler

from lightning_influence import InfluenceCallback, InfluenceReport, SelectionDataModule, attribute
from lightning_influence.core.removal import gradient_change
from lightning_influence.errors import ConfigurationError, LogCorrupted, LogError
from lightning_influence.lightning.run_report import whole_validation
from lightning_influence.log.format import FINAL
from lightning_influence.log.steps import LoggedSteps, LoggedTrajectory
from lightning_influence.selection.decisions import SelectionReport

N, LOCAL, PROCESSES = 96, 8, 2
TRAIN, QUERIES = split_digits(N, 6)


@pytest.fixture(autouse=True)
def _unseeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's distributed sampler takes its seed from here, where a test before has set it."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


class Dealt(Sampler[list[int]]):
    """The micro-batches that two processes see, one after the other, as Lightning deals them out."""

    def __iter__(self) -> Iterator[list[int]]:
        shares = [list(DistributedSampler(TRAIN, PROCESSES, rank, shuffle=True)) for rank in range(PROCESSES)]
        for start in range(0, len(shares[0]), LOCAL):
            yield from (share[start : start + LOCAL] for share in shares)

    def __len__(self) -> int:
        return N // LOCAL


def together(module: L.LightningModule, *callbacks: L.Callback, batch_size: int = LOCAL, **options: Any) -> None:
    """Train on two processes, which average their gradients."""
    data = DataLoader(TRAIN, batch_size)
    fit(module, data, *callbacks, strategy="ddp_fork", devices=PROCESSES, **options)


def alone(module: L.LightningModule, *callbacks: L.Callback, accumulate: int = 1, **options: Any) -> None:
    """Train on one process, whose micro-batches are what the processes would see."""
    data = DataLoader(TRAIN, batch_sampler=Dealt())
    fit(module, data, *callbacks, **options | {"accumulate_grad_batches": PROCESSES * accumulate})


def scored(log: Path, module: L.LightningModule, **options: Any) -> InfluenceReport:
    return attribute(log, queries=DataLoader(QUERIES, 6), model=module, progress=False, **options)


def plain_adamw(module: L.LightningModule) -> Any:
    return torch.optim.AdamW(module.parameters(), lr=1e-3)


def aligned(report: InfluenceReport) -> torch.Tensor:
    return report.scores[report.sample_ids.argsort()]


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"gradient_clip_val": 0.5},
    "accumulated": {"accumulate_grad_batches": 2},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("response", ["tangent", "finite"])
def test_two_processes_score_as_one(case: str, response: str, tmp_path: Path) -> None:
    modules = {"two": Classifier(), "one": Classifier()}
    accumulate = CASES[case].get("accumulate_grad_batches", 1)
    for name, train in (("two", together), ("one", partial(alone, accumulate=accumulate))):
        callback = InfluenceCallback(tmp_path / name, record="both", compression="full", snapshot_every=3)
        train(modules[name], callback, **CASES[case])
    assert LoggedTrajectory(tmp_path / "two").reader.ranks == PROCESSES
    for curvature in ("fisher", "hessian"):
        two, one = (
            scored(tmp_path / name, modules[name], curvature=curvature, response=response) for name in ("two", "one")
        )
        torch.testing.assert_close(aligned(two), aligned(one), rtol=1e-5, atol=1e-5 * float(one.scores.abs().max()))


@pytest.mark.parametrize("compression", ["auto", "factored", "mask"])
def test_shards_merge_into_the_averaged_gradient(compression: Any, tmp_path: Path) -> None:
    callback = InfluenceCallback(tmp_path, compression=compression, mask_size=50, record="gradients")
    together(Classifier(), callback, accumulate_grad_batches=2)
    run = LoggedTrajectory(tmp_path)
    seen = torch.cat([run.record(t).sample_ids for t in range(len(run))])
    assert sorted(seen.tolist()) == list(range(N))
    for t in range(len(run)):
        record = run.record(t)
        assert len(record.micro_batch_numbers.unique()) == 2 * PROCESSES
        assert float(record.loss_weights.sum()) == pytest.approx(1.0)
        for k, share in run.shares(t).items():
            total = share.combine(torch.ones(1, share.n_samples))[0]
            torch.testing.assert_close(total, record.gradients[k], rtol=1e-4, atol=1e-6)


def test_recording_leaves_training_as_it_was(tmp_path: Path) -> None:
    recorded, plain = Classifier(), Classifier()
    together(recorded, InfluenceCallback(tmp_path, record="both"))
    together(plain)
    assert all(torch.equal(p, q) for p, q in zip(recorded.parameters(), plain.parameters(), strict=True))


class FailsOnOne(L.Callback):
    """Recording fails on the second process after two steps."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 2:
            callback = next(c for c in trainer.callbacks if isinstance(c, InfluenceCallback))  # type: ignore[attr-defined]
            callback._recorder.begin = lambda *_: 1 / 0  # type: ignore[union-attr, method-assign]


def test_a_failure_of_one_process_stops_no_other_and_the_log_says_so(tmp_path: Path) -> None:
    recorded, plain = Classifier(), Classifier()
    options: dict[str, Any] = {"val": DataLoader(QUERIES, 6), "strategy": "ddp_fork", "devices": PROCESSES}
    data = DataLoader(TRAIN, LOCAL)
    fit(recorded, data, InfluenceCallback(tmp_path, report=True), FailsOnOne(), **options)
    fit(plain, data, **options)
    assert all(torch.equal(p, q) for p, q in zip(recorded.parameters(), plain.parameters(), strict=True))
    run = LoggedTrajectory(tmp_path)
    assert len(run) == 2 and FINAL not in run.reader.artifacts()
    assert set(run.reader.missing) == {"the steps from 2 on", "report.html"}


class Centred(Classifier):
    """Of one process, from a step on, samples see each other."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first, self.second = first, False

    def on_fit_start(self) -> None:
        self.second = self.global_rank == 1

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        centred = self.second and batch_idx >= self.first
        return torch.nn.functional.cross_entropy(self.net(x - x.mean(0) if centred else x), y)


class Hooked(Classifier):
    """Of one process, per-sample gradients do not sum to the gradient from a step on."""

    def __init__(self, rank: int, first: int) -> None:
        super().__init__()
        self.rank, self.first = rank, first

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(batch, batch_idx)
        if self.global_rank == self.rank and batch_idx == self.first:
            self.net[0].weight.register_hook(lambda g: 1.5 * g)  # type: ignore[union-attr]
        return loss


@pytest.mark.parametrize(
    "make",
    [partial(Centred, 0), partial(Hooked, 0, 0), partial(Hooked, 1, 0), partial(Hooked, 0, 2), partial(Hooked, 1, 2)],
    ids=["sees the batch", "first step, first", "first step, second", "later, first", "later, second"],
)
def test_what_one_process_cannot_record_all_leave_out(make: Any, tmp_path: Path) -> None:
    """At the first step they agree, later the log notes it; training ends where it ends without recording."""
    recorded, plain = make(), make()
    together(recorded, InfluenceCallback(tmp_path / "log"))
    together(plain)
    assert all(torch.equal(p, q) for p, q in zip(recorded.parameters(), plain.parameters(), strict=True))
    steps = LoggedSteps(tmp_path / "log")
    assert steps.manifest.record == "replay" and len(steps) == N // LOCAL // PROCESSES
    with pytest.raises(LogError, match="no per-sample gradients"):
        LoggedTrajectory(tmp_path / "log")
    noted = set(steps.reader.missing)
    assert noted == ({"per-sample gradients"} if getattr(recorded, "rank", 0) == 1 and recorded.first else set())
    shares = [name for rank in range(PROCESSES) for name in steps.reader.names(0, rank) if name.startswith("share/")]
    assert bool(shares) == bool(recorded.first), "of the first step nobody keeps any where one cannot"


def test_a_log_of_more_processes_is_overwritten_whole(tmp_path: Path) -> None:
    together(Classifier(), InfluenceCallback(tmp_path, record="gradients"))
    fit(Classifier(), DataLoader(TRAIN, 8), InfluenceCallback(tmp_path, existing="overwrite", record="gradients"))
    run = LoggedTrajectory(tmp_path)
    assert run.reader.ranks == 1
    assert len(run) == N // 8


def test_an_existing_log_stops_every_process(tmp_path: Path) -> None:
    fit(Classifier(), DataLoader(TRAIN, 8), InfluenceCallback(tmp_path, record="gradients"))
    with pytest.raises(Exception, match="already holds a log of 12 steps"):
        together(Classifier(), InfluenceCallback(tmp_path, record="gradients"))


def test_a_resumed_log_keeps_its_processes(tmp_path: Path) -> None:
    fit(Classifier(), DataLoader(TRAIN, 8), InfluenceCallback(tmp_path, record="gradients"))
    with pytest.raises(Exception, match="recorded with ranks=1 and cannot go on with 2"):
        together(Classifier(), InfluenceCallback(tmp_path, existing="resume", record="gradients"))


def cut(log: Path, rank: int, *, lines: int) -> None:
    index = log / f"rank-{rank}" / "index.jsonl"
    index.write_bytes(b"".join(index.read_bytes().splitlines(keepends=True)[:-lines]))


def test_a_process_that_is_missing_is_never_a_shorter_answer(tmp_path: Path) -> None:
    together(module := Classifier(), InfluenceCallback(tmp_path / "log", record="gradients"))
    for name in ("cut", "missing"):
        shutil.copytree(tmp_path / "log", tmp_path / name)
    cut(tmp_path / "cut", 1, lines=1)
    with pytest.raises(LogCorrupted, match="rank-1/index.jsonl holds 5 steps, but the run ended after 6"):
        scored(tmp_path / "cut", module)
    shutil.rmtree(tmp_path / "missing" / "rank-1")
    with pytest.raises(LogCorrupted, match="holds rank-0, but its manifest says ranks=2"):
        scored(tmp_path / "missing", module)


def test_a_killed_run_is_read_up_to_where_every_process_came_and_goes_on_from_there(tmp_path: Path) -> None:
    together(Classifier(), InfluenceCallback(tmp_path, record="gradients"))
    cut(tmp_path, 0, lines=1)  # what says that the run ended
    cut(tmp_path, 1, lines=2)
    assert len(LoggedTrajectory(tmp_path)) == N // LOCAL // PROCESSES - 2
    together(Classifier(), InfluenceCallback(tmp_path, existing="resume", record="gradients"))
    run = LoggedTrajectory(tmp_path)
    assert len(run) == 2 * (N // LOCAL // PROCESSES) - 2
    assert all(len(run.record(t).sample_ids) == PROCESSES * LOCAL for t in range(len(run)))


def test_report_of_two_processes(tmp_path: Path) -> None:
    loaders = DataLoader(TRAIN, LOCAL), DataLoader(QUERIES, 6)
    callback = InfluenceCallback(tmp_path, report=True, record="gradients")
    fit(Classifier(), loaders[0], callback, val=loaders[1], strategy="ddp_fork", devices=PROCESSES)
    report = InfluenceReport.load(tmp_path / "report.safetensors")
    assert callback.report is not None and torch.equal(callback.report.scores, report.scores)
    assert sorted(report.sample_ids.tolist()) == list(range(N))
    assert (tmp_path / "report.html").exists()


def as_if_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that are forked work on copies of what processes of their own would be sent."""
    run = _MultiProcessingLauncher._wrapping_function

    def run_copies(launcher: Any, rank: int, *sent: Any) -> None:
        *work, answers = sent
        launcher, *work = pickle.loads(pickle.dumps([launcher, *work]))
        run(launcher, rank, *work, answers)

    monkeypatch.setattr(_MultiProcessingLauncher, "_wrapping_function", run_copies)


@pytest.mark.parametrize("strategy", ["ddp_fork", pytest.param("ddp_spawn", marks=pytest.mark.slow)])
def test_the_report_is_there_after_processes_of_their_own(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they hold does not come back: the report is that of the log."""
    if strategy == "ddp_fork":
        as_if_sent(monkeypatch)
    callback, module = InfluenceCallback(tmp_path, report=True, record="gradients"), Classifier(plain_adamw)
    val = DataLoader(QUERIES, 6)
    fit(module, DataLoader(TRAIN, LOCAL), callback, val=val, strategy=strategy, devices=PROCESSES)
    assert callback.report is not None and len(callback.report.sample_ids) == N
    expected = attribute(tmp_path, queries=val, model=module, target="mean", progress=False)
    torch.testing.assert_close(callback.report.scores, expected.scores, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("val", [DataLoader(QUERIES, 2), DataLoader(QUERIES, 2, sampler=[5, 0, 3, 1, 2])])
def test_a_report_of_two_processes_is_about_the_whole_validation_set(val: Any, tmp_path: Path) -> None:
    """Six examples dealt out to two processes, and five, one of which both get."""
    module, callback = Classifier(), InfluenceCallback(tmp_path, report=True, record="gradients")
    fit(module, DataLoader(TRAIN, LOCAL), callback, val=val, strategy="ddp_fork", devices=PROCESSES)
    asked = [[t[list(val.sampler)] for t in QUERIES.tensors]]
    expected = attribute(tmp_path, queries=asked, model=module, target="mean", progress=False)
    assert callback.report is not None
    torch.testing.assert_close(callback.report.scores, expected.scores, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("size", [5, 6])
def test_validation_that_each_process_loads_for_itself_is_gathered(size: int) -> None:
    class Two:
        size = 2

        def gather(self, value: Any) -> list[Any]:
            return [value, [v + 100 for v in value]]

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(range(size))

    batches = whole_validation(DataLoader(Stream(), 2), Two())  # type: ignore[arg-type]
    assert sorted(torch.cat(batches).tolist()) == [*range(size), *range(100, 100 + size)]


class Without(Sampler[list[int]]):
    """One batch for each process, the first without a sample."""

    def __init__(self, sample: int | None) -> None:
        self.sample = sample

    def __iter__(self) -> Iterator[list[int]]:
        rank = torch.distributed.get_rank()
        yield [i for i in range(rank * LOCAL, (rank + 1) * LOCAL) if i != self.sample]

    def __len__(self) -> int:
        return 1


def test_without_a_sample_its_process_averages_over_the_rest_and_the_others_stay(tmp_path: Path) -> None:
    """Which global batch a removal under DDP corresponds to: the mean over the processes of each one's own mean."""

    def step(sample: int | None, *callbacks: L.Callback) -> torch.Tensor:
        module = Classifier(lambda m: torch.optim.SGD(m.parameters(), lr=1.0))
        data = DataLoader(TRAIN, batch_sampler=Without(sample))
        options: dict[str, Any] = {"use_distributed_sampler": False, "strategy": "ddp_fork", "devices": PROCESSES}
        fit(module, data, *callbacks, **options)
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    whole = step(None, InfluenceCallback(tmp_path, compression="full", record="gradients"))
    log = LoggedTrajectory(tmp_path)
    removed = gradient_change(log.record(0), "drop")
    at = removed.sample_ids.tolist().index(3)
    shares, gradients = log.shares(0), log.record(0).gradients
    names = [k for k, _ in Classifier().named_parameters()]
    expected = torch.cat(
        [
            removed.change(shares[k], slice(at, at + 1), removed.totals(shares[k], gradients[k]))[0].flatten()
            for k in names
        ]
    )
    measured = whole - step(3)  # one step of plain SGD at a learning rate of 1
    torch.testing.assert_close(expected, measured, rtol=1e-3, atol=2e-6)
    # a mean over the fifteen that are left is another one
    module = Classifier()
    x, y = (t[: PROCESSES * LOCAL] for t in TRAIN.tensors)
    rest = torch.arange(PROCESSES * LOCAL) != 3
    both = []
    for rows in (rest, torch.ones_like(rest)):
        loss = torch.nn.functional.cross_entropy(module.net(x[rows]), y[rows])
        both.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))]))
    joint = both[0] - both[1]
    assert float((joint - measured).norm() / measured.norm()) > 0.05


@pytest.mark.parametrize("strategy", [ModelParallelStrategy, FSDPStrategy])
def test_sharded_strategies_are_refused(strategy: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"{strategy.__name__}, which shards"):
        InfluenceCallback(tmp_path, record="gradients").setup(trainer_under(strategy()), Classifier(), "fit")


# -- selection ---------------------------------------------------------------------------------------------


class Selects(SelectionDataModule):
    """Leaves what it decided in a file, which a forked process takes with it."""

    def __init__(self, decisions: Path, loader: Any, **options: Any) -> None:
        super().__init__(loader, DataLoader(QUERIES, 6), refresh_target_every=2, **options)
        self.decisions = decisions

    def teardown(self, stage: str) -> None:
        super().teardown(stage)
        if self.trainer.is_global_zero:
            self.selection_report.to_csv(self.decisions)


class Counts(L.Callback):
    """Batches and samples that a process trained on."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.sizes = folder, list[int]()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.sizes.append(len(batch[0]))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        state = {"sizes": self.sizes, "end": [p.detach() for p in pl_module.parameters()]}
        torch.save(state, self.folder / f"rank-{trainer.global_rank}.pt")


@pytest.mark.parametrize("options", [{}, {"rescore": 2}, {"keep": "positive", "response": "finite"}], ids=str)
@pytest.mark.parametrize("clip", [None, 0.3])
def test_selection_inside_the_step_is_that_of_one_process(
    options: dict[str, Any], clip: float | None, tmp_path: Path
) -> None:
    modules, tables = {}, {}
    for name in ("two", "one"):
        loader = DataLoader(TRAIN, LOCAL) if name == "two" else DataLoader(TRAIN, batch_sampler=Dealt())
        data = Selects(tmp_path / name, loader, every=1, **options)
        settings = (
            {"strategy": "ddp_fork", "devices": PROCESSES} if name == "two" else {"accumulate_grad_batches": PROCESSES}
        )
        modules[name] = Classifier()
        fit(modules[name], data, gradient_clip_val=clip, **settings)
        tables[name] = pd.read_csv(tmp_path / name).sort_values(["step", "sample_id"]).reset_index(drop=True)
    pd.testing.assert_frame_equal(tables["two"], tables["one"], rtol=1e-3, atol=1e-6)
    assert 0 < (tables["two"].weight == 0).sum() < N
    torch.testing.assert_close(modules["two"].state_dict(), modules["one"].state_dict(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"horizon": 2, "every": 3},
        {"keep": 0.5, "rebatch": True, "every": 2},
        {"keep": "positive", "rebatch": True, "per": "round"},
    ],
    ids=str,
)
def test_each_process_selects_on_its_shard_and_none_waits(options: dict[str, Any], tmp_path: Path) -> None:
    data = Selects(tmp_path / "decisions", DataLoader(TRAIN, LOCAL, shuffle=True), **options)
    fit(Classifier(), data, Counts(tmp_path), strategy="ddp_fork", devices=PROCESSES)
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(PROCESSES))
    assert len(first["sizes"]) == len(second["sizes"]) == N // LOCAL // PROCESSES
    assert all(torch.equal(p, q) for p, q in zip(first["end"], second["end"], strict=True))
    table = pd.read_csv(tmp_path / "decisions")
    assert sorted(table.sample_id.unique()) == list(range(N))
    if options.get("rebatch"):
        assert {*first["sizes"], *second["sizes"]} == {LOCAL}
    else:
        assert sum(first["sizes"]) + sum(second["sizes"]) == (table.weight > 0).sum()


def test_a_checkpoint_of_two_processes_holds_the_decisions_of_both(tmp_path: Path) -> None:
    data = Selects(tmp_path / "decisions", DataLoader(TRAIN, LOCAL), every=1)
    checkpoint = ModelCheckpoint(tmp_path, filename="last", save_on_train_epoch_end=True)
    fit(Classifier(), data, checkpoint, strategy="ddp_fork", devices=PROCESSES, enable_checkpointing=True)
    state = torch.load(tmp_path / "last.ckpt", weights_only=False)["Selects"]
    seen = [
        torch.cat([ids for _, ids, _, _ in rows]).tolist()
        for rows in map(SelectionReport().restored, state["decisions"])
    ]
    assert sorted(seen[0] + seen[1]) == list(range(N))


@pytest.mark.parametrize("options", [{"every": "epoch"}, {"every": 2, "horizon": 1, "rebatch": True}], ids=str)
def test_two_processes_that_are_resumed_make_the_same_decisions(options: dict[str, Any], tmp_path: Path) -> None:
    steps = N // LOCAL // PROCESSES

    def train(folder: Path, **resumed: Any) -> tuple[Any, bytes]:
        folder.mkdir()
        module, data = Classifier(), Selects(folder / "decisions", loader(TRAIN, LOCAL), keep=0.5, **options)
        saves = {"dirpath": folder, "save_top_k": -1}
        callbacks = (
            ModelCheckpoint(**saves, filename="inside {step}", every_n_train_steps=steps + 2),
            ModelCheckpoint(**saves, filename="between {step}", save_on_train_epoch_end=True),
        )
        two = {"strategy": "ddp_fork", "devices": PROCESSES, "max_epochs": 3, "enable_checkpointing": True}
        fit(module, data, *callbacks, **two, **resumed)
        return module.state_dict(), (folder / "decisions").read_bytes()

    end, decisions = train(tmp_path / "whole")
    for where in (f"inside step={steps + 2}", f"between step={2 * steps}"):
        again, same_decisions = train(tmp_path / where, ckpt_path=tmp_path / "whole" / f"{where}.ckpt")
        assert all(torch.equal(end[k], again[k]) for k in end), where
        assert decisions == same_decisions, where
