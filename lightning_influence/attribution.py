"""The public verb: from a log and queries to a report."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from lightning import LightningModule

from lightning_influence.errors import LogError
from lightning_influence.log import FINAL, LoggedTrajectory, checksum
from lightning_influence.queries import QueryLoss, Target, query_gradients
from lightning_influence.report import InfluenceReport
from lightning_influence.sweep import Method, sweep


def attribute(
    log: str | Path,
    *,
    queries: Iterable[Any],
    model: LightningModule,
    target: Target = None,
    curvature: Literal["auto", "none", "fisher", "gauss_newton", "hessian"] = "auto",
    response: Literal["finite", "tangent"] = "finite",
    memory_window: int = 8,
    counterfactual: Literal["drop", "zero"] = "drop",
    optimizer_assumption: Literal["sgd"] | None = None,
    query_loss: QueryLoss | None = None,
    data: Any = None,
    progress: bool = True,
) -> InfluenceReport:
    """Which training samples helped or hurt: the predicted effect of removing each on every query loss.

    A positive score means that without the sample the query loss would be higher: the sample helps.

    Args:
        log: directory written by `InfluenceCallback`.
        queries: batches of queries, such as a validation loader.
        model: the module with the parameters at the end of the logged run.
        target: None for one column per query, ``"mean"`` or weights ``(n_queries,)`` for a single
            column at the cost of one.
        curvature: what stands for the Hessian (method.md section 4). ``"auto"`` takes the best the
            log allows: ``"hessian"`` where it can be replayed, ``"fisher"`` otherwise.
        response: ``"finite"`` evaluates the optimizer's response to the removal exactly, ``"tangent"`` is
            the paper's first-order score (method.md section 5).
        memory_window: steps for which the optimizer's memory of a removal is followed exactly.
        counterfactual: ``"drop"``, a batch of one sample fewer; ``"zero"``, the same denominator.
        optimizer_assumption: ``"sgd"`` for the SGD-influence baseline from the same log.
        query_loss: ``query_loss(model, batch) -> (batch,)``; by default the module's own loss on each
            example (`queries.query_losses`).
        data: where replay finds the training samples again.

    Raises:
        LogError: not a log, an empty one, or one of another model.
        ConfigurationError: queries that the model cannot take, or an unknown choice.
        CurvatureUnavailable: the log does not hold what the curvature needs.
    """
    trajectory = LoggedTrajectory(log)
    _check_model(trajectory, model)
    method = Method(
        curvature="fisher" if curvature == "auto" else curvature,
        response=response,
        memory_window=memory_window,
        counterfactual=counterfactual,
        optimizer=optimizer_assumption,
    )
    gradients = query_gradients(
        model,
        queries,
        list(trajectory.sizes),
        trajectory.select,
        target=target,
        query_loss=query_loss,
        progress=progress,
    )
    rows = sweep(trajectory, gradients, method, progress=progress)
    return InfluenceReport.from_rows(
        rows.sample_ids,
        rows.steps,
        rows.scores,
        tangent=rows.tangent,
        query_ids=None if target is None else ["mean" if isinstance(target, str) else "target"],
        metadata=_metadata(trajectory, method, target),
    )


def _check_model(trajectory: LoggedTrajectory, model: LightningModule) -> None:
    """Refuse a log of another model; warn where the parameters are not those the run ended with."""
    parameters = dict(model.named_parameters())
    for name, (_, total) in trajectory.sizes.items():
        if name not in parameters or parameters[name].numel() != total:
            found = "no such parameter" if name not in parameters else f"{parameters[name].numel()} values"
            raise LogError(
                f"this is the log of another model: it records {name} with {total} values, and the {type(model).__name__} "
                f"given has {found}. Give the module that was trained with this log."
            )
    reader = trajectory.reader
    if FINAL not in reader.artifacts():
        warnings.warn(
            f"the logged run did not finish; scores hold for its {len(trajectory)} complete steps and the model given.",
            stacklevel=3,
        )
        return
    final = reader.artifact_meta(FINAL)["checksums"]
    changed = [name for name in trajectory.sizes if checksum(parameters[name]) != final[name]]
    if changed:
        warnings.warn(
            f"{len(changed)} parameters ({changed[0]}, ...) differ from those at the end of the logged run; scores answer for "
            "the run's last parameters. Give the module as it left fit, or load its last checkpoint.",
            stacklevel=3,
        )


def _metadata(trajectory: LoggedTrajectory, method: Method, target: Target) -> dict[str, Any]:
    manifest = trajectory.reader.manifest
    kept = sum(d for d, _ in trajectory.sizes.values())
    return {
        "coverage": {
            "fraction": kept / max(manifest["coverage"]["trained"], 1),
            "kept": kept,
            **manifest["coverage"],
            "parameters": {name: kept / total for name, (kept, total) in trajectory.sizes.items()},
            "excluded": manifest["excluded"],
        },
        "curvature": method.curvature,
        "response": method.response,
        "memory_window": method.memory_window,
        "counterfactual": method.counterfactual,
        "optimizer": manifest["optimizer"],
        "optimizer_assumption": method.optimizer,
        "target": target if target is None or isinstance(target, str) else "weighted sum",
        "steps": len(trajectory),
        "module": manifest["module"],
        "compression": manifest["compression"],
        "precision": manifest["precision"],
        "versions": manifest["versions"],
    }
