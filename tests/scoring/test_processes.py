"""Several processes that share one replay give the scores of one, and each does a part of the work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Fabric
from modules import Classifier, fit, loader, split_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_influence import InfluenceCallback, InfluenceReport, attribute
from lightning_influence.core.removal_sets import RemovalSets
from lightning_influence.errors import ConfigurationError, LogError
from lightning_influence.replay.passes import Passes
from lightning_influence.run.ranks import Ranks

DOUBLE = torch.float64
STEPS = 12


def launched(processes: int, work: Callable[..., Any], *args: Any) -> None:
    Fabric(accelerator="cpu", devices=processes, strategy="ddp_fork").launch(work, *args)


@dataclass
class Case:
    """A run and what is asked of it.

    Attributes:
        share: of the samples that one process runs, what each of two may run at most.
        tolerance: of the scores, relative to the largest.
    """

    make: Callable[[], Classifier] = Classifier
    trainer: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=lambda: {"record": "replay"})
    batch_size: int = 8
    n: int = 8 * STEPS
    asked: dict[str, Any] = field(default_factory=dict)
    share: float = 0.65
    tolerance: float = 1e-6
    dtype: torch.dtype = DOUBLE


class Contrasted(Classifier):
    """Its loss compares the samples of a batch with one another, so that removals have to be measured."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        out = self.net(x)
        return nn.functional.cross_entropy(out @ out.T, torch.arange(len(x))) + nn.functional.cross_entropy(out, y)


class Counting(Classifier):
    """Counts its batches in a buffer, which its loss reads: micro-batches depend on one another."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.seen += 1
        return super().training_step(batch, batch_idx) * (1 + self.seen / 100)


class Summed(Classifier):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1], reduction="sum")


def dropping() -> Classifier:
    return Classifier(net=nn.Sequential(nn.Linear(64, 16), nn.Dropout(0.3), nn.GELU(), nn.Linear(16, 10)))


def late() -> Classifier:
    """Settled second moments, so that a run can be walked back."""
    return Classifier(lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3, weight_decay=0.1))


CASES = {
    "micro-batches, clipped, met twice in a window": Case(
        trainer={"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "max_epochs": 3}, n=48, share=0.75
    ),
    "one batch, divided by its samples": Case(),
    "a sum": Case(make=Summed),
    "in single precision": Case(dtype=torch.float32, tolerance=1e-4),
    "tangent, three queries at once": Case(asked={"response": "tangent", "target": [1.0, -2.0, 0.5, 0.0]}),
    "gauss-newton": Case(asked={"curvature": "gauss_newton"}),
    "fisher": Case(asked={"curvature": "fisher"}),
    "some samples": Case(asked={"samples": [3, 40, 41]}),
    "groups": Case(asked={"groups": {"few": [1, 2, 3], "many": list(range(0, 8 * STEPS, 2)), "one": [7]}}),
    "one group": Case(asked={"groups": {"few": [1, 2, 3]}}),
    "dropout, evaluated whole": Case(make=dropping, share=1.2),
    "dropout, by micro-batches": Case(make=dropping, trainer={"accumulate_grad_batches": 3}, batch_size=4, share=0.75),
    "measured removals": Case(make=Contrasted, share=0.75),
    "buffers that pass from one micro-batch to the next": Case(
        make=Counting, trainer={"accumulate_grad_batches": 2}, share=1.2
    ),
    "little memory": Case(
        make=late, n=8 * 40, record={"record": "replay", "snapshot_every": 10}, asked={"max_memory": 11 * 10**5}
    ),
    "a log of gradients": Case(record={"record": "gradients"}, asked={"curvature": "fisher"}, share=0.0),
}


def told(path: Path) -> tuple[InfluenceReport, int]:
    return InfluenceReport.load(path / "report.safetensors"), torch.load(path / "ran.pt")


def answered(where: Path, log: Path, module: Any, queries: Any, asked: dict[str, Any], fabric: Any) -> None:
    """The report, and of how many samples a pass was run."""
    ran, run = [0], Passes.run

    def counted(self: Passes, leaves: Any, buffers: Any, micro_batch: Any, **options: Any) -> Any:
        ran[0] += micro_batch.n_samples
        return run(self, leaves, buffers, micro_batch, **options)

    Passes.run = counted  # type: ignore[method-assign]
    try:
        report = attribute(log, queries=queries, model=module, progress=False, fabric=fabric, **asked)
    finally:
        Passes.run = run  # type: ignore[method-assign]
    where.mkdir()
    report.save(where / "report.safetensors")
    torch.save(ran[0], where / "ran.pt")


def each_case(fabric: Any, runs: dict[str, Any], folder: Path) -> None:
    torch.set_num_threads(1)
    for name, run in runs.items():
        answered(folder / f"{name}-{fabric.global_rank}", *run, fabric)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case answered by one process and by two."""
    folder, runs = tmp_path_factory.mktemp("answers"), {}
    for name, case in CASES.items():
        module = case.make()
        train, val = split_digits(case.n, 4, case.dtype)
        precision = "64-true" if case.dtype == DOUBLE else "32-true"
        callback = InfluenceCallback(folder / f"{name}-log", **case.record)
        fit(module, loader(train, case.batch_size), callback, precision=precision, **case.trainer)
        runs[name] = folder / f"{name}-log", module, [val.tensors], {"target": "mean", "data": train} | case.asked
        answered(folder / f"{name}-alone", *runs[name], None)
    launched(2, each_case, runs, folder)
    return folder


