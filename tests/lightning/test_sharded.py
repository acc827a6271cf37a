"""A run whose parameters FSDP2 shards over two processes is recorded by both, and replayed in one."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed.checkpoint  # here, and not in every process
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from modules import Classifier, fit, split_digits
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning_influence import InfluenceCallback, InfluenceReport, attribute
from lightning_influence.errors import ConfigurationError
from lightning_influence.log.manifest import Manifest
from lightning_influence.log.reader import StoreReader
from lightning_influence.log.steps import LoggedSteps
from lightning_influence.replay.logged_plan import LoggedPlan
from lightning_influence.run.between_steps import BetweenSteps
from lightning_influence.run.moment import numbers_of
from lightning_influence.run.sharding import Chunk, chunk_of, class_of, let_go, local
from lightning_influence.run.unchanged import unchanged

N, LOCAL, PROCESSES = 96, 8, 2
TRAIN, QUERIES = split_digits(N, 6, torch.float64)
BOUND = 0.25  # of the gradient's norm, which is larger


class Layers(Classifier):
    """Widths that two processes cannot share equally."""

    def __init__(self) -> None:
        super().__init__(width=15)
        self.double()

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            mesh = self.device_mesh["data_parallel"]
            for layer in self.net:  # type: ignore[union-attr]
                if isinstance(layer, nn.Linear):
                    fully_shard(layer, mesh=mesh)
            fully_shard(self.net, mesh=mesh)


class Block(nn.Module):
    """Attention with dropout, and a number of its own that the loss reads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.into, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.into(self.norm(x)).chunk(3, -1)
        weights = nn.functional.dropout((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1), 0.1, self.training)
        x = x + self.scale * self.out(weights @ v)
        if self.training:
            self.scale *= 0.9
        return x


