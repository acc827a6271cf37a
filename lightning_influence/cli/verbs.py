"""The commands that train nothing: each reads what it was given, calls a verb of the library and prints what a person reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from lightning_influence.cli.inputs import (
    Ids,
    LightningDataModule,
    LightningModule,
    groups_in,
    ids_in,
    queries_of,
    require,
    tokenizer_of,
    tokens_in,
    trained,
)
from lightning_influence.cli.outputs import check_writable, printable, write_ids, write_table
from lightning_influence.cli.processes import launched
from lightning_influence.errors import ConfigurationError
from lightning_influence.log.manifest import Manifest
from lightning_influence.log.reader import StoreReader
from lightning_influence.report import InfluenceReport
from lightning_influence.report.comparison import compare as compare_reports
from lightning_influence.report.tables import write_csv
from lightning_influence.scoring.attribution import attribute as attribute_run
from lightning_influence.scoring.memory import MaxMemory
from lightning_influence.scoring.tokens import token_scores
from lightning_influence.trust.dynamics import TrainingDynamics, training_dynamics
from lightning_influence.words import warn_renamed


def inspect(log: str) -> None:
    """Say what a log holds. Example: lightning-influence inspect runs/influence.

    Args:
        log: directory or URL written by InfluenceCallback.
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
    target: Literal["mean", "each"] | list[float] | None = None,
    curvature: Literal["auto", "none", "fisher", "gauss_newton", "hessian"] = "auto",
    response: Literal["finite", "tangent"] = "finite",
    memory_window: int = 8,
    counterfactual: Literal["drop", "zero"] = "drop",
    optimizer_assumption: Literal["sgd"] | None = None,
    query_loss: Callable | None = None,  # type: ignore[type-arg]
    samples: Ids = None,
    groups: Path | None = None,
    verify: bool = True,
    max_memory: MaxMemory = "auto",
    progress: bool = True,
    out: Path = Path("influence.safetensors"),
    groups_out: Path | None = None,
) -> None:
    """Score the training samples of a logged run against the validation data. Example: lightning-influence attribute runs/influence --config run.yaml --checkpoint last.ckpt --target mean.

    Under torchrun (torchrun --nproc-per-node 2 -m lightning_influence attribute ...) the processes share the work, and the first
    of them writes the report.

    Args:
        log: directory or URL written by InfluenceCallback.
        model: the module that was trained.
        data: its data; the queries are those of val_dataloader.
        checkpoint: of the end of the run; by default its parameters are read from the log, where it can be replayed.
        target: mean for the mean query loss, or weights of the queries; by default the loss of each query, a column of scores each.
        curvature: what stands for the Hessian.
        response: of the optimizer to a removal.
        memory_window: steps for which the optimizer's memory of a removal is followed exactly.
        counterfactual: drop for a batch of one sample fewer, zero for the same denominator.
        optimizer_assumption: sgd for the SGD-influence baseline.
        query_loss: import path of a function of model and batch that gives one loss per example.
        samples: ids of the samples to score, or a file of them; all by default.
        groups: file that says what leaves together: a label per sample, one per line, or JSON that maps names to sample ids.
        verify: compare a few removals with running a step without the sample.
        max_memory: bytes that may be held besides the model.
        progress: show bars.
        out: where the report is written.
        groups_out: where the scores of the groups are written, as CSV.
    """
    check_writable("out", out)
    check_writable("groups_out", groups_out)
    if groups is None and groups_out is not None:
        raise ConfigurationError(f"--groups_out {groups_out}, but no groups were named; name them with --groups.")
    if target == "each":
        warn_renamed("--target null", "--target each", shown=True)
        target = None
    module, source = trained(model, data, checkpoint, log)
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
        query_loss=query_loss,
        samples=ids_in(samples),
        groups=groups_in(groups),
        verify=verify,
        max_memory=max_memory,
        fabric=fabric,
        progress=progress,
    )
    if fabric is not None and fabric.global_rank > 0:
        return
    report.save(out)
    print(f"{report}\n\nmost harmful\n{report.bottom(5).to_string(index=False)}\n")
    if report.groups is not None:
        table = report.groups.to_pandas()
        print(f"groups\n{table.to_string(index=False)}\n")
        write_table(table, groups_out)
    print(f"wrote {out}")


