"""The command line ``lightning-influence``; arguments and configuration files are jsonargparse's.

A model and its data are named as in a LightningCLI configuration: ``--model.class_path my.Model --data.class_path my.Data``,
or in a file given with ``--config``.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.utilities.parsing import lightning_hasattr, lightning_setattr

from lightning_influence.attribution import attribute as attribute_run
from lightning_influence.errors import ConfigurationError, InfluenceError
from lightning_influence.faithfulness import check_faithfulness
from lightning_influence.report import InfluenceReport
from lightning_influence.store import StoreReader
from lightning_influence.tuning import tune_horizon


def inspect(log: Path) -> None:
    """Say what a log holds. Example: lightning-influence inspect runs/influence.

    Args:
        log: directory written by InfluenceCallback.
    """
    reader = StoreReader(log)
    size = sum(f.stat().st_size for f in log.rglob("*") if f.is_file())
    coverage = reader.manifest["coverage"]
    print(f"{log}: {len(reader)} optimizer steps, {size / 1e6:.1f} MB")
    for key in ("module", "optimizer", "record", "compression", "precision", "ranks"):
        print(f"  {key:12s} {reader.manifest[key]}")
    print(f"  {'coverage':12s} {coverage['recorded']:,} of {coverage['trained']:,} trained coordinates")


def attribute(
    log: Path,
    model: LightningModule | None = None,
    data: LightningDataModule | None = None,
    checkpoint: Path | None = None,
    out: Path = Path("influence.safetensors"),
    target: Literal["mean", "each"] = "mean",
    curvature: Literal["auto", "none", "fisher", "gauss_newton", "hessian"] = "auto",
    response: Literal["finite", "tangent"] = "finite",
) -> None:
    """Score the training samples of a logged run against the validation data. Example: lightning-influence attribute runs/influence --config run.yaml --checkpoint last.ckpt.

    Args:
        log: directory written by InfluenceCallback.
        model: the module that was trained.
        data: its data; queries are those of val_dataloader.
        checkpoint: of the end of the run.
        out: where the report is written.
        target: the mean validation loss, or each example's.
        curvature: what stands for the Hessian.
        response: of the optimizer to a removal.
    """
    module, source = _given(model, data, checkpoint)
    report = attribute_run(
        log,
        queries=_queries(source),
        model=module,
        data=source,
        target="mean" if target == "mean" else None,
        curvature=curvature,
        response=response,
    )
    report.save(out)
    print(f"{report}\n\nmost harmful\n{report.bottom(5).to_string(index=False)}\n\nwrote {out}")


def report(scores: Path, out: Path = Path("influence.html"), data: LightningDataModule | None = None) -> None:
    """Write the page of a report. Example: lightning-influence report influence.safetensors --out influence.html.

    Args:
        scores: file written by attribute.
        out: the page.
        data: shows the samples of its train_dataloader.
    """
    dataset = None
    if data is not None:
        data.setup("fit")
        dataset = data.train_dataloader().dataset
    print(f"wrote {InfluenceReport.load(scores).to_html(out, data=dataset)}")


def check(
    log: Path,
    model: LightningModule | None = None,
    data: LightningDataModule | None = None,
    checkpoint: Path | None = None,
    removals: int = 30,
    subsets: int = 0,
    workers: int = 0,
    results: Path | None = None,
) -> None:
    """Retrain without some samples, and say how far the scores of a run can be trusted. Example: lightning-influence check runs/influence --config run.yaml --checkpoint last.ckpt --removals 50.

    Args:
        log: directory written by InfluenceCallback with record="replay".
        model: the module that was trained.
        data: its data.
        checkpoint: of the end of the run.
        removals: samples to remove, one at a time.
        subsets: random subsets to remove besides.
        workers: processes that retrain side by side.
        results: file of finished retrainings, with which an interrupted check goes on.
    """
    module, source = _given(model, data, checkpoint)
    found = check_faithfulness(
        log,
        model=module,
        data=source,
        queries=_queries(source),
        removals=removals,
        subsets=subsets,
        workers=workers,
        results=results,
        target="mean",
    )
    print(found)


def select(scores: Path, keep: float = 0.8, out: Path = Path("kept.txt")) -> None:
    """Write the ids of the training samples that are worth keeping, one per line. Example: lightning-influence select influence.safetensors --keep 0.8.

    Args:
        scores: file written by attribute.
        keep: fraction to keep.
        out: where the ids are written.
    """
    if not 0 < keep <= 1:
        raise ConfigurationError(f"keep={keep}; a fraction lies above 0 and is at most 1.")
    found = InfluenceReport.load(scores)
    kept = found.top(round(keep * len(found.sample_ids))).sample_id.sort_values()
    out.write_text("".join(f"{z}\n" for z in kept))
    print(f"wrote {len(kept)} of {len(found.sample_ids)} sample ids to {out}")


def tune(
    model: LightningModule | None = None,
    data: LightningDataModule | None = None,
    horizons: Sequence[int] = (0, 1, 4),
    learning_rates: Sequence[float] = (1e-4, 1e-3),
    attribute: str = "lr",
    max_steps: int = 100,
    keep: float = 0.8,
    proxies: int = 0,
    out: Path = Path("tuning.csv"),
) -> None:
    """Sweep look-ahead horizon and learning rate of online selection on short runs. Example: lightning-influence tune --config run.yaml --horizons [0,4] --learning_rates [0.001,0.01].

    Half of the validation batches are what selection aims at, the other half compares the runs.

    Args:
        model: the module at its initialisation.
        data: its data.
        horizons: look-ahead steps.
        learning_rates: of the optimizer.
        attribute: name of the learning rate in the module or its hparams.
        max_steps: optimizer steps of each run.
        keep: fraction of the samples that selection keeps.
        proxies: samples whose predicted error is averaged for each pair; 0 for none.
        out: where the table is written, with a heat map of the same name in .png beside it.
    """
    if model is None or data is None:
        missing = " and ".join(f"--{name}" for name, value in (("model", model), ("data", data)) if value is None)
        raise ConfigurationError(f"{missing} missing; name them, or give a file with --config.")
    batches = _queries(data)
    if len(batches) < 2:
        raise ConfigurationError(
            f"val_dataloader has {len(batches)} batch; tune needs two or more: half of them are selection's target, the "
            "other half compares the runs."
        )
    found = tune_horizon(
        _with_rate(model, attribute),
        data,
        batches[::2],
        batches[1::2],
        horizons=horizons,
        learning_rates=learning_rates,
        max_steps=max_steps,
        proxies=proxies,
        keep=keep,
    )
    found.table.to_csv(out, index=False)
    found.plot().savefig(out.with_suffix(".png"), dpi=150)
    horizon, lr = found.best
    print(
        f"{found.table.to_string(index=False)}\n\nbest: --horizon {horizon} at learning rate {lr:g}\nwrote {out} and .png"
    )


def _with_rate(model: LightningModule, attribute: str) -> Callable[[float], LightningModule]:
    """Copies of a module at a learning rate, which is where Lightning's own tuner looks for it."""
    if not lightning_hasattr(model, attribute):
        raise ConfigurationError(
            f"{type(model).__name__} has no {attribute!r}, in itself or its hparams; say with --attribute where its learning "
            "rate is."
        )

    def make(lr: float) -> LightningModule:
        module = copy.deepcopy(model)
        lightning_setattr(module, attribute, lr)
        return module

    return make


def _queries(data: LightningDataModule) -> list[Any]:
    data.prepare_data()
    data.setup("fit")
    return list(data.val_dataloader())


def _given(
    model: LightningModule | None, data: LightningDataModule | None, checkpoint: Path | None
) -> tuple[LightningModule, LightningDataModule]:
    """The module at its checkpoint, and its data."""
    if model is None or data is None or checkpoint is None:
        named = {"model": model, "data": data, "checkpoint": checkpoint}
        missing = " and ".join(f"--{name}" for name, value in named.items() if value is None)
        raise ConfigurationError(f"{missing} missing; name them, or give a file with --config.")
    # weights_only: tensors and plain values, nothing that runs
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    model.load_state_dict(state["state_dict"])
    return model, data


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 0, or 1 after an error that the message explains."""
    commands: dict[str, Any] = {f.__name__: f for f in (inspect, attribute, report, check, select, tune)}
    try:
        auto_cli(commands, args=arguments, prog="lightning-influence", as_positional=True, description=__doc__)
    except InfluenceError as error:
        print(f"lightning-influence: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
