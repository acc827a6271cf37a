"""The commands: each reads what it was given, calls a verb of the library and prints what a person reads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from lightning import LightningDataModule, LightningModule
from lightning.pytorch.utilities.parsing import lightning_hasattr, lightning_setattr

from lightning_influence.cli.inputs import check_writable, queries_of, require, trained
from lightning_influence.cli.processes import launched
from lightning_influence.errors import ConfigurationError
from lightning_influence.lightning.tuning import tune_horizon
from lightning_influence.log.manifest import Manifest
from lightning_influence.log.reader import StoreReader
from lightning_influence.report import InfluenceReport
from lightning_influence.scoring.attribution import attribute as attribute_run
from lightning_influence.trust.dynamics import suspects as suspects_of
from lightning_influence.trust.dynamics import training_dynamics
from lightning_influence.trust.faithfulness import check_faithfulness
from lightning_influence.words import renamed, warn_renamed


def inspect(log: str) -> None:
    """Say what a log holds. Example: lightning-influence inspect runs/influence.

    Args:
        log: directory written by InfluenceCallback, or a URL of one.
    """
    reader = StoreReader(log)
    manifest, keys = Manifest.of(reader), ("module", "optimizer", "record", "compression", "precision")
    entries = {key: getattr(manifest, key) for key in keys} | {"ranks": reader.ranks}
    entries["coverage"] = f"{manifest.coverage.recorded:,} of {manifest.coverage.trained:,} trained coordinates"
    lines = "".join(f"\n  {key:12s} {value}" for key, value in entries.items())
    lines += "".join(f"\n  it lacks {what}: {why}" for what, why in reader.missing.items())
    print(printable(f"{log}: {len(reader)} optimizer steps, {reader.nbytes / 1e6:.1f} MB{lines}"))


def attribute(
    log: str,
    model: LightningModule | None = None,
    data: LightningDataModule | None = None,
    checkpoint: Path | None = None,
    target: Literal["mean", "each"] | None = None,
    curvature: Literal["auto", "none", "fisher", "gauss_newton", "hessian"] = "auto",
    response: Literal["finite", "tangent"] = "finite",
    memory_window: int = 8,
    counterfactual: Literal["drop", "zero"] = "drop",
    optimizer_assumption: Literal["sgd"] | None = None,
    out: Path = Path("influence.safetensors"),
) -> None:
    """Score the training samples of a logged run against the validation data. Example: lightning-influence attribute runs/influence --config run.yaml --checkpoint last.ckpt --target mean.

    Under torchrun (torchrun --nproc-per-node 2 -m lightning_influence attribute ...) the processes share the work, and the first
    of them writes the report.

    Args:
        log: directory written by InfluenceCallback, or a URL of one.
        model: the module that was trained.
        data: its data; the queries are those of val_dataloader.
        checkpoint: of the end of the run.
        target: mean for the mean query loss; by default the loss of each query, a column of scores each.
        curvature: what stands for the Hessian.
        response: of the optimizer to a removal.
        memory_window: steps for which the optimizer's memory of a removal is followed exactly.
        counterfactual: drop for a batch of one sample fewer, zero for the same denominator.
        optimizer_assumption: sgd for the SGD-influence baseline.
        out: where the report is written.
    """
    check_writable("out", out)
    if target == "each":
        warn_renamed("--target null", "--target each", shown=True)
        target = None
    module, source = trained(model, data, checkpoint)
    fabric = launched()
    report = attribute_run(
        log,
        queries=queries_of(source),
        model=module if fabric is None else module.to(fabric.device),
        data=source,
        target=target,
        curvature=curvature,
        response=response,
        memory_window=memory_window,
        counterfactual=counterfactual,
        optimizer_assumption=optimizer_assumption,
        fabric=fabric,
    )
    if fabric is not None and fabric.global_rank > 0:
        return
    report.save(out)
    print(f"{report}\n\nmost harmful\n{report.bottom(5).to_string(index=False)}\n\nwrote {out}")


def report(
    scores: Path,
    out: Path = Path("influence.html"),
    data: LightningDataModule | None = None,
    log: str | None = None,
) -> None:
    """Write the page of a report. Example: lightning-influence report influence.safetensors --out influence.html.

    Args:
        scores: file written by attribute.
        out: the page.
        data: shows the samples of its train_dataloader.
        log: of the run; shows the samples' losses and labels in doubt.
    """
    check_writable("out", out)
    dynamics = None if log is None else training_dynamics(log)
    print(f"wrote {InfluenceReport.load(scores).to_html(out, data=data, dynamics=dynamics)}")


def check(
    log: str,
    model: LightningModule | None = None,
    data: LightningDataModule | None = None,
    checkpoint: Path | None = None,
    target: Literal["mean"] | None = None,
    counterfactual: Literal["drop", "zero"] = "drop",
    removals: int = 30,
    subsets: int = 0,
    workers: int = 0,
    results: Path | None = None,
) -> None:
    """Retrain without some samples, and say how far the scores of a run can be trusted. Example: lightning-influence check runs/influence --config run.yaml --checkpoint last.ckpt --removals 50.

    Args:
        log: directory written by InfluenceCallback, or a URL of one with record="replay".
        model: the module that was trained.
        data: its data; the queries are those of val_dataloader.
        checkpoint: of the end of the run.
        target: mean for the mean query loss; by default the loss of each query.
        counterfactual: drop for a batch of one sample fewer, zero for the same denominator.
        removals: samples to remove, one at a time.
        subsets: random subsets to remove besides.
        workers: processes that retrain side by side.
        results: file that keeps finished retrainings, so that an interrupted check can be continued.
    """
    for name, value, least in (("removals", removals, 3), ("subsets", subsets, 0), ("workers", workers, 0)):
        if value < least:
            raise ConfigurationError(f"--{name} {value}; give {least} or more.")
    if results is not None:
        check_writable("results", results)
    module, source = trained(model, data, checkpoint)
    faithfulness = check_faithfulness(
        log,
        model=module,
        data=source,
        queries=queries_of(source),
        target=target,
        counterfactual=counterfactual,
        removals=removals,
        subsets=subsets,
        workers=workers,
        results=results,
    )
    print(faithfulness)


def suspects(log: str, k: int = 20, out: Path | None = None) -> None:
    """Say which samples of a logged run are likely mislabelled. Example: lightning-influence suspects runs/influence --out suspects.csv.

    Args:
        log: directory written by InfluenceCallback, or a URL of one.
        k: how many are shown.
        out: where all of them are written, as CSV.
    """
    if k < 1:
        raise ConfigurationError(f"--k {k}; give 1 or more.")
    if out is not None:
        check_writable("out", out)
    table = suspects_of(log)
    print(f"{len(table)} samples are likely mislabelled\n{table.head(k).to_string(index=False)}")
    if out is not None:
        table.to_csv(out, index=False)
        print(f"wrote {out}")


def select(scores: Path, keep: float = 0.8, out: Path = Path("kept.txt")) -> None:
    """Write the ids of the training samples that are worth keeping, one per line. Example: lightning-influence select influence.safetensors --keep 0.8.

    Args:
        scores: file written by attribute.
        keep: fraction to keep.
        out: where the ids are written.
    """
    if not 0 < keep <= 1:
        raise ConfigurationError(f"--keep {keep}; a fraction lies above 0 and is at most 1.")
    check_writable("out", out)
    scored = InfluenceReport.load(scores)
    best = scored.top(round(keep * len(scored.sample_ids))).sample_id.sort_values()
    out.write_text("".join(f"{z}\n" for z in best))
    print(f"wrote {len(best)} of {len(scored.sample_ids)} sample ids to {out}")


def tune(
    model: LightningModule | None = None,
    data: LightningDataModule | None = None,
    horizons: Sequence[int] = (0, 1, 4),
    learning_rates: Sequence[float] = (1e-4, 1e-3),
    attr_name: str | None = None,
    max_steps: int = 100,
    keep: float = 0.8,
    proxies: int = 0,
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
        out: where the table is written, with a heat map of the same name in .png beside it.
        attribute: the old word for attr_name.
    """
    attr_name = renamed("--attr_name", attr_name, "--attribute", attribute, shown=True) or "lr"
    check_writable("out", out)
    require(model=model, data=data)
    assert model is not None and data is not None
    batches = queries_of(data)
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
        keep=keep,
    )
    tuning.table.to_csv(out, index=False)
    tuning.plot().savefig(out.with_suffix(".png"), dpi=150)
    horizon, lr = tuning.best
    print(
        f"{tuning.table.to_string(index=False)}\n\nbest: --horizon {horizon} at learning rate {lr:g}\nwrote {out} and .png"
    )


VERBS: tuple[Callable[..., None], ...] = (inspect, attribute, report, check, suspects, select, tune)


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


def printable(text: str) -> str:
    """What a file says, without the codes that would steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