def report(
    scores: Path,
    out: Path = Path("influence.html"),
    data: LightningDataModule | None = None,
    log: str | None = None,
    show: Callable | None = None,  # type: ignore[type-arg]
    tokenizer: str | None = None,
    groups: Path | None = None,
    classes: list[str] | None = None,
    tokens: Path | None = None,
    k: int = 8,
    title: str = "Influence report",
) -> None:
    """Write the page of a report. Example: lightning-influence report influence.safetensors --out influence.html.

    Args:
        scores: file written by attribute.
        out: the page.
        data: shows the samples of its train_dataloader.
        log: of the run; shows the samples' losses and labels in doubt.
        show: import path of a function that makes a text, an image or a mapping of a sample.
        tokenizer: name or directory of a Hugging Face tokenizer, which decodes token ids.
        groups: file that says which samples are of which group, as of attribute; for totals, and to filter by.
        classes: names of the labels.
        tokens: file that the command tokens wrote; shades its texts by what each token did.
        k: samples in each list.
        title: of the page.
    """
    check_writable("out", out)
    page = InfluenceReport.load(scores).to_html(
        out,
        data=data,
        dynamics=None if log is None else training_dynamics(log),
        show=show,
        tokenizer=None if tokenizer is None else tokenizer_of(tokenizer),
        groups=groups_in(groups),
        classes=classes,
        tokens=tokens_in(tokens),
        k=k,
        title=title,
    )
    print(f"wrote {page}")


def suspects(
    log: str,
    k: int = 20,
    model: LightningModule | None = None,
    data: LightningDataModule | None = None,
    checkpoint: Path | None = None,
    scores: Path | None = None,
    out: Path | None = None,
) -> None:
    """Say which samples of a logged run are likely mislabelled. Example: lightning-influence suspects runs/influence --out suspects.csv.

    Args:
        log: directory or URL written by InfluenceCallback.
        k: how many are shown.
        model: the module that was trained; with its data, for a look at every sample at the end, which helps after few epochs.
        data: its data.
        checkpoint: of the end of the run; by default its parameters are read from the log, where it can be replayed.
        scores: file written by attribute; says beside it how much each of them harms the queries.
        out: where all of them are written, as CSV.
    """
    if k < 1:
        raise ConfigurationError(f"--k {k}; give 1 or more.")
    check_writable("out", out)
    seen = _dynamics(log, model, data, checkpoint)
    table = seen.suspects() if scores is None else InfluenceReport.load(scores).suspects(dynamics=seen)
    print(f"{len(table)} samples are likely mislabelled\n{table.head(k).to_string(index=False)}")
    write_table(table, out)


def dynamics(
    log: str,
    model: LightningModule | None = None,
    data: LightningDataModule | None = None,
    checkpoint: Path | None = None,
    out: Path = Path("dynamics.csv"),
) -> None:
    """Write how easy each sample of a logged run was to learn, as a table and as a map. Example: lightning-influence dynamics runs/influence --out dynamics.csv.

    Args:
        log: directory or URL written by InfluenceCallback.
        model: the module that was trained; with its data, for one more visit of every sample at the end.
        data: its data.
        checkpoint: of the end of the run; by default its parameters are read from the log, where it can be replayed.
        out: where the table is written, with the map of the same name in .png beside it.
    """
    check_writable("out", out)
    seen = _dynamics(log, model, data, checkpoint)
    write_csv(seen.to_pandas(), out)
    seen.plot().savefig(out.with_suffix(".png"), dpi=150)
    print(f"{seen}\nwrote {out} and .png")


def _dynamics(
    log: str, model: LightningModule | None, data: LightningDataModule | None, checkpoint: Path | None
) -> TrainingDynamics:
    """Those of a log, with a look at the end where model and data are named."""
    module, source = (None, None) if model is None and data is None else trained(model, data, checkpoint, log)
    return training_dynamics(log, model=module, data=source)