class Rows(nn.Module):
    """Digits as sequences of their rows; the outermost module has parameters of its own, one of which does not train."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(1, 1, width))  # of which the second process holds nothing
        self.positions = nn.Parameter(torch.randn(8, width), requires_grad=False)
        self.embedding, self.head = nn.Linear(8, width), nn.Linear(width, 10)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x.unflatten(-1, (8, 8))) + self.positions + self.start
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Transformer(Classifier):
    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            super().__init__(net=Rows())
        self.double()

    def on_fit_start(self) -> None:
        torch.manual_seed(self.global_rank)

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            for block in self.net.blocks:  # type: ignore[union-attr]
                fully_shard(block, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


MODULES: dict[str, type[Classifier]] = {"clipped": Layers, "accumulated": Transformer}
OPTIONS: dict[str, dict[str, Any]] = {
    "clipped": {"gradient_clip_val": BOUND, "val_check_interval": 2},
    "accumulated": {"accumulate_grad_batches": 2},
}


def sharded(**sizes: int) -> ModelParallelStrategy:
    return ModelParallelStrategy(**({"data_parallel_size": PROCESSES, "tensor_parallel_size": 1} | sizes))


def train(module: L.LightningModule, strategy: Any, *callbacks: L.Callback, **options: Any) -> list[Tensor]:
    """The whole parameters at the end."""
    val = DataLoader(QUERIES, 6)  # which leaves the parameters of the outermost module gathered
    options = {"val": val, "strategy": strategy, "devices": PROCESSES} | options
    fit(module, DataLoader(TRAIN, LOCAL), *callbacks, **options)
    let_go(module)
    held = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.parameters()]
    return [p.detach().clone() for p in held]


def together(work: Callable[..., None], *arguments: Any) -> None:
    """Run ``work`` in two processes, each as if a job scheduler had started it."""
    torch.multiprocessing.start_processes(
        _started, (find_free_network_port(), work, arguments), nprocs=PROCESSES, start_method="fork"
    )


def _started(rank: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_PORT": str(port), "MASTER_ADDR": "127.0.0.1"}
    os.environ.pop("PL_GLOBAL_SEED", None)
    torch.set_num_threads(1)
    work(rank, *arguments)


def record(rank: int, folder: Path) -> None:
    """Each case sharded, with and without the callback, and not sharded."""
    for case, module in MODULES.items():
        options = OPTIONS[case]
        ends = {
            "recorded": train(module(), sharded(), InfluenceCallback(folder / case, snapshot_every=2), **options),
            "plain": train(module(), sharded(), **options),
            "whole": train(
                module(), "ddp", InfluenceCallback(folder / f"{case}-ddp", record="replay", snapshot_every=2), **options
            ),
        }
        if rank == 0:
            torch.save(ends, folder / f"{case}.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    together(record, folder)
    return folder


def ended(folder: Path, case: str, run: str = "recorded") -> Classifier:
    """The module made without the strategy, as the run left it."""
    module = MODULES[case]()
    for p, end in zip(module.parameters(), torch.load(folder / f"{case}.pt")[run], strict=True):
        p.data.copy_(end)
    return module


def scored(log: Path, module: L.LightningModule, **options: Any) -> InfluenceReport:
    return attribute(log, queries=DataLoader(QUERIES, 6), model=module, progress=False, **options)


@pytest.mark.parametrize("case", MODULES)
def test_the_run_ends_bit_for_bit_where_it_ends_without(case: str, runs: Path) -> None:
    ends = torch.load(runs / f"{case}.pt")
    assert all(torch.equal(p, q) for p, q in zip(ends["recorded"], ends["plain"], strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(ends["recorded"], MODULES[case]().parameters(), strict=True))


@pytest.mark.filterwarnings("error:.*logged run")
@pytest.mark.parametrize("case", MODULES)
def test_scores_in_one_process_are_those_of_the_same_run_under_ddp(case: str, runs: Path) -> None:
    some = range(0, N, 16) if case == "accumulated" else None  # whose removals have to be measured
    one = scored(runs / case, ended(runs, case), samples=some)
    other = scored(runs / f"{case}-ddp", ended(runs, case, "whole"), samples=some)
    assert (one.metadata["removals"]["verified"] > 0) == (some is None)
    assert one.metadata["replay_drift"].keys() == other.metadata["replay_drift"].keys()
    assert max(one.metadata["replay_drift"].values()) < 1e-8
    torch.testing.assert_close(one.sample_ids, other.sample_ids)
    torch.testing.assert_close(one.scores, other.scores, rtol=1e-6, atol=1e-6 * float(other.scores.abs().max()))


def drawn(rank: int, step: int) -> list[int]:
    """The samples that a process sees, as Lightning deals them out."""
    return list(DistributedSampler(TRAIN, PROCESSES, rank, shuffle=True))[LOCAL * step : LOCAL * (step + 1)]


def retrained(without: tuple[int, int] | None = None) -> Tensor:
    """The query losses after the clipped run, of which one sample leaves one step; in a loop of its own."""
    module = Layers()
    optimizer, (x, y) = module.configure_optimizers(), TRAIN.tensors
    for step in range(N // LOCAL // PROCESSES):
        optimizer.zero_grad()
        for rank in range(PROCESSES):
            rows = [z for z in drawn(rank, step) if (z, step) != without]
            (nn.functional.cross_entropy(module.net(x[rows]), y[rows]) / PROCESSES).backward()
        nn.utils.clip_grad_norm_(module.parameters(), BOUND)
        optimizer.step()
    x, y = QUERIES.tensors
    return nn.functional.cross_entropy(module.net(x), y, reduction="none").detach()


def test_scores_are_what_leaving_a_sample_out_does(runs: Path) -> None:
    report, whole = scored(runs / "clipped", ended(runs, "clipped")), retrained()
    assert LoggedSteps(runs / "clipped").record(0).clip.raw_norm > BOUND
    for step, rank in ((0, 0), (1, 1), (3, 0), (5, 1)):
        sample = drawn(rank, step)[3]
        at = report.sample_ids.tolist().index(sample)
        torch.testing.assert_close(report.scores[at], retrained((sample, step)) - whole, rtol=0.05, atol=2e-6)


@pytest.mark.parametrize("case", MODULES)
def test_each_process_writes_what_it_holds_and_no_more(case: str, runs: Path) -> None:
    reader = StoreReader(runs / case)
    manifest = Manifest.of(reader)
    assert manifest.record == "replay" and manifest.module.endswith(f".{MODULES[case].__name__}")
    snapshot = "snapshot-00000002"
    parts = [
        {name: reader.artifact(snapshot, name, rank) for name in reader.artifact_names(snapshot, rank)}
        for rank in range(PROCESSES)
    ]
    whole = LoggedPlan(LoggedSteps(runs / case), MODULES[case]()).snapshot(2)
    ddp = LoggedPlan(LoggedSteps(runs / f"{case}-ddp"), MODULES[case]()).snapshot(2)
    assert whole.parameters.keys() == ddp.parameters.keys()
    for name, p in whole.parameters.items():
        torch.testing.assert_close(p, ddp.parameters[name], rtol=1e-9, atol=1e-12)
        for kind in (f"parameter/{name}", f"moment/0/{name}", f"moment/1/{name}"):
            rows = [len(part[kind]) for part in parts]
            assert sum(rows) == len(p) and max(rows) == (len(p) + 1) // 2
        for mine, theirs in zip(whole.moments[name], ddp.moments[name], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_a_model_that_is_not_the_one_of_the_end_is_told_whoever_held_what_differs(runs: Path) -> None:
    for row in (0, 14):  # of the first process, and of the second
        module = ended(runs, "clipped")
        with torch.no_grad():
            module.net[0].weight[row, 0] += 1e-9  # type: ignore[index, operator]
        with pytest.warns(UserWarning, match=r"1 parameters \(net.0.weight"):
            scored(runs / "clipped", module, samples=[0], target="mean")


def cut(log: Path, rank: int, *, after: str) -> None:
    """The index of a process that was killed after it had written a file."""
    index = log / f"rank-{rank}" / "index.jsonl"
    lines = index.read_bytes().splitlines(keepends=True)
    (last,) = [i for i, line in enumerate(lines) if after.encode() in line]
    index.write_bytes(b"".join(lines[: last + 1]))


def test_a_killed_run_is_read_up_to_where_every_process_came(runs: Path, tmp_path: Path) -> None:
    """The first has written a state, and the second has not come so far."""
    for log in ("clipped", "clipped-ddp"):
        shutil.copytree(runs / log, tmp_path / log)
        cut(tmp_path / log, 0, after="snapshot-00000004")
        cut(tmp_path / log, 1, after="step-00000002")
    one, other = (scored(tmp_path / log, ended(runs, "clipped")) for log in ("clipped", "clipped-ddp"))
    assert one.metadata["steps"] == 3
    torch.testing.assert_close(one.scores, other.scores, rtol=1e-6, atol=1e-9)
    cut(tmp_path / "clipped", 1, after="step-00000000")
    plan = LoggedPlan(LoggedSteps(tmp_path / "clipped"), Layers())
    assert len(plan) == 1 and list(plan.snapshots) == [0]


# -- what goes wrong, and what is refused --------------------------------------------------------------------------


class FailsOnOne(L.Callback):
    """Recording fails on the second process after two steps."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 2:
            callback = next(c for c in trainer.callbacks if isinstance(c, InfluenceCallback))  # type: ignore[attr-defined]
            callback._recorder.begin = lambda *_: 1 / 0  # type: ignore[union-attr, method-assign]


