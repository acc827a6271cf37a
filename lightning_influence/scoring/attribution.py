"""The public verb: from a log and queries to a report."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lightning_influence.core.curvature import best_curvature, curvature_of
from lightning_influence.core.optimizers import UPDATES
from lightning_influence.core.removal_sets import RemovalSets
from lightning_influence.core.scores import RowScores
from lightning_influence.core.sweep import Method, sweep
from lightning_influence.core.trajectory import Trajectory, Vectors
from lightning_influence.errors import ConfigurationError, LogError
from lightning_influence.log.manifest import Manifest
from lightning_influence.log.steps import FINAL, LoggedSteps, LoggedTrajectory, checksum
from lightning_influence.replay.logged_plan import LoggedPlan
from lightning_influence.replay.trajectory import ReplayTrajectory
from lightning_influence.report import InfluenceReport
from lightning_influence.report.groups import Groups
from lightning_influence.report.provenance import Coverage, Provenance, RemovalSummary
from lightning_influence.run.data import TrainingData
from lightning_influence.run.task import Task, as_task
from lightning_influence.scoring.groups import GroupsOf, named_groups
from lightning_influence.scoring.queries import Queries, Target, check_target, query_gradients
from lightning_influence.scoring.query_loss import QueryLoss


class Fabric(Protocol):
    """The processes of a launched `lightning.Fabric`, as far as they are asked."""

    world_size: int
    global_rank: int
    device: torch.device

    def all_gather(self, data: Tensor) -> Any:
        """The tensors of all processes, stacked."""


_COLUMNS = ("scores", "tangent", "interaction")  # of rows: one a query


def attribute(
    log: str | Path | LoggedSteps,
    *,
    queries: Any,
    model: Any,
    data: Any = None,
    target: Target = None,
    curvature: Literal["auto", "none", "fisher", "gauss_newton", "hessian"] = "auto",
    response: Literal["finite", "tangent"] = "finite",
    memory_window: int = 8,
    counterfactual: Literal["drop", "zero"] = "drop",
    optimizer_assumption: Literal["sgd"] | None = None,
    query_loss: QueryLoss | None = None,
    samples: Collection[int] | None = None,
    groups: GroupsOf | None = None,
    verify: bool = True,
    max_memory: int = 2**30,
    fabric: Fabric | None = None,
    progress: bool = True,
) -> InfluenceReport:
    """Which training samples helped or hurt: the predicted effect of removing each on every query loss.

    A positive score means that without the sample the query loss would be higher: the sample helps.

    Args:
        log: directory written by `InfluenceCallback` or `recording`, or its steps where they are open already.
        queries: held-out data whose losses are predicted: a loader, a list of batches, a datamodule (its validation loader),
            a dataset, or a method without arguments that gives one of them.
        model: the `LightningModule` with the parameters at the end of the logged run, or a `FunctionTask` where a loop of
            one's own trained it.
        data: the training data of the run, where replay finds the samples again: a datamodule, a loader or a dataset.
        target: what is asked of the queries: None for the loss of each, one column per query; ``"mean"`` or weights
            ``(n_queries,)`` for one column at the cost of one query.
        curvature: what stands for the Hessian (docs/method.md, "Curvature"). ``"auto"`` takes the best the
            log allows: ``"hessian"`` where it can be replayed, ``"fisher"`` otherwise.
        response: ``"finite"`` evaluates the optimizer's response to the removal exactly, ``"tangent"`` is
            the paper's first-order score (docs/method.md, "The finite response").
        memory_window: steps for which the optimizer's memory of a removal is followed exactly.
        counterfactual: ``"drop"``, a batch of one sample fewer; ``"zero"``, the same denominator.
        optimizer_assumption: ``"sgd"`` for the SGD-influence baseline from the same log.
        query_loss: ``query_loss(model, batch) -> (batch,)``; by default the module's own loss on each
            example (`queries.query_losses`).
        samples: ids of the training samples to score; None for all. Where a replay has to measure removals by running
            steps without the sample, this bounds its cost.
        groups: a label per sample of the training dataset (its source, annotator, class; None for no group), or sample ids
            by name, which may overlap. ``report.groups`` says what removing each group as a whole does.
        verify: compare the effect of a few removals at a replay's first step with running that step without them, and
            measure all removals where they differ. The report says what was verified.
        max_memory: bytes that the adjoints of the queries may take; more queries go through the run in turns.
        fabric: a launched `lightning.Fabric`, over whose processes the queries are spread; each process gets the
            whole report.

    Raises:
        LogError: not a log, an empty one, or one of another model.
        ConfigurationError: queries that the model cannot take, or an unknown choice.
        CurvatureUnavailable: the log does not hold what the curvature needs.
    """
    check_target(target)
    task, data, steps = as_task(model), TrainingData.of(data), LoggedSteps.of(log)
    named = {} if groups is None else named_groups(groups)
    sets = RemovalSets(samples, list(named.values()))
    replay = {"counterfactual": counterfactual, "sets": sets, "verify": verify}
    with open_trajectory(steps, task, curvature, data, progress=progress, **replay) as trajectory:
        method = Method(
            curvature=resolved(curvature, trajectory),
            response=response,
            memory_window=memory_window,
            counterfactual=counterfactual,
            optimizer_assumption=optimizer_assumption,
        )
        names = list(trajectory.sizes)
        gradients = query_gradients(
            task,
            Queries.of(queries, data=data, precision=steps.manifest.precision),
            names,
            trajectory.select,
            target=target,
            query_loss=query_loss,
            progress=progress,
        )
        sizes = _consumed(trajectory, sets, named)
        rows, of_groups = sets.split(_swept(trajectory, gradients, method, sets, max_memory, fabric, progress))
        made = _provenance(steps.manifest, trajectory, method, target)
    query_ids = list(range(rows.n_queries)) if target is None else ["mean" if isinstance(target, str) else "target"]
    return InfluenceReport(
        rows,
        query_ids=query_ids,
        metadata=made.to_json(),
        groups=Groups(list(named), sizes, of_groups, query_ids) if named else None,
    )


def _consumed(trajectory: Trajectory, sets: RemovalSets, named: Mapping[str, list[int]]) -> list[int]:
    """How many samples of each group the run consumed.

    Raises:
        ConfigurationError: a sample that the run did not consume, or none of a group.
    """
    used = torch.cat([trajectory.sample_ids(t) for t in range(len(trajectory))]).unique()
    missing = set(sets.samples or ()).difference(used.tolist())
    if missing:
        raise ConfigurationError(
            f"samples names {min(missing)}, which no step of the run consumed; give ids of training samples that the run saw."
        )
    sizes = [int(torch.isin(used, torch.tensor(list(members))).sum()) for members in named.values()]
    if named and not any(sizes):
        raise ConfigurationError(
            f"groups names samples of which the run consumed none ({next(iter(named.values()))[:4]}...); ids are indices into "
            "the training dataset."
        )
    return sizes


def _swept(
    trajectory: Trajectory,
    gradients: Vectors,
    method: Method,
    sets: RemovalSets,
    max_memory: int,
    fabric: Fabric | None,
    progress: bool,
) -> RowScores:
    """The sweep of all queries: in turns where memory is short, and each process its part."""
    n = len(next(iter(gradients.values())))
    own = torch.arange(n)
    if fabric is not None:
        if n < fabric.world_size:
            raise ConfigurationError(f"{n} queries cannot be spread over {fabric.world_size} processes; use fewer.")
        own = own.tensor_split(fabric.world_size)[fabric.global_rank]
    kept = len(UPDATES[trajectory.optimizer].moments) + 1
    steps = method.memory_window + 2 if method.response == "finite" else 2  # each holds its own adjoints
    per_query = 4 * kept * steps * sum(d for d, _ in trajectory.sizes.values())
    parts = [
        sweep(trajectory, {k: g[chunk] for k, g in gradients.items()}, method, sets=sets, progress=progress)
        for chunk in own.split(max(1, max_memory // per_query))
    ]
    rows = replace(parts[0], **{name: torch.cat([getattr(p, name) for p in parts], 1) for name in _COLUMNS})
    return rows if fabric is None else _gathered(rows, fabric, n)


def _gathered(rows: RowScores, fabric: Fabric, n_queries: int) -> RowScores:
    """The columns of all processes, which hold ``n_queries`` in parts of nearly the same size."""
    widest = -(-n_queries // fabric.world_size)
    sizes = [len(part) for part in torch.arange(n_queries).tensor_split(fabric.world_size)]

    def gather(columns: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(columns, (0, widest - columns.shape[1])).to(fabric.device)
        gathered = fabric.all_gather(padded)
        assert isinstance(gathered, Tensor)
        every = gathered.cpu().reshape(fabric.world_size, *padded.shape)
        return torch.cat([part[:, :size] for part, size in zip(every, sizes, strict=True)], 1)

    return replace(rows, **{name: gather(getattr(rows, name)) for name in _COLUMNS})


@contextmanager
def open_trajectory(
    log: str | Path | LoggedSteps,
    model: Any,
    curvature: str = "auto",
    data: Any = None,
    *,
    progress: bool = True,
    **replay: Any,
) -> Iterator[LoggedTrajectory | ReplayTrajectory]:
    """The run of a log, read back or, where the curvature asks for it and the log allows it, replayed.

    Arguments and errors are as of `attribute`; ``replay`` are further arguments of `ReplayTrajectory`. While a replay is open,
    the model's parameters move.
    """
    task, steps = as_task(model), LoggedSteps.of(log)
    manifest = steps.manifest
    replayable = manifest.record != "gradients"
    _check_model(steps, task)
    named = curvature_of(best_curvature(replayed=replayable) if curvature == "auto" else curvature)
    if named.replayed or manifest.record == "replay":
        with ReplayTrajectory(
            task,
            LoggedPlan(steps, task, data),
            exclude=manifest.excluded,
            frozen_batch_norm=manifest.frozen_batch_norm,
            autocast=_autocast(manifest.precision, task),
            exact=named.differentiated,
            progress=progress,
            **replay,
        ) as replayed:
            yield replayed
    else:
        yield LoggedTrajectory(steps.reader)


def resolved(
    curvature: Literal["auto", "none", "fisher", "gauss_newton", "hessian"],
    trajectory: LoggedTrajectory | ReplayTrajectory,
) -> Literal["none", "fisher", "gauss_newton", "hessian"]:
    """Name of the curvature that ``"auto"`` stands for on a trajectory, or the one that was asked for."""
    if curvature != "auto":
        return curvature
    return best_curvature(replayed=isinstance(trajectory, ReplayTrajectory))


def _autocast(precision: str, task: Task) -> Callable[[], AbstractContextManager[Any]]:
    dtypes = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    if precision not in dtypes:
        return nullcontext
    return lambda: torch.autocast(task.device.type, dtypes[precision])


def _check_model(steps: LoggedSteps, task: Task) -> None:
    """Refuse a log of another model; warn where the parameters are not those the run ended with."""
    parameters = dict(task.module.named_parameters())
    for name, shape in steps.manifest.shapes.items():
        if name not in parameters or list(parameters[name].shape) != shape:
            found = "no such parameter" if name not in parameters else f"shape {list(parameters[name].shape)}"
            raise LogError(
                f"this is the log of another model: it records {name} of shape {shape}, and the {type(task.module).__name__} given "
                f"has {found}. Give the module that was trained with this log."
            )
    for what, why in steps.reader.missing.items():
        warnings.warn(f"the log lacks {what}: {why}", stacklevel=5)
    if FINAL not in steps.reader.artifacts():
        warnings.warn(
            f"the logged run did not finish; scores hold for its {len(steps)} complete steps and the model given.",
            stacklevel=5,
        )
        return
    meta = steps.reader.artifact_meta(FINAL)
    if meta.get("moved"):
        warnings.warn(
            "the parameters were changed after the last optimizer step of the logged run, by weight averaging for example. "
            "Scores take the model given for the run's last parameters; for exact ones, train without that callback.",
            stacklevel=5,
        )
        return
    final = meta["checksums"]
    changed = [name for name, value in final.items() if checksum(parameters[name]) != value]
    if changed:
        warnings.warn(
            f"{len(changed)} parameters ({changed[0]}, ...) differ from those at the end of the logged run, and scores are "
            "about the run's last parameters. Give the module as it left fit, or load its last checkpoint.",
            stacklevel=5,
        )


def _provenance(
    manifest: Manifest, trajectory: LoggedTrajectory | ReplayTrajectory, method: Method, target: Target
) -> Provenance:
    kept = sum(d for d, _ in trajectory.sizes.values())
    trained = manifest.coverage.trained
    made = Provenance(
        module=manifest.module,
        record=manifest.record,
        compression=manifest.compression,
        precision=manifest.precision,
        versions=manifest.versions,
        optimizer=manifest.optimizer,
        optimizer_assumption=method.optimizer_assumption,
        curvature=method.curvature,
        response=method.response,
        memory_window=method.memory_window,
        counterfactual=method.counterfactual,
        target=target if target is None or isinstance(target, str) else "weighted sum",
        steps=len(trajectory),
        coverage=Coverage(
            kept / max(trained, 1),
            kept,
            manifest.coverage.recorded,
            trained,
            {name: kept / total for name, (kept, total) in trajectory.sizes.items()},
            manifest.excluded,
        ),
    )
    if not isinstance(trajectory, ReplayTrajectory):
        return made
    removals = RemovalSummary.from_json(trajectory.removals.to_metadata())
    return replace(
        made,
        removals=removals,
        stopped_paths=trajectory.stopped_paths,
        hessian="by differences" if trajectory.differenced else None,
        replay_drift={str(step): d for step, d in trajectory.drift.items()},
    )