def tokens(
    log: str,
    samples: Ids = None,
    model: LightningModule | None = None,
    data: LightningDataModule | None = None,
    checkpoint: Path | None = None,
    target: Literal["mean"] | list[float] | None = "mean",
    curvature: Literal["none", "gauss_newton", "hessian"] = "hessian",
    counterfactual: Literal["drop", "zero"] = "drop",
    query_loss: Callable | None = None,  # type: ignore[type-arg]
    progress: bool = True,
    out: Path = Path("tokens.csv"),
) -> None:
    """Say which tokens of some training texts helped or harmed. Example: lightning-influence tokens runs/influence --config run.yaml --samples [3,14] --out tokens.csv.

    Args:
        log: directory or URL written by InfluenceCallback, of a run that can be replayed.
        samples: ids of the texts, or a file of them.
        model: the module that was trained.
        data: its data; the queries are those of val_dataloader.
        checkpoint: of the end of the run; by default its parameters are read from the log.
        target: mean for the mean query loss, or weights of the queries; null for the loss of each query.
        curvature: what stands for the Hessian.
        counterfactual: drop for a batch of one sample fewer, zero for the same denominator.
        query_loss: import path of a function of model and batch that gives one loss per example.
        progress: show bars.
        out: where the table is written, which the command report shows with --tokens.
    """
    require(samples=samples)
    check_writable("out", out)
    module, source = trained(model, data, checkpoint, log)
    table = token_scores(
        log,
        ids_in(samples) or (),
        queries=queries_of(source),
        model=module,
        data=source,
        target=target,
        curvature=curvature,
        counterfactual=counterfactual,
        query_loss=query_loss,
        progress=progress,
    ).to_pandas()
    print(f"most harmful\n{table.nsmallest(5, 'score').to_string(index=False)}")
    write_table(table, out)


def select(
    scores: Path,
    keep: float = 0.8,
    k: int | None = None,
    by: Literal["harm", "suspicion"] = "harm",
    log: str | None = None,
    out: Path = Path("kept.txt"),
    left_out: Path | None = None,
) -> None:
    """Write the ids of the training samples that are worth keeping, one per line. Example: lightning-influence select influence.safetensors --keep 0.8.

    Args:
        scores: file written by attribute.
        keep: fraction to keep.
        k: how many to leave out, instead of a fraction.
        by: what they are left out for: harm to the queries on average, or suspicion as of the command suspects.
        log: of the run; by suspicion then means that another label is more likely, and without it harm to any query.
        out: where the ids are written.
        left_out: where those of the others are written, as clean takes them.
    """
    if not 0 < keep <= 1:
        raise ConfigurationError(f"--keep {keep}; a fraction lies above 0 and is at most 1.")
    if k is not None and k < 1:
        raise ConfigurationError(f"--k {k}; give 1 or more.")
    check_writable("out", out)
    check_writable("left_out", left_out)
    scored = InfluenceReport.load(scores)
    ids = scored.sample_ids.tolist()
    n = len(ids) - round(keep * len(ids)) if k is None else k
    gone = scored.select(n, by=by, dynamics=None if log is None else training_dynamics(log))
    best = sorted(set(ids).difference(gone))
    write_ids(best, out)
    if left_out is not None:
        write_ids(gone, left_out)
    print(f"wrote {len(best)} of {len(ids)} sample ids to {out}")


def compare(first: Path, second: Path, k: int = 20, out: Path | None = None) -> None:
    """Say which samples' scores differ most between two reports. Example: lightning-influence compare before.safetensors after.safetensors.

    Args:
        first: file written by attribute.
        second: another, of samples of the same training data.
        k: how many are shown.
        out: where all of them are written, as CSV.
    """
    check_writable("out", out)
    table = compare_reports(InfluenceReport.load(first), InfluenceReport.load(second))
    print(table.head(k).to_string(index=False))
    write_table(table, out)