@pytest.mark.xdist_group("answers of two processes")  # which no second process of tests computes again
@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_the_scores_of_one(answers: Path, name: str) -> None:
    case = CASES[name]
    alone, ran = told(answers / f"{name}-alone")
    reports = []
    for rank in range(2):
        report, own = told(answers / f"{name}-{rank}")
        assert torch.equal(report.sample_ids, alone.sample_ids)
        assert torch.equal(report.rows.sample_ids, alone.rows.sample_ids)
        assert torch.equal(report.rows.steps, alone.rows.steps)
        for column in ("scores", "tangent", "interaction"):
            found, expected = getattr(report.rows, column), getattr(alone.rows, column)
            torch.testing.assert_close(
                found, expected, rtol=0, atol=case.tolerance * float(alone.rows.scores.abs().max())
            )
        if alone.groups is not None:
            assert report.groups is not None
            assert report.groups.names == alone.groups.names
            torch.testing.assert_close(report.groups.scores, alone.groups.scores, rtol=1e-6, atol=1e-12)
        assert own <= case.share * ran
        for key in ("by", "verified"):
            assert report.metadata["removals"][key] == alone.metadata["removals"][key]
        for key in ("hessian", "curvature", "memory_window"):
            assert report.metadata.get(key) == alone.metadata.get(key)
        reports.append(report)
    torch.testing.assert_close(reports[0].scores, reports[1].scores, rtol=0, atol=0)


def test_a_log_of_two_processes_is_replayed_by_two(tmp_path: Path) -> None:
    train, val = split_digits(96, 4, DOUBLE)
    module = Classifier().double()
    fit(
        module,
        DataLoader(train, 8),
        InfluenceCallback(tmp_path / "log", record="replay"),
        strategy="ddp_fork",
        devices=2,
        precision="64-true",
    )
    run = tmp_path / "log", module, [val.tensors], {"target": "mean", "data": train}
    answered(tmp_path / "alone", *run, None)
    launched(2, each_case, {"two": run}, tmp_path)
    (alone, ran), *others = (told(tmp_path / name) for name in ("alone", "two-0", "two-1"))
    for report, own in others:
        torch.testing.assert_close(report.scores, alone.scores, rtol=0, atol=1e-6 * float(alone.scores.abs().max()))
        assert own <= 0.65 * ran


