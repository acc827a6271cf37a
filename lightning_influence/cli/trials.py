"""The commands that train: each retrains a recorded run, or makes short runs, and prints what came of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.parsing import lightning_hasattr, lightning_setattr

from lightning_influence.cli.inputs import (
    Ids,
    LightningDataModule,
    LightningModule,
    groups_in,
    ids_in,
    prepared,
    queries_of,
    require,
    trained,
)
from lightning_influence.cli.outputs import check_writable, write_ids, write_table, write_weights
from lightning_influence.errors import ConfigurationError
from lightning_influence.lightning.tuning import tune_horizon
from lightning_influence.report.tables import write_csv
from lightning_influence.scoring.memory import MaxMemory
from lightning_influence.trust.cleaning import clean as clean_run
from lightning_influence.trust.error_proxy import error_proxy
from lightning_influence.trust.faithfulness import ESTIMATORS, check_faithfulness
from lightning_influence.words import renamed


def check(
    log: str,
    model: LightningModule | None = None,
    data: LightningDataModule | None = None,
    checkpoint: Path | None = None,
    target: Literal["mean"] | list[float] | None = None,
    counterfactual: Literal["drop", "zero"] = "drop",
    query_loss: Callable | None = None,  # type: ignore[type-arg]
    make_model: Callable | None = None,  # type: ignore[type-arg]
    estimators: dict[str, dict[str, Any]] | None = None,
    removals: int | list[int] = 30,
    subsets: int = 0,
    subset_size: float = 0.1,
    groups: Path | None = None,
    ceiling: bool = True,
    dtype: Literal["float64", "float32"] | None = "float64",
    results: Path | None = None,
    workers: int = 0,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Retrain without some samples, and say how far the scores of a run can be trusted. Example: lightning-influence check runs/influence --config run.yaml --checkpoint last.ckpt --removals 50.

    Args:
        log: directory or URL written by InfluenceCallback with record="replay".
        model: the module that was trained.
        data: its data; the queries are those of val_dataloader.
        checkpoint: of the end of the run; by default its parameters are read from the log.
        target: mean for the mean query loss, or weights of the queries; by default the loss of each query.
        counterfactual: drop for a batch of one sample fewer, zero for the same denominator.
        query_loss: import path of a function of model and batch that gives one loss per example.
        make_model: import path of a function that gives the module at its initialisation; by default it is read from the log.
        estimators: options of attribute by a name of your own, as JSON; by default four of the known ones.
        removals: samples to remove, one at a time: how many to draw, or their ids.
        subsets: random subsets to remove besides.
        subset_size: share of the samples in each.
        groups: file of groups to remove besides, as of attribute.
        ceiling: measure how far the truth repeats itself, too.
        dtype: of retraining; null for the run's own.
        results: file that keeps finished retrainings, so that an interrupted check can be continued.
        workers: processes that retrain side by side.
        seed: of what is drawn.
        progress: show bars.
    """
    singles = removals if isinstance(removals, int) else len(removals)
    for name, value, least in (("removals", singles, 3), ("subsets", subsets, 0), ("workers", workers, 0)):
        if value < least:
            raise ConfigurationError(f"--{name} {value}; give {least} or more.")
    check_writable("results", results)
    module, source = trained(model, data, checkpoint, log)
    faithfulness = check_faithfulness(
        log,
        model=module,
        data=source,
        queries=queries_of(source),
        target=target,
        counterfactual=counterfactual,
        query_loss=query_loss,
        make_model=make_model,
        estimators=ESTIMATORS if estimators is None else estimators,
        removals=removals,
        subsets=subsets,
        subset_size=subset_size,
        groups=groups_in(groups),
        ceiling=ceiling,
        dtype=None if dtype is None else getattr(torch, dtype),
        results=results,
        workers=workers,
        seed=seed,
        progress=progress,
    )
    print(faithfulness)


def proxy(
    log: str,
    model: LightningModule | None = None,
    data: LightningDataModule | None = None,
    checkpoint: Path | None = None,
    target: Literal["mean"] | list[float] | None = None,
    curvature: Literal["auto", "fisher", "hessian"] = "auto",
    counterfactual: Literal["drop", "zero"] = "drop",
    query_loss: Callable | None = None,  # type: ignore[type-arg]
    pairs: int | list[tuple[int, int]] = 16,
    lr_factors: list[float] = [1.0],  # noqa: B006
    seed: int = 0,
    max_memory: MaxMemory = "auto",
    progress: bool = True,
    out: Path | None = None,
) -> None:
    """Predict without retraining how far off first-order scores are. Example: lightning-influence proxy runs/influence --config run.yaml --checkpoint last.ckpt --target mean --pairs 32.

    Args:
        log: directory or URL written by InfluenceCallback.
        model: the module that was trained.
        data: its data; the queries are those of val_dataloader.
        checkpoint: of the end of the run; by default its parameters are read from the log, where it can be replayed.
        target: mean for the mean query loss, or weights of the queries; by default the loss of each query.
        curvature: what stands for the Hessian.
        counterfactual: drop for a batch of one sample fewer, zero for the same denominator.
        query_loss: import path of a function of model and batch that gives one loss per example.
        pairs: (sample id, step) pairs, or how many to draw at random.
        lr_factors: multiples of the learning rate at which the run is looked at.
        seed: of the draw.
        max_memory: bytes that may be held besides the model.
        progress: show bars.
        out: where every pair and query is written, as CSV.
    """
    check_writable("out", out)
    module, source = trained(model, data, checkpoint, log)
    predicted = error_proxy(
        log,
        queries=queries_of(source),
        model=module,
        data=source,
        target=target,
        curvature=curvature,
        counterfactual=counterfactual,
        query_loss=query_loss,
        pairs=pairs,
        lr_factors=lr_factors,
        seed=seed,
        max_memory=max_memory,
        progress=progress,
    )
    print(f"{predicted}\n\nsize of the predicted error by horizon\n{predicted.curve().to_string()}")
    write_table(predicted.to_pandas(), out)


