"""The public verb of the error proxy: how far off the scores of a run are, predicted without retraining."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from lightning_influence.core.curvature import curvature_of
from lightning_influence.core.second_variation import ErrorProxy, QueryCurvature, scaled_learning_rate, second_variation
from lightning_influence.core.trajectory import Trajectory
from lightning_influence.errors import ConfigurationError, check_choice
from lightning_influence.log.steps import LoggedSteps
from lightning_influence.replay.trajectory import ReplayTrajectory, walked_or_run
from lightning_influence.report.tables import in_notebook
from lightning_influence.run.data import TrainingData
from lightning_influence.run.task import as_task
from lightning_influence.scoring.attribution import open_trajectory, resolved
from lightning_influence.scoring.memory import MaxMemory, held_by_a_proxy, memory_in_bytes
from lightning_influence.scoring.queries import (
    Queries,
    Target,
    check_target,
    count_queries,
    query_curvature,
    query_gradients,
)
from lightning_influence.scoring.query_loss import QueryLoss

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False)
class PredictedErrors:
    """Error proxies of chosen (sample, step) pairs, at the run's learning rate and at multiples of it.

    Attributes:
        proxies: by factor of the learning rate.
        curvature: ``"fisher"`` drops the third derivative of the loss.
        n_steps: of the run; a pair's horizon is the number of steps after its own.
    """

    proxies: dict[float, ErrorProxy]
    curvature: str
    n_steps: int

    def to_pandas(self) -> pd.DataFrame:
        """One row per pair, query and factor: the first-order score, its predicted error and the error's parts, and the
        second variation with its own.
        """
        import pandas as pd

        tables = []
        for factor, proxy in self.proxies.items():
            k, q = proxy.tangent.shape
            columns: dict[str, Any] = {
                "lr_factor": factor,
                "sample_id": proxy.sample_ids.repeat_interleave(q),
                "step": proxy.steps.repeat_interleave(q),
                "horizon": self.n_steps - 1 - proxy.steps.repeat_interleave(q),
                "query": torch.arange(q).repeat(k),
            }
            parts = {
                "tangent": proxy.tangent,
                "error": proxy.total,
                "of_optimizer": proxy.finite,
                "of_curvature": proxy.curvature,
            }
            parts |= {
                "corrected": proxy.corrected,
                "second_order": proxy.second_order,
                "of_step": proxy.step,
                "of_memory": proxy.memory,
            }
            tables.append(pd.DataFrame(columns | {name: part.flatten().numpy() for name, part in parts.items()}))
        return pd.concat(tables, ignore_index=True)

    def relative(self) -> pd.Series:
        """Size of the predicted error relative to the scores, ``||error|| / ||tangent||``, by factor."""
        import pandas as pd

        sizes = {f: float(p.total.norm() / p.tangent.norm().clamp(min=1e-300)) for f, p in self.proxies.items()}
        return pd.Series(sizes, name="relative error").rename_axis("lr_factor")

    def curve(self) -> pd.DataFrame:
        """`relative` over the horizon: one row per horizon of a pair, one column per factor of the learning rate."""
        squares = self.to_pandas()[["lr_factor", "horizon", "error", "tangent"]]
        squares[["error", "tangent"]] **= 2
        sums = squares.groupby(["horizon", "lr_factor"]).sum()
        relative = (sums.error / sums.tangent.clip(lower=1e-300)) ** 0.5
        return cast("pd.DataFrame", relative.unstack("lr_factor"))

    def plot(self) -> Figure:
        """The `curve`."""
        from lightning_influence.report.plots import lines

        return lines(self.curve(), xlabel="horizon (steps)", ylabel="predicted error / score", yscale="log")

    def __repr__(self) -> str:
        n_pairs, n_queries = next(iter(self.proxies.values())).tangent.shape
        sizes = ", ".join(
            f"{size:.2g} at {factor:g} times the learning rate" for factor, size in self.relative().items()
        )
        return f"PredictedErrors({n_pairs} pairs x {n_queries} queries, {self.curvature}; error / score {sizes})"

    def _repr_html_(self) -> str:
        return in_notebook(repr(self), self.relative().reset_index())


def error_proxy(
    log: str | Path | LoggedSteps,
    *,
    queries: Any,
    model: Any,
    data: Any = None,
    target: Target = None,
    curvature: Literal["auto", "fisher", "hessian"] = "auto",
    counterfactual: Literal["drop", "zero"] = "drop",
    query_loss: QueryLoss | None = None,
    pairs: int | Sequence[tuple[int, int]] = 16,
    lr_factors: Sequence[float] = (1.0,),
    seed: int = 0,
    max_memory: MaxMemory = "auto",
    progress: bool = True,
) -> PredictedErrors:
    """Predicted error (truth minus score) of first-order scores: `ErrorProxy.total`, which is half the run's second
    variation (docs/method.md, "How far to trust a score") with its elementwise part in closed form.

    The other arguments are as of `attribute`, whose ``response`` is ``"tangent"`` here by definition. No retraining is needed.
    From a replay the second variation is exact; from a log of gradients the Fisher matrix stands for the Hessian, and the
    third derivative of the loss is left out.

    Args:
        pairs: (sample id, step) pairs, or how many to draw at random.
        lr_factors: multiples of the learning rate at which the same recorded path is looked at.
        max_memory: as of `attribute`. The adjoints of the queries at every step of the run have to fit.

    Raises:
        ConfigurationError: a pair that the run does not hold, or too little memory.
        CurvatureUnavailable: the log does not hold what the curvature needs.
    """
    check_target(target)
    check_choice("curvature", curvature, ("auto", "fisher", "hessian"))
    task, steps = as_task(model), LoggedSteps.of(log)
    data = TrainingData.of(data)
    queries = Queries.of(queries, data=data, precision=steps.manifest.precision).held()
    with open_trajectory(steps, model, curvature, data, progress=progress) as run:
        used = resolved(curvature, run)
        exact = curvature_of(used).third_derivative
        names = list(run.sizes)
        chosen = _drawn(run, pairs, seed) if isinstance(pairs, int) else list(pairs)
        if not chosen:
            raise ConfigurationError("pairs is empty; give at least one (sample id, step).")
        count = 1 if target is not None else count_queries(task, queries)
        parameters = dict(task.module.named_parameters())
        held = held_by_a_proxy(run, parameters, max(count, 1), len(chosen), memory_in_bytes(max_memory, task.device))
        if isinstance(run, ReplayTrajectory):
            run.states.memory = held.replay
        of_queries = query_curvature(model, queries, names, target=target, query_loss=query_loss) if exact else None
        parts = dict[float, list[ErrorProxy]]()
        for only in (range(i, min(i + held.queries, count)) for i in range(0, max(count, 1), held.queries)):
            gradients = query_gradients(
                model, queries, names, run.select, target=target, query_loss=query_loss, only=only, progress=progress
            )
            for factor in lr_factors:
                work = partial(
                    second_variation,
                    run if factor == 1.0 else scaled_learning_rate(run, factor),
                    gradients,
                    chosen,
                    curvature=used,  # type: ignore[arg-type]
                    counterfactual=counterfactual,
                    query_curvature=None if of_queries is None else _columns(of_queries, only),
                    at_once=held.pairs,
                    progress=progress,
                )
                one = walked_or_run(run, work)
                parts.setdefault(factor, []).append(one)
        proxies = {factor: ErrorProxy.of_queries(each) for factor, each in parts.items()}
        return PredictedErrors(proxies, used, len(run))


def _columns(curvature: QueryCurvature, only: range) -> QueryCurvature:
    """The curvature of some queries."""
    return lambda directions: curvature(directions)[:, only.start : only.stop]


def _drawn(run: Trajectory, n: int, seed: int) -> list[tuple[int, int]]:
    """Random pairs, in order of step; all of them where there are no more."""
    if n < 1:
        raise ConfigurationError(f"pairs={n}; give at least 1, or a list of (sample id, step).")
    generator = torch.Generator().manual_seed(seed)
    pairs = set[tuple[int, int]]()
    for step in torch.randint(len(run), (100 * n,), generator=generator).tolist():
        ids = run.sample_ids(step)
        pairs.add((int(ids[torch.randint(len(ids), (1,), generator=generator)]), step))
        if len(pairs) == n:
            break
    return sorted(pairs, key=lambda pair: (pair[1], pair[0]))
