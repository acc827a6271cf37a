"""What the benchmarks share: the estimators side by side, and their agreement with real retraining."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from workloads import Trained, Workload

from lightning_influence import InfluenceCallback, attribute
from lightning_influence.report import InfluenceReport
from lightning_influence.run.batches import to_dtype
from lightning_influence.scoring.queries import query_losses
from lightning_influence.trust.agreement import agreement_of
from lightning_influence.trust.retraining import Removal, Run, leave_one_out, recorded_run

ESTIMATORS: dict[str, dict[str, Any]] = {
    "SGD-influence": {"optimizer_assumption": "sgd", "response": "tangent", "curvature": "fisher"},
    "paper: tangent + Fisher": {"response": "tangent", "curvature": "fisher"},
    "finite + Fisher": {"response": "finite", "curvature": "fisher"},
    "metagradient: tangent + Hessian": {"response": "tangent", "curvature": "hessian"},
    "finite + Hessian": {"response": "finite", "curvature": "hessian"},
}


def quiet() -> None:
    """Only what a benchmark prints itself."""
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", module="torch")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


@contextmanager
def timed(into: dict[str, float], name: str) -> Iterator[None]:
    """Seconds of a block, under a name."""
    start = time.perf_counter()
    yield
    into[name] = time.perf_counter() - start


def trained(
    workload: Workload, log: Path, *, lr: float, betas: tuple[float, float] = (0.9, 0.999), **options: Any
) -> Trained:
    """A module trained and recorded for replay."""
    module = workload.make(lr, betas)
    options = {"record": "replay", "existing": "overwrite", **options}
    workload.fit(module, InfluenceCallback(log, **options))
    return module


def true_effects(
    workload: Workload, log: Path, chosen: Sequence[Removal], *, counterfactual: str, workers: int = 0, **settings: Any
) -> Tensor:
    """Effect of really removing each sample, or set of samples, on every query, ``(n_chosen, n_queries)``, in float64."""
    train, queries = workload.split()
    run: Run = recorded_run(log, lambda: workload.make(**settings), train, dtype=torch.float64)
    asked = [to_dtype(batch, torch.float64) for batch in DataLoader(queries, workload.n_queries)]
    losses = workload.module.each_loss
    return leave_one_out(
        run,
        chosen,
        lambda m: query_losses(m, asked, losses),
        counterfactual=counterfactual,
        progress=False,
        workers=workers,  # type: ignore[arg-type]
    )


def scores(
    workload: Workload, log: Path, module: Trained, *, target: str | None = None, **options: Any
) -> InfluenceReport:
    """Influence of every training sample on the workload's queries."""
    queries = DataLoader(workload.split()[1], workload.n_queries)
    return attribute(log, queries=queries, model=module, target=target, progress=False, **options)  # type: ignore[arg-type]


def picked(n: int, of: int, seed: int = 1) -> list[int]:
    """``n`` of the first samples, spread at random."""
    return sorted(torch.randperm(of, generator=torch.Generator().manual_seed(seed))[:n].tolist())


def agreement_row(found: Tensor, truth: Tensor) -> dict[str, Any]:
    """Agreement per query and of the mean target."""
    each, mean = agreement_of(found, truth), agreement_of(found.mean(1, keepdim=True), truth.mean(1, keepdim=True))
    return {
        "Spearman": each.spearman.value,
        "low": each.spearman.low,
        "high": each.spearman.high,
        "error": each.relative_error.value,
        "Spearman, mean": mean.spearman.value,
        "error, mean": mean.relative_error.value,
    }


def show(rows: Sequence[dict[str, Any]], digits: int = 4) -> None:
    """Print rows as a table."""
    print(pd.DataFrame(rows).to_string(index=False, float_format=lambda v: f"{v:.{digits}f}"), flush=True)
