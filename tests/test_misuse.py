"""Each misuse that docs/errors.md lists raises the error, with the message, that the table gives."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from modules import Classifier, fit, loader, split_digits, trainer_under
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_influence import (
    InfluenceCallback,
    InfluenceReport,
    SelectionDataModule,
    attribute,
    check_faithfulness,
    error_proxy,
    errors,
    token_scores,
    tune_horizon,
    without,
)
from lightning_influence.cli import main
from lightning_influence.log.format import FINAL
from lightning_influence.log.reader import StoreReader
from lightning_influence.log.writer import StoreWriter
from lightning_influence.selection.policies import Soft

TABLE = Path(__file__).parent.parent / "docs" / "errors.md"
ROWS = [
    tuple(cell.strip() for cell in line.strip("|").split("|"))
    for line in TABLE.read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| what was done")
]

TRAIN, VAL = split_digits(64, 8)
QUERIES = DataLoader(VAL, 4)


@dataclass
class Here:
    """What a misuse starts from: an empty directory, and logs of a finished run."""

    path: Path
    module: Classifier
    gradients: Path
    replay: Path

    def attribute(self, **options: Any) -> InfluenceReport:
        asked = {"log": self.gradients, "queries": QUERIES, "model": self.module, "progress": False, **options}
        return attribute(asked.pop("log"), **asked)

    def record(self, module: L.LightningModule | None = None, data: Any = None, **options: Any) -> None:
        fit(
            module or Classifier(),
            loader(TRAIN) if data is None else data,
            InfluenceCallback(self.path / "new", **{"record": "gradients", **options}),
        )

    def copy(self) -> Path:
        """A log of its own, to be damaged."""
        self.record()
        return self.path / "new"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Classifier, Path, Path]:
    path, module = tmp_path_factory.mktemp("logs"), Classifier()
    callbacks = [InfluenceCallback(path / record, record=record) for record in ("gradients", "replay")]
    fit(module, loader(TRAIN), *callbacks, val=QUERIES)
    return module, path / "gradients", path / "replay"


MISUSES: dict[str, Callable[[Here], object]] = {}


def misuse(done: str) -> Callable[[Callable[[Here], object]], Callable[[Here], object]]:
    def register(function: Callable[[Here], object]) -> Callable[[Here], object]:
        MISUSES[done] = function
        return function

    return register


@pytest.mark.parametrize(("done", "error", "says"), ROWS, ids=[row[0] for row in ROWS])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_table_is_what_happens(
    done: str, error: str, says: str, tmp_path: Path, finished: tuple[Classifier, Path, Path]
) -> None:
    pattern = ".*".join(re.escape(part.strip()) for part in says.strip("`").split("..."))
    with pytest.raises(getattr(errors, error.strip("`"))) as raised:
        MISUSES[done](Here(tmp_path, *finished))
    assert raised.type.__name__ == error.strip("`")
    assert re.search(pattern, str(raised.value), flags=re.DOTALL), str(raised.value)


def test_the_table_is_whole() -> None:
    assert {row[0] for row in ROWS} == MISUSES.keys()
    assert len(ROWS) >= 30


# -- recording ---------------------------------------------------------------------------------------------

misuse("an unknown `record`")(lambda here: InfluenceCallback(here.path, record="everything"))
misuse("an unknown `compression`")(lambda here: InfluenceCallback(here.path, compression="pca", record="gradients"))
misuse("an unknown `reduction`")(lambda here: InfluenceCallback(here.path, reduction="max", record="gradients"))
misuse("an unknown `existing`")(lambda here: InfluenceCallback(here.path, existing="append", record="gradients"))
misuse("an old word beside the new one")(lambda here: InfluenceCallback(here.path, dirpath=here.path))
misuse("a callback without a directory")(lambda here: InfluenceCallback())
misuse("a mask without coordinates")(lambda here: InfluenceCallback(here.path, mask_size=0, record="gradients"))
misuse("snapshots every 0 steps")(lambda here: InfluenceCallback(here.path, snapshot_every=0, record="gradients"))
misuse("an optimizer that is not Adam, AdamW or SGD")(
    lambda here: here.record(Classifier(lambda m: torch.optim.RMSprop(m.parameters())))
)
misuse("a second run into the same directory")(lambda here: (here.record(), here.record()))
misuse("going on with other settings")(lambda here: (here.record(), here.record(existing="resume", compression="full")))
misuse("going on from another run's checkpoint")(
    lambda here: (
        fit(Classifier(), loader(TRAIN), InfluenceCallback(here.path / "new", record="gradients")).save_checkpoint(
            here.path / "ckpt"
        ),
        here.record(existing="overwrite"),
        L.Trainer(
            callbacks=[InfluenceCallback(here.path / "new", record="gradients")],
            max_epochs=2,
            accelerator="cpu",
            logger=False,
        ).fit(Classifier(), loader(TRAIN), ckpt_path=here.path / "ckpt"),
    )
)
misuse("per-sample gradients of a sharded model")(
    lambda here: InfluenceCallback(here.path / "new", record="gradients").setup(
        trainer_under(ModelParallelStrategy()), here.module, "fit"
    )
)
misuse("a run under FSDP1")(
    lambda here: InfluenceCallback(here.path / "new", record="replay").setup(
        trainer_under(FSDPStrategy()), here.module, "fit"
    )
)
misuse("a report without validation data")(lambda here: here.record(report=True))
misuse("a report without validation batches")(
    lambda here: fit(
        Classifier(),
        loader(TRAIN),
        InfluenceCallback(here.path / "new", report=True, record="gradients"),
        val=QUERIES,
        limit_val_batches=0,
    )
)
misuse("a report over two validation loaders")(
    lambda here: fit(
        Classifier(),
        loader(TRAIN),
        InfluenceCallback(here.path / "new", report=True, record="gradients"),
        val=[QUERIES, QUERIES],
        num_sanity_val_steps=0,
    )
)
misuse("excluding what is not there")(lambda here: here.record(exclude=["net.0.*", "net.9.*"]))
misuse("excluding everything")(lambda here: here.record(exclude="*"))
misuse("a log below a file")(
    lambda here: (
        (here.path / "new").write_text(""),
        fit(Classifier(), loader(TRAIN), InfluenceCallback(here.path / "new" / "x", record="gradients")),
    )
)


class Deletes(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            next(Path(trainer.default_root_dir).glob("new/rank-0/index.jsonl")).unlink()


@misuse("an index deleted while the run writes")
def _(here: Here) -> None:
    callbacks = [InfluenceCallback(here.path / "new", on_error="raise", record="gradients"), Deletes()]
    # many steps follow: the writer's thread notices, and the next step raises
    fit(Classifier(), loader(TRAIN), *callbacks, default_root_dir=here.path, max_epochs=20)


@misuse("manual optimization")
def _(here: Here) -> None:
    module = Classifier()
    module.automatic_optimization = False
    here.record(module)


@misuse("batch normalisation in training mode")
def _(here: Here) -> None:
    here.record(Classifier(net=nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))))


@misuse("a compiled layer")
def _(here: Here) -> None:
    module = Classifier()
    module.net[0].compile()
    here.record(module)


class Scaled(Classifier):
    """A parameter of the module itself."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.scale * nn.functional.cross_entropy(self.net(batch[0]), batch[1])