class Moves(L.Callback):
    """Changes a weight of the outermost module between steps."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        with torch.no_grad():
            pl_module.net.head.weight.mul_(0.99)  # type: ignore[union-attr, operator]


def fail_and_resume(rank: int, folder: Path) -> None:
    ends = {
        "recorded": train(Layers(), sharded(), InfluenceCallback(folder / "failed"), FailsOnOne(), **OPTIONS["clipped"])
    }
    saves = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    options: dict[str, Any] = OPTIONS["clipped"] | {"enable_checkpointing": True, "max_epochs": 2}
    for name, log, resumed in (
        ("whole", "whole", {}),
        ("resumed", "whole", {"ckpt_path": str(folder / "epoch=0.ckpt")}),
    ):
        ends[name] = train(
            Layers(), sharded(), InfluenceCallback(folder / log, snapshot_every=4), saves, **options, **resumed
        )
        if rank == 0 and name == "whole":
            shutil.copytree(folder / log, folder / "first")
    if rank == 0:
        torch.save(ends, folder / "clipped.pt")


def test_a_failure_of_one_process_stops_no_other_and_a_resumed_run_goes_on_with_its_log(
    runs: Path, tmp_path: Path
) -> None:
    together(fail_and_resume, tmp_path)
    ends, expected = (torch.load(folder / "clipped.pt") for folder in (tmp_path, runs))
    assert all(torch.equal(p, q) for p, q in zip(ends["recorded"], expected["recorded"], strict=True))
    failed = LoggedSteps(tmp_path / "failed")
    assert len(failed) == 2 and set(failed.reader.missing) == {"the steps from 2 on"} and failed.end is None
    assert all(torch.equal(p, q) for p, q in zip(ends["whole"], ends["resumed"], strict=True))
    plans = [LoggedPlan(LoggedSteps(tmp_path / log), Layers()) for log in ("first", "whole")]
    assert list(plans[0].snapshots) == list(plans[1].snapshots) == [0, 4, 8, 12]
    for step in (8, 12):
        one, other = (plan.snapshot(step).parameters for plan in plans)
        assert all(torch.equal(one[k], other[k]) for k in one)
    scored(tmp_path / "whole", ended(tmp_path, "clipped", "resumed"), samples=[0], target="mean")


class PartlySharded(Layers):
    def configure_model(self) -> None:
        fully_shard(self.net[0])  # type: ignore[index, arg-type]


class InHalf(Layers):
    def configure_model(self) -> None:
        fully_shard(self.net, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))


def refuse(rank: int, folder: Path) -> None:
    one_process = sharded(data_parallel_size=1, tensor_parallel_size=PROCESSES)
    cases: dict[str, tuple[L.LightningModule, Any, dict[str, Any], list[L.Callback]]] = {
        "tensor_parallel_size=2.* see the same samples": (Layers(), one_process, {}, []),
        "no process holds the whole model": (Layers(), sharded(), {"report": True}, []),
        "no process holds the whole gradients": (Layers(), sharded(), {"record": "both"}, []),
        "net.2.weight is not sharded, so each of the 2": (PartlySharded(), sharded(), {}, []),
        "MixedPrecisionPolicy.param_dtype=torch.bfloat16": (InHalf(), sharded(), {}, []),
        "head.weight has changed since the last step": (Transformer(), sharded(), {"on_error": "raise"}, [Moves()]),
    }
    for number, (message, (module, strategy, options, others)) in enumerate(cases.items()):
        with pytest.raises(ConfigurationError, match=message):
            train(module, strategy, InfluenceCallback(folder / str(number), **options), *others)


def test_what_cannot_be_recorded_is_refused_by_every_process(tmp_path: Path) -> None:
    together(refuse, tmp_path)


class Scaled(nn.Linear):
    """A layer with a number of its own."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.scale = 2.0


