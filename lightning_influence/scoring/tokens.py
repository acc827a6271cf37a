"""Which tokens of a training text helped or harmed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_influence.core.removal import gradient_change
from lightning_influence.core.removal_sets import RemovalSets
from lightning_influence.core.sweep import Method, gradient_adjoints
from lightning_influence.core.trajectory import StepRecord
from lightning_influence.errors import ConfigurationError
from lightning_influence.log.steps import LoggedSteps
from lightning_influence.replay.plan import PlannedStep
from lightning_influence.replay.token_products import TokenProducts
from lightning_influence.replay.trajectory import ReplayTrajectory
from lightning_influence.report.tokens import TokenScores
from lightning_influence.run.data import TrainingData
from lightning_influence.scoring.attribution import consumed_by, open_trajectory
from lightning_influence.scoring.queries import Queries, Target, query_gradients
from lightning_influence.scoring.query_loss import QueryLoss


def token_scores(
    log: str | Path | LoggedSteps,
    samples: Collection[int],
    *,
    queries: Any,
    model: Any,
    data: Any = None,
    target: Target = "mean",
    curvature: Literal["none", "gauss_newton", "hessian"] = "hessian",
    counterfactual: Literal["drop", "zero"] = "drop",
    query_loss: QueryLoss | None = None,
    progress: bool = True,
) -> TokenScores:
    """The scores of chosen samples taken apart by their tokens, to first order.

    A token's score is what the loss of predicting it did: the predicted change of the query loss if that one loss were taken out
    of training, scaled as the removal of the whole sample is, so that the tokens of a sample add up to its score of
    ``attribute(..., response="tangent")``. It costs one sweep, and one more evaluation of each step that holds a chosen sample.
    The other arguments are as of `attribute`, and two of them begin elsewhere: the target is the mean of the queries, because a
    text is shaded by one number a token, and the curvature is the exact one, which ``"auto"`` stands for where a run is replayed.

    Args:
        log: directory written by `InfluenceCallback`, with snapshots to replay the run from.
        samples: ids of training samples.

    Raises:
        LogError: not a log, an empty one, or one of another model.
        ConfigurationError: no samples, a sample that the run did not see, a log without snapshots, or a training step whose loss is
            not one cross-entropy of labels by index.
    """
    asked = torch.tensor(sorted(set(samples)), dtype=torch.int64)
    if not len(asked):
        raise ConfigurationError("samples is empty; give ids of training samples, those of report.bottom(5), say.")
    data, logged = TrainingData.of(data), LoggedSteps.of(log)
    if logged.manifest.record == "gradients":
        raise ConfigurationError(
            "scores of tokens need the run to be replayed, and this log holds gradients alone; record with record='replay'."
        )
    sets = RemovalSets(asked.tolist())
    replay = {"counterfactual": counterfactual, "sets": sets, "verify": False}
    how = "auto" if curvature == "none" else curvature  # which replays, too
    with open_trajectory(logged, model, how, data, progress=progress, **replay) as trajectory:
        assert isinstance(trajectory, ReplayTrajectory)
        steps = [t for t in range(len(trajectory)) if bool(torch.isin(trajectory.sample_ids(t), asked).any())]
        consumed_by(trajectory, asked.tolist())
        gradients = query_gradients(
            model,
            Queries.of(queries, data=data, precision=logged.manifest.precision),
            list(trajectory.sizes),
            trajectory.select,
            target=target,
            query_loss=query_loss,
            progress=progress,
        )
        method = Method(curvature=curvature, response="tangent", counterfactual=counterfactual)
        scores: dict[int, Tensor] = {}
        labels: dict[int, Tensor] = {}
        weights: dict[int, Tensor] = defaultdict(lambda: torch.zeros(()))
        held = set(steps)
        for t, vectors in gradient_adjoints(trajectory, gradients, method, first=steps[0], progress=progress):
            if t not in held:
                continue
            products = trajectory.token_products(t, vectors)
            for z, (products_of_tokens, targets, counted) in _of_step(
                trajectory.plan.step(t), products, sets, counterfactual
            ):
                if z in labels and len(labels[z]) != len(targets):
                    raise ConfigurationError(
                        f"sample {z} has {len(targets)} labels at step {t} and {len(labels[z])} at a later one; scores of tokens "
                        "need texts that are the same at every visit, with the same padding."
                    )
                scores[z], labels[z] = scores[z] + products_of_tokens if z in scores else products_of_tokens, targets
                weights[z] = weights[z] + counted
    positions = [weights[z].nonzero()[:, 0] for z in asked.tolist()]
    chosen = list(zip(asked.tolist(), positions, strict=True))
    return TokenScores(
        asked, [labels[z][where] for z, where in chosen], positions, [scores[z].T[where].cpu() for z, where in chosen]
    )


def _of_step(
    planned: PlannedStep, products: list[TokenProducts], sets: RemovalSets, counterfactual: Literal["drop", "zero"]
) -> Iterator[tuple[int, tuple[Tensor, Tensor, Tensor]]]:
    """Scores ``(q, labels)``, labels and their weights of each row of the step that is a chosen sample's.

    The change of the gradient, ``sum_b shared_b G_b + sum_i own_i s_i``, is split by the labels: ``s_i`` is the sum of theirs, and
    the other term, which the smaller denominator causes, goes by their weights in it.
    """
    numbers = planned.micro_batch_numbers
    columns = (planned.sample_ids, planned.loss_weights, numbers)
    removed = gradient_change(StepRecord(0, *columns, {}, {}, {}, averaged=planned.averaged), counterfactual, sets)
    for own, owner, row in zip(removed.own.tolist(), removed.owner.tolist(), removed.row.tolist(), strict=True):
        z, b = int(removed.sample_ids[owner]), int(numbers[row])
        rows, part = (numbers == b).nonzero()[:, 0], products[b]
        if part.products.shape[1] % len(rows):
            raise ConfigurationError(
                f"the training step has {part.products.shape[1]} labels for {len(rows)} samples; scores of tokens need the same "
                "number of labels, ignored ones included, for every sample of a batch."
            )
        i = int((rows < row).sum())
        each = part.products.unflatten(1, (len(rows), -1))[:, i]
        targets, weights = (values.view(len(rows), -1) for values in (part.targets, part.weights))
        leaving = weights[planned.sample_ids[rows] == z].sum().clamp(min=1e-30)
        shared = float(removed.shared[owner, b]) * part.whole[:, None] * (weights[i] / leaving).to(part.whole)
        yield z, (own * each + shared, targets[i], weights[i])