@misuse("a parameter that belongs to no layer")
def _(here: Here) -> None:
    here.record(Scaled())


class Twice(Classifier):
    """A weight that is used outside its layer, too."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) + self.net[0].weight.square().sum()


@misuse("a weight that is used outside its layer")
def _(here: Here) -> None:
    here.record(Twice())


class Poisoned(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) * (float("nan") if batch_idx == 2 else 1.0)


@misuse("a loss that is not finite")
def _(here: Here) -> None:
    here.record(Poisoned(), on_error="raise")


class Thaws(L.Callback):
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        pl_module.net[0].requires_grad_(batch_idx > 0)


@misuse("a layer that begins to train during fit")
def _(here: Here) -> None:
    module = Classifier()
    module.net[0].requires_grad_(False)
    fit(module, loader(TRAIN), Thaws(), InfluenceCallback(here.path / "new", on_error="raise", record="gradients"))


class Shrinks(L.Callback):
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        for p in pl_module.parameters():
            p.grad *= 0.5


@misuse("a callback that changes gradients after ours")
def _(here: Here) -> None:
    fit(Classifier(), loader(TRAIN), InfluenceCallback(here.path / "new", record="gradients"), Shrinks())


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(TRAIN)


misuse("an iterable dataset without ids")(lambda here: here.record(data=DataLoader(Stream(), 8)))
misuse("ids under a key that the batch lacks")(lambda here: here.record(sample_ids="id"))
misuse("ids that are not whole numbers")(lambda here: here.record(sample_ids=lambda batch: batch[0]))
misuse("weights of another length than the batch")(lambda here: here.record(sample_weights=lambda batch: torch.ones(3)))

# -- attribution -------------------------------------------------------------------------------------------

misuse("a log that is not there")(lambda here: here.attribute(log=here.path / "nowhere"))
misuse("a directory that is not a log")(lambda here: here.attribute(log=here.path))
misuse("the log of another model")(lambda here: here.attribute(model=Classifier(width=8)))
misuse("a network in place of the LightningModule")(lambda here: here.attribute(model=here.module.net))
misuse("the exact Hessian from a log of gradients")(lambda here: here.attribute(curvature="hessian"))
misuse("an unknown curvature")(lambda here: here.attribute(curvature="kfac"))
misuse("an unknown response")(lambda here: here.attribute(response="linear"))
misuse("an unknown counterfactual")(lambda here: here.attribute(counterfactual="swap"))
misuse("an unknown target")(lambda here: here.attribute(target="median"))
misuse("an unknown optimizer assumption")(lambda here: here.attribute(optimizer_assumption="adagrad"))
misuse("a negative memory window")(lambda here: here.attribute(memory_window=-1))
misuse("no queries")(lambda here: here.attribute(queries=[]))
misuse("queries of another shape")(lambda here: here.attribute(queries=[torch.zeros(3, 7)]))
misuse("a query loss that is not one per example")(lambda here: here.attribute(query_loss=lambda m, b: b[0].mean()))
misuse("weights of another length than the queries")(lambda here: here.attribute(target=[1.0, 2.0]))


@misuse("a log that was cut short")
def _(here: Here) -> None:
    log = here.copy()
    shard = log / "rank-0" / "step-00000001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-9])
    here.attribute(log=log)


@misuse("a log with a changed byte")
def _(here: Here) -> None:
    log = here.copy()
    shard = log / "rank-0" / "step-00000001.safetensors"
    content = bytearray(shard.read_bytes())
    size = int.from_bytes(content[:8], "little")
    start, _ = json.loads(content[8 : 8 + size])["loss_weights"]["data_offsets"]  # which attribution reads
    content[8 + size + start] ^= 1
    shard.write_bytes(bytes(content))
    here.attribute(log=log)


def of_two_processes(log: Path) -> Path:
    with StoreWriter(log, ranks=2) as first, StoreWriter(log, rank=1, ranks=2) as second:
        first.write_manifest({})
        for step in range(2):
            first.append(step, {}, {})
            second.append(step, {}, {})
        first.save(FINAL, {}, {})
    return log


@misuse("a log without one of its processes")
def _(here: Here) -> None:
    shutil.rmtree(of_two_processes(here.path) / "rank-0")
    StoreReader(here.path)


@misuse("a log with a copy of a process's part")
def _(here: Here) -> None:
    log = here.copy()
    shutil.copytree(log / "rank-0", log / "rank-0 (copy)")
    here.attribute(log=log)


@misuse("a log in which a finished run is cut")
def _(here: Here) -> None:
    index = of_two_processes(here.path) / "rank-1" / "index.jsonl"
    index.write_bytes(index.read_bytes().splitlines(keepends=True)[0])
    StoreReader(here.path)


@misuse("a log that leads elsewhere")
def _(here: Here) -> None:
    index = here.copy() / "rank-0" / "index.jsonl"
    index.rename(here.path / "elsewhere")
    index.symlink_to(here.path / "elsewhere")
    here.attribute(log=here.path / "new")


@misuse("a manifest that was edited")
def _(here: Here) -> None:
    manifest = here.copy() / "manifest.json"
    manifest.write_text(manifest.read_text().replace("AdamW", "Adamw"))
    StoreReader(manifest.parent)


class Fails(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        raise ZeroDivisionError


@misuse("a run that took no step")
def _(here: Here) -> None:
    with pytest.raises(ZeroDivisionError):
        here.record(module := Fails())
    here.attribute(log=here.path / "new", model=module)


@misuse("a replay with other data")
def _(here: Here) -> None:
    here.record(module := Classifier(), record="replay", store_batches=False)
    other = TensorDataset(1 - TRAIN.tensors[0], TRAIN.tensors[1])
    attribute(here.path / "new", queries=QUERIES, model=module, data=other, progress=False)


@misuse("a replay without the data it needs")
def _(here: Here) -> None:
    here.record(module := Classifier(), record="replay", store_batches=False)
    attribute(here.path / "new", queries=QUERIES, model=module, progress=False)


# -- reports -----------------------------------------------------------------------------------------------

misuse("scores of the tokens of no sample")(
    lambda here: token_scores(here.replay, [], queries=QUERIES, model=here.module, data=TRAIN, progress=False)
)
misuse("scores of tokens from a log of gradients")(
    lambda here: token_scores(here.gradients, [1], queries=QUERIES, model=here.module, data=TRAIN, progress=False)
)
misuse("a query that the report does not have")(lambda here: here.attribute().top(3, query="nobody"))
misuse("groups of another length than the data")(
    lambda here: here.attribute().to_html(here.path / "r.html", groups=[1, 2])
)


@misuse("a file that is not a report")
def _(here: Here) -> None:
    (here.path / "scores").write_text("sample_id,score")
    InfluenceReport.load(here.path / "scores")


# -- trust -------------------------------------------------------------------------------------------------


def check(here: Here, **options: Any) -> None:
    check_faithfulness(here.replay, model=here.module, data=TRAIN, queries=QUERIES, progress=False, **options)


misuse("a check with two removals")(lambda here: check(here, removals=2))
misuse("a check of a sample that was not used")(lambda here: check(here, removals=[1, 2, 999]))
misuse("a check that removes everything")(lambda here: check(here, removals=0, subsets=3, subset_size=1.0))
misuse("an error proxy of no pairs")(
    lambda here: error_proxy(here.replay, queries=QUERIES, model=here.module, pairs=0, progress=False)
)
misuse("an error proxy of a step that did not hold the sample")(
    lambda here: error_proxy(here.replay, queries=QUERIES, model=here.module, pairs=[(999, 0)], progress=False)
)

# -- selection ---------------------------------------------------------------------------------------------


class Together(Classifier):
    """Every sample is seen beside the mean of its batch."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step((batch[0] - batch[0].mean(0), batch[1]), batch_idx)


