"""The public verb: from a log and queries to a report."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_influence.core.curvature import best_curvature, curvature_of
from lightning_influence.core.removal_sets import RemovalSets
from lightning_influence.core.scores import RowScores
from lightning_influence.core.sweep import Method, sweep
from lightning_influence.core.trajectory import Trajectory, Vectors
from lightning_influence.errors import ConfigurationError, LogError
from lightning_influence.log.manifest import LEFT_OUT
from lightning_influence.log.steps import LoggedSteps, LoggedTrajectory
from lightning_influence.replay.logged_plan import LoggedPlan
from lightning_influence.replay.trajectory import ReplayTrajectory, walked_or_run
from lightning_influence.report import InfluenceReport
from lightning_influence.report.groups import Groups
from lightning_influence.report.membership import GroupsOf, named_groups
from lightning_influence.report.provenance import Coverage, Provenance, RemovalSummary
from lightning_influence.run.data import TrainingData
from lightning_influence.run.lightning_task import default_dtype
from lightning_influence.run.random_state import random_state
from lightning_influence.run.task import Task, as_task
from lightning_influence.scoring.bends import bends, straight_lines
from lightning_influence.scoring.memory import Holding, MaxMemory, held_by_a_sweep, memory_in_bytes
from lightning_influence.scoring.pace import Pace
from lightning_influence.scoring.processes import ConsumedSamples, Deal, Fabric
from lightning_influence.scoring.queries import (
    Queries,
    Target,
    check_target,
    count_queries,
    query_gradients,
    target_losses,
)
from lightning_influence.scoring.query_loss import QueryLoss, Traits

_MOVED = "the parameters were changed after the last optimizer step of the logged run, by weight averaging for example"


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
    max_memory: MaxMemory = "auto",
    fabric: Fabric | None = None,
    progress: bool = True,
) -> InfluenceReport:
    """Which training samples helped or hurt: the predicted effect of removing each on every query loss.

    A positive score means that without the sample the query loss would be higher: the sample helps.

    Args:
        log: directory written by `InfluenceCallback` or `recording`, a URL of one (``"s3://bucket/run"``, whatever fsspec knows), or its
            steps where they are open already.
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
            by name, which may overlap. ``report.groups`` says what removing each group as a whole does, and whether the score
            can be read as a size, for which the queries are looked at once a group.
        verify: compare the effect of a few removals at a replay's first step with running that step without them, and
            measure all removals where they differ. The report says what was verified.
        max_memory: bytes that may be held besides the model and one evaluation of a training step, or ``"auto"`` for half of
            what is free. By it queries go through the run in turns, and a replay keeps fewer states and evaluations, which takes
            longer. A memory window for which it is too little lies in temporary files, and where the disk has no room either it
            is shorter, with a warning; the report says what was used. It is meant for each process where there are several;
            ``"auto"`` divides what is free by their number where they compute on the processor.
        fabric: a launched `lightning.Fabric`, over whose processes the work is spread: the queries as far as they go, and where
            there are more processes, each step of a replay and the removals that are scored. Each process gets the whole report,
            in which it is not said whether scores of groups can be read as sizes.

    Raises:
        LogError: not a log, an empty one, or one of another model.
        ConfigurationError: queries that the model cannot take, an unknown choice, or too little memory.
        CurvatureUnavailable: the log does not hold what the curvature needs.

    Example:
        Two steps of a linear model on four samples, of which the first and the third are like the query and help it most:

        >>> import lightning as L
        >>> from tempfile import TemporaryDirectory
        >>> from torch.utils.data import DataLoader
        >>> from lightning_influence import InfluenceCallback
        >>> class Sum(L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(2, 1, bias=False)
        ...     def training_step(self, batch):
        ...         return torch.nn.functional.mse_loss(self.layer(batch), batch.sum(1, keepdim=True))
        ...     def configure_optimizers(self):
        ...         return torch.optim.AdamW(self.parameters(), lr=0.1)
        >>> quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        >>> module, samples = Sum(), torch.eye(2).repeat(2, 1)
        >>> with TemporaryDirectory() as log:
        ...     trainer = L.Trainer(max_epochs=1, accelerator="cpu", callbacks=[InfluenceCallback(log)], **quiet)
        ...     trainer.fit(module, DataLoader(samples, batch_size=2))
        ...     report = attribute(log, queries=[samples[:1]], model=module, data=samples, progress=False)
        >>> sorted(report.top(2).sample_id)
        [0, 2]
    """
    check_target(target)
    task, data, steps = as_task(model), TrainingData.of(data), LoggedSteps.of(log)
    named = {} if groups is None else named_groups(groups)
    asked = Queries.of(queries, data=data, precision=steps.manifest.precision)
    with random_state(None):
        asked = asked.held()
        n_queries = 1 if target is not None else count_queries(task, asked)
    deal = Deal.of(fabric, n_queries, RemovalSets(samples, list(named.values())), steps)
    progress = progress and deal.everyone.rank == 0
    replay = {"counterfactual": counterfactual, "sets": deal.sets, "verify": verify, "ranks": deal.replay}
    queried = _not_the_last(steps, task)
    with open_trajectory(steps, task, curvature, data, progress=progress, **replay) as trajectory:
        method = Method(
            curvature=resolved(curvature, trajectory),
            response=response,
            memory_window=memory_window,
            counterfactual=counterfactual,
            optimizer_assumption=optimizer_assumption,
        )
        most, own = memory_in_bytes(max_memory, task.device, deal.everyone.size), deal.queries
        parameters = dict(task.module.named_parameters())
        held = deal.holding(lambda: held_by_a_sweep(trajectory, method, parameters, max(len(own), 1), most))
        members = _members(consumed_by(trajectory, samples or ()), named)
        method = _within(held, method, trajectory)

        traits = Traits()

        def gradients(only: range) -> Vectors:
            return query_gradients(
                task,
                asked,
                list(trajectory.sizes),
                trajectory.select,
                target=target,
                query_loss=query_loss,
                only=only,
                traits=traits,
                progress=progress,
            )

        exact = method.response == "finite" and method.curvature == "hessian" and optimizer_assumption is None
        looks = named and exact and fabric is None and not asked.only_gradients
        moves: Vectors | None = {} if looks else None
        turns = [own[start : start + held.queries] for start in range(0, max(len(own), 1), held.queries)]
        pace = _pace(trajectory, method, n_queries, len(turns), most)
        options: dict[str, Any] = {
            "sets": deal.sets,
            "window_in_files": held.in_files,
            "moves": moves,
            "passed": pace,
            "progress": progress,
        }
        parts, lines = list[RowScores](), list[Tensor]()
        for turn in turns:
            of_queries = gradients(turn)
            parts.append(walked_or_run(trajectory, partial(sweep, trajectory, of_queries, method, **options)))
            if moves is not None:
                lines.append(straight_lines(of_queries, moves))
        every = RowScores.beside(parts)
        rows, of_groups = deal.sets.split(deal.gathered(every, steps, len(named)))
        made = replace(
            _provenance(steps, trajectory, method, target), queried=queried, query_gradient=traits.wrong or None
        )
    query_ids = list(range(rows.n_queries)) if target is None else ["mean" if isinstance(target, str) else "target"]
    scored = Groups(list(named), list(map(len, members)), of_groups, query_ids, members=members) if named else None
    if scored is not None and moves is not None:
        losses = partial(target_losses, task, asked, target, query_loss)
        scored = _with_bends(scored, task, losses, moves, torch.cat(lines, 1))
    return InfluenceReport(rows, query_ids=query_ids, metadata=made.to_json(), groups=scored)


def _with_bends(groups: Groups, task: Task, losses: Callable[[], Tensor], moves: Vectors, straight: Tensor) -> Groups:
    """Groups of which it is known whether their scores can be read as sizes; arguments as of `bends`."""
    largest_first = groups.scores.norm(dim=1).argsort(descending=True).tolist()
    return replace(groups, bends=bends(task, losses, moves, straight, largest_first))


def consumed_by(trajectory: ConsumedSamples, samples: Collection[int]) -> Tensor:
    """Ids of the samples that a run consumed, ascending.

    Raises:
        ConfigurationError: some of ``samples``, which are asked for, are not among them.
    """
    used = torch.cat([trajectory.sample_ids(t) for t in range(len(trajectory))]).unique()
    missing = set(samples).difference(used.tolist())
    if missing:
        raise ConfigurationError(
            f"samples names {min(missing)}, which no step of the run consumed; give ids of training samples that the run saw."
        )
    return used


def _members(used: Tensor, named: Mapping[str, list[int]]) -> list[list[int]]:
    """The samples of each group that are among those that the run consumed.

    Raises:
        ConfigurationError: none of any group.
    """
    members = [used[torch.isin(used, torch.tensor(ids))].tolist() for ids in named.values()]
    if named and not any(members):
        raise ConfigurationError(
            f"groups names samples of which the run consumed none ({next(iter(named.values()))[:4]}...); ids are indices into "
            "the training dataset."
        )
    return members


def _within(held: Holding, method: Method, trajectory: Trajectory) -> Method:
    """The method that there is memory for; what a replay may hold is told to it."""
    if isinstance(trajectory, ReplayTrajectory):
        trajectory.states.memory = held.replay
        trajectory.prepare()
    if held.memory_window < method.memory_window:
        warnings.warn(
            f"max_memory allows a memory window of {held.memory_window} steps instead of {method.memory_window}: scores of the "
            "first steps of a run, while its second moments are young, may be wrong. Give more memory, or room for temporary files.",
            stacklevel=3,
        )
    return replace(method, memory_window=held.memory_window)


def _pace(trajectory: Trajectory, method: Method, n_queries: int, turns: int, held: int) -> Pace:
    """Says how long it will take, and what would take less."""
    steps, queries = len(trajectory), "query" if n_queries == 1 else "queries"
    what = f"{steps} steps and {n_queries} {queries} in {turns} turn{'s' if turns > 1 else ''}, with the {method.response} response"
    cheaper = ["samples= scores some of the samples"]
    if method.response == "finite":
        cheaper.insert(0, "response='tangent' takes the optimizer's answer to first order")
    if n_queries > 1:
        cheaper.insert(0, f"target='mean' asks one query instead of {n_queries}")
    return Pace(what, steps * turns, held, cheaper)


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
    _refuse_another_model(steps, task)
    if curvature == "auto":
        curvature = best_curvature(replayed=_replays(steps, data))
    named = curvature_of(curvature)
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


def _replays(steps: LoggedSteps, data: Any) -> bool:
    """Whether a run can be replayed; warns of what it costs where it cannot."""
    record = steps.manifest.record
    if record == "gradients":
        why = "it was recorded without what a replay needs. Record with record='auto' or 'replay' for the exact one"
    elif record == "both" and TrainingData.of(data).dataset is None and not steps.holds_batches:
        why = "it does not hold the batches. Give data=, the training data of the run, for the exact one"
    else:
        return True
    warnings.warn(
        f"scores of this log rest on the Fisher matrix instead of the exact Hessian, because {why}. At a learning rate of 1e-3 the rank "
        "correlation with retraining was then 0.66 instead of 1.00 for an MLP, 0.98 for a CNN and 0.24 instead of 0.96 for a small "
        "GPT-2 (docs/benchmarks.md); at lower rates less is lost. curvature='fisher' says that this is meant.",
        stacklevel=5,
    )
    return False


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
        return partial(default_dtype, task.module, precision)
    return lambda: torch.autocast(task.device.type, dtypes[precision])


def _refuse_another_model(steps: LoggedSteps, task: Task) -> None:
    """Refuse a log of another model; warn of what the log lacks, and where its parameters are not those it ended with."""
    parameters = dict(task.module.named_parameters())
    if any(p.is_meta for p in parameters.values()):
        raise ConfigurationError(
            "the model is on the meta device and holds no weights; load those of the run's end into it first."
        )
    for name, shape in steps.manifest.shapes.items():
        if name not in parameters or list(parameters[name].shape) != shape:
            seen = "no such parameter" if name not in parameters else f"shape {list(parameters[name].shape)}"
            raise LogError(
                f"this is the log of another model: it records {name} of shape {shape}, and the {type(task.module).__name__} given "
                f"has {seen}. Give the module that was trained with this log."
            )
    for what, why in steps.reader.missing.items():
        if what in LEFT_OUT.values():  # as record="auto" may
            continue
        warnings.warn(f"the log lacks {what}: {why}", stacklevel=5)
    if steps.end is None:
        warnings.warn(
            f"the logged run did not finish; scores hold for its {len(steps)} complete steps and the model given.",
            stacklevel=5,
        )
    elif steps.end.moved:
        warnings.warn(
            f"{_MOVED}. Scores take the model given for the run's last parameters; for exact ones, train without that callback.",
            stacklevel=5,
        )
    elif (differ := _not_the_last(steps, task)) is not None:
        warnings.warn(
            f"{differ}, and scores are about the run's last parameters. Give the module as it left fit, or load its last "
            "checkpoint.",
            stacklevel=5,
        )


def _not_the_last(steps: LoggedSteps, task: Task) -> str | None:
    """What is wrong with the parameters of a model, which are not those that a run ended with; None where they are, or where
    it cannot be told.
    """
    if steps.end is None:
        return None
    if steps.end.moved:
        return _MOVED
    changed = steps.end.differing({name: p for name, p in task.module.named_parameters() if not p.is_meta})
    if not changed:
        return None
    return f"{len(changed)} parameters ({changed[0]}, ...) differ from those at the end of the logged run"


def _provenance(
    steps: LoggedSteps, trajectory: LoggedTrajectory | ReplayTrajectory, method: Method, target: Target
) -> Provenance:
    manifest = steps.manifest
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
        rows="assumed" if steps.rows_assumed else None,
        coverage=Coverage(
            kept / max(trained, 1),
            kept,
            manifest.coverage.recorded,
            trained,
            {name: kept / total for name, (kept, total) in trajectory.sizes.items()},
            manifest.excluded,
        ),
    )
    if not isinstance(trajectory, ReplayTrajectory):  # what the run itself verified while it was recorded
        verified = steps.reader.meta(len(trajectory) - 1).get("removals")
        return replace(made, removals=RemovalSummary.from_json(verified))
    removals = RemovalSummary.from_json(trajectory.removals.to_metadata())
    return replace(
        made,
        removals=removals,
        stopped_paths=trajectory.stopped_paths,
        hessian="by differences" if trajectory.differenced else None,
        replay_drift={str(step): d for step, d in trajectory.drift.items()},
    )