def test_queries_and_replay_are_spread_both_where_there_are_enough_processes(tmp_path: Path) -> None:
    train, val = split_digits(64, 2, DOUBLE)
    module = Classifier()
    fit(module, loader(train, 8), InfluenceCallback(tmp_path / "log", record="replay"), precision="64-true")
    run = tmp_path / "log", module, [val.tensors], {"data": train}
    answered(tmp_path / "alone", *run, None)
    launched(4, each_case, {"four": run}, tmp_path)
    alone, ran = told(tmp_path / "alone")
    for rank in range(4):
        report, own = told(tmp_path / f"four-{rank}")
        assert report.scores.shape == (64, 2)
        torch.testing.assert_close(report.scores, alone.scores, rtol=1e-6, atol=1e-12)
        assert own <= 0.7 * ran


# -- what processes do together ------------------------------------------------------------------------------


def _fails_on_one(fabric: Any, folder: Path) -> None:
    ranks = Ranks(fabric.global_rank, fabric.world_size)

    def work(error: Exception) -> str:
        if ranks.rank == 1:
            raise error
        return "done"

    found = [ranks.agreed(lambda: ranks.rank)]
    for error in (ConfigurationError("wrong"), LogError("gone"), KeyError("x")):
        try:
            ranks.agreed(lambda error=error: work(error))  # type: ignore[misc]
        except Exception as raised:
            found.append((type(raised).__name__, str(raised)))
    torch.save(found, folder / f"{ranks.rank}.pt")


def test_where_one_process_fails_none_goes_on(tmp_path: Path) -> None:
    launched(2, _fails_on_one, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert second == [1, ("ConfigurationError", "wrong"), ("LogError", "gone"), ("KeyError", "'x'")]
    assert [name for name, _ in first[1:]] == ["ConfigurationError", "LogError", "RuntimeError"]
    assert first[1][1] == "process 1 of 2 failed: ConfigurationError: wrong"


def _gathers(fabric: Any, folder: Path) -> None:
    ranks = Ranks(fabric.global_rank, fabric.world_size)
    own = {0: {"a": torch.ones(2, 3), "b": torch.tensor([5])}, 1: {"a": torch.zeros(4), "c": torch.tensor(2.5)}}
    torch.save((ranks.gather_tensors(own[ranks.rank]), ranks.gather_tensors({})), folder / f"{ranks.rank}.pt")


def test_tensors_of_different_shapes_are_gathered(tmp_path: Path) -> None:
    launched(2, _gathers, tmp_path)
    for rank in range(2):
        (first, second), nothing = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(first["a"], torch.ones(2, 3))
        assert torch.equal(first["b"], torch.tensor([5]))
        assert torch.equal(second["a"], torch.zeros(4))
        assert torch.equal(second["c"], torch.tensor(2.5))
        assert [*first, *second] == ["a", "b", "a", "c"]
        assert nothing == [{}, {}]


class Met:
    """Three steps of a run."""

    steps = ([4, 2], [2, 9], [7, 4])

    def __len__(self) -> int:
        return len(self.steps)

    def sample_ids(self, index: int) -> Tensor:
        return torch.tensor(self.steps[index])


@pytest.mark.parametrize("sets", [RemovalSets(), RemovalSets([9, 4], [[1], [2], [3]]), RemovalSets((), [[1]])], ids=str)
def test_removals_are_dealt_so_that_each_is_scored_once(sets: RemovalSets) -> None:
    from lightning_influence.scoring.processes import _dealt

    dealt = [_dealt(sets, Met(), Ranks(rank, 2)) for rank in range(2)]
    samples = [z for one in dealt for z in one.samples or ()]
    assert sorted(samples) == sorted({4, 2, 9, 7} if sets.samples is None else sets.samples)
    groups = [tuple(g) for one in dealt for g in one.groups if g]
    assert sorted(groups) == sorted(map(tuple, sets.groups))
    assert len({bool(one.groups) for one in dealt}) == 1, "all walk through the groups, or none"