def clean(
    log: str | None = None,
    model: LightningModule | None = None,
    data: LightningDataModule | None = None,
    checkpoint: Path | None = None,
    samples: Ids = None,
    k: int | None = None,
    dry_run: bool = False,
    query_loss: Callable | None = None,  # type: ignore[type-arg]
    make_model: Callable | None = None,  # type: ignore[type-arg]
    progress: bool = True,
    out: Path | None = None,
    checkpoint_out: Path | None = None,
) -> None:
    """Train a recorded run again without its suspects, and say what changed beside what was predicted. Example: lightning-influence clean --config run.yaml --dry_run true.

    Args:
        log: directory or URL written by InfluenceCallback; by default the one that the configuration's callback writes.
        model: the module that was trained.
        data: its data; the runs are compared on val_dataloader.
        checkpoint: of the end of the run; by default its parameters are read from the log.
        samples: ids to leave out, or a file of them; by default the suspects of the log.
        k: the number of suspects; by default all.
        dry_run: say what would be left out and what is predicted of it, and train nothing.
        query_loss: import path of a function of model and batch that gives one loss per example.
        make_model: import path of a function that gives the module at its initialisation; by default it is read from the log.
        progress: show bars.
        out: where the ids that are left out are written, one per line.
        checkpoint_out: where a checkpoint of the model that was trained without them is written.
    """
    require(log=log)
    assert log is not None
    check_writable("out", out)
    check_writable("checkpoint_out", checkpoint_out)
    if dry_run and checkpoint_out is not None:
        raise ConfigurationError("--checkpoint_out with --dry_run true, which trains nothing; leave one of them out.")
    module, source = trained(model, data, checkpoint, log)
    cleaning = clean_run(
        log,
        queries=queries_of(source),
        model=module,
        data=source,
        samples=ids_in(samples),
        k=k,
        dry_run=dry_run,
        query_loss=query_loss,
        make_model=make_model,
        progress=progress,
    )
    print(f"{cleaning.to_pandas().to_string(index=False)}")
    if out is None:
        print("left out: " + " ".join(map(str, cleaning.removed)))
    else:
        write_ids(cleaning.removed, out)
        print(f"wrote {out}")
    if checkpoint_out is not None and cleaning.model is not None:
        write_weights(cleaning.model, checkpoint_out)
        print(f"wrote {checkpoint_out}")


def tune(
    model: LightningModule | None = None,
    data: LightningDataModule | None = None,
    horizons: Sequence[int] = (0, 1, 4),
    learning_rates: Sequence[float] = (1e-4, 1e-3),
    attr_name: str | None = None,
    max_steps: int = 100,
    keep: float = 0.8,
    proxies: int = 0,
    trainer: dict[str, Any] | None = None,
    selection: dict[str, Any] | None = None,
    progress: bool = True,
    out: Path = Path("tuning.csv"),
    attribute: str | None = None,
) -> None:
    """Sweep look-ahead horizon and learning rate of online selection on short runs. Example: lightning-influence tune --config run.yaml --horizons [0,4] --learning_rates [0.001,0.01].

    Half of the validation batches are selection's queries, the other half compares the runs.

    Args:
        model: the module at its initialisation.
        data: its data.
        horizons: look-ahead steps.
        learning_rates: of the optimizer.
        attr_name: name of the learning rate in the module or its hparams, lr by default.
        max_steps: optimizer steps of each run.
        keep: fraction of the samples that selection keeps.
        proxies: samples whose predicted error is averaged for each pair; 0 for none.
        trainer: further arguments of the Trainer of the short runs.
        selection: further arguments of SelectionDataModule.
        progress: show a bar.
        out: where the table is written, with a heat map of the same name in .png beside it.
        attribute: the old word for attr_name.
    """
    attr_name = renamed("--attr_name", attr_name, "--attribute", attribute, shown=True) or "lr"
    check_writable("out", out)
    require(model=model, data=data)
    assert model is not None and data is not None
    batches = queries_of(prepared(data))
    if len(batches) < 2:
        raise ConfigurationError(
            f"val_dataloader has {len(batches)} batch; tune needs two or more: half of them are selection's queries, "
            "the other half compares the runs."
        )
    tuning = tune_horizon(
        _with_rate(model, attr_name),
        data,
        batches[::2],
        batches[1::2],
        horizons=horizons,
        learning_rates=learning_rates,
        max_steps=max_steps,
        proxies=proxies,
        trainer=trainer,
        progress=progress,
        **{"keep": keep, **(selection or {})},
    )
    write_csv(tuning.table, out)
    tuning.plot().savefig(out.with_suffix(".png"), dpi=150)
    horizon, lr = tuning.best
    print(
        f"{tuning.table.to_string(index=False)}\n\nbest: --horizon {horizon} at learning rate {lr:g}\nwrote {out} and .png"
    )


def _with_rate(model: LightningModule, attr_name: str) -> Callable[[float], LightningModule]:
    """Copies of a module at a learning rate, which is where Lightning's own tuner looks for it."""
    if not lightning_hasattr(model, attr_name):
        raise ConfigurationError(
            f"{type(model).__name__} has no {attr_name!r}, in itself or its hparams; say with --attr_name where its learning "
            "rate is."
        )

    def make(lr: float) -> LightningModule:
        module = copy.deepcopy(model)
        lightning_setattr(module, attr_name, lr)
        return module

    return make