def not_a_number() -> Any:
    x, y = (t[:4].clone() for t in TRAIN.tensors)
    x[1] = torch.nan
    return x, y


def select(**options: Any) -> SelectionDataModule:
    return SelectionDataModule(loader(TRAIN), QUERIES, **options)


misuse("a negative horizon")(lambda here: select(horizon=-1))
misuse("a selection round every 0 steps")(lambda here: select(every=0))
misuse("keeping nothing")(lambda here: select(keep=0.0))
misuse("an unknown keep policy")(lambda here: select(keep="best"))
misuse("an unknown part to keep a fraction of")(lambda here: select(per="epoch"))
misuse("no portions")(lambda here: select(rescore=0))
misuse("scores on no coordinates")(lambda here: select(coordinates=0.0))
misuse("portions of something else than a fraction")(lambda here: select(keep="positive", rescore=2))
misuse("a floor above the ceiling")(lambda here: select(floor=1.5))
misuse("soft weights of whole batches")(lambda here: select(keep=Soft()))
misuse("full batches inside the step")(lambda here: select(every=1, rebatch=True))
misuse("a keep policy that returns ids")(
    lambda here: fit(Classifier(), select(keep=lambda scores, ids, batches: ids, every=1))
)
misuse("selection without a target")(lambda here: fit(Classifier(), SelectionDataModule(loader(TRAIN))))
misuse("recording beside selection inside the step")(
    lambda here: fit(Classifier(), select(every=1), InfluenceCallback(here.path / "new", record="gradients"))
)
misuse("selection by a target that is not finite")(
    lambda here: fit(Classifier(), SelectionDataModule(loader(TRAIN), [not_a_number()], every=1))
)
misuse("selection inside the step of samples that see each other")(lambda here: fit(Together(), select(every=1)))
misuse("selection from a stream")(lambda here: fit(Classifier(), SelectionDataModule(DataLoader(Stream(), 8), QUERIES)))
misuse("leaving out a sample that the data does not have")(lambda here: without(loader(TRAIN), [999]))
misuse("leaving samples out of a stream")(lambda here: without(DataLoader(Stream(), 8), [3]))
misuse("leaving out all of a batch")(lambda here: fit(Classifier(), without(DataLoader(TRAIN, 2), [2, 3])))
misuse("tuning with nothing to compare on")(lambda here: tune_horizon(lambda lr: Classifier(), loader(TRAIN), QUERIES))
misuse("tuning over nothing")(
    lambda here: tune_horizon(lambda lr: Classifier(), loader(TRAIN), QUERIES, QUERIES, horizons=())
)
misuse("a horizon that does not fit into the short runs")(
    lambda here: tune_horizon(lambda lr: Classifier(), loader(TRAIN), QUERIES, QUERIES, horizons=(50,), max_steps=10)
)


def test_the_command_line_ends_with_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, path, code in (("inspect", tmp_path, 1), ("select", tmp_path / "none", 1), ("attribute", tmp_path, 2)):
        assert main([command, str(path)]) == code
        told = capsys.readouterr().err
        assert told.startswith("lightning-influence: ") and "Traceback" not in told