def see_through(rank: int) -> None:
    torch.distributed.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    whole = Scaled()
    layer = fully_shard(copy.deepcopy(whole), mesh=init_device_mesh("cpu", (PROCESSES,)))
    assert class_of(layer) is Scaled is class_of(whole) and type(layer) is not Scaled
    assert numbers_of(layer) == numbers_of(whole) == {":in_features": 4, ":out_features": 3, ":scale": 2.0}
    weight, rows = layer.weight, (slice(0, 2), slice(2, 3))[rank]
    assert chunk_of(weight) == Chunk((3, 4), (2 * rank, 0), (2 - rank, 4)) and chunk_of(whole.weight) is None
    assert torch.equal(local(weight), whole.weight[rows]) and not local(weight).requires_grad
    between = BetweenSteps(layer)
    between.note_step()
    layer.unshard()  # type: ignore[operator]
    between.check()  # sees the shards all the same
    assert layer.weight is not weight
    let_go(layer)
    assert layer.weight is weight
    if rank == 0:  # no collective: the other process is not there
        with unchanged(layer), torch.no_grad():
            local(weight).add_(1.0)
        assert torch.equal(local(weight), whole.weight[rows])
        local(weight).add_(1.0)
        with pytest.raises(ConfigurationError, match="weight has changed"):
            between.check()


def test_what_fsdp2_makes_of_a_module_is_seen_through() -> None:
    torch.manual_seed(0)
    together(see_through)
