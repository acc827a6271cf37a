"""How far the scores of one's own run can be trusted: measured by really training again (docs/method.md, "Training again")."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_influence.errors import ConfigurationError
from lightning_influence.log.steps import LoggedSteps
from lightning_influence.report import InfluenceReport
from lightning_influence.report.membership import GroupsOf, named_groups
from lightning_influence.report.provenance import Measured
from lightning_influence.report.tables import in_notebook
from lightning_influence.run.data import TrainingData
from lightning_influence.run.task import as_task
from lightning_influence.scoring.attribution import attribute, consumed_by
from lightning_influence.scoring.queries import Queries, Target, asked_of, check_target, query_losses
from lightning_influence.scoring.query_loss import QueryLoss
from lightning_influence.trust.agreement import Agreement, agreement_of
from lightning_influence.trust.own_run import own_run
from lightning_influence.trust.results import Results
from lightning_influence.trust.retraining import Removal, Run, each_effect, moved_initialisation, retrain

if TYPE_CHECKING:
    import pandas as pd

CEILING = "ceiling"
"""The row of the truth measured again: what any estimator can reach."""

ESTIMATORS: dict[str, dict[str, Any]] = {
    "SGD assumed": {"optimizer_assumption": "sgd", "response": "tangent"},
    "first order": {"response": "tangent"},
    "finite": {"response": "finite"},
}
"""What is checked by default; keyword arguments of `attribute`. ``"finite"`` is its default."""


@dataclass(frozen=True, repr=False)
class Faithfulness:
    """Agreement of scores with retraining.

    Attributes:
        single: by estimator, over removals of one sample; under `CEILING` that of the truth with itself.
        subsets: the same over removals of random subsets, whose Spearman correlation is the LDS; empty if none.
        truth: ``(n_removals, n_queries)``, single removals first, then subsets, then groups.
        scores: predictions of the same, by estimator.
        removals: in the order of the rows.
        levels: measured size of the config, algorithm and system errors (docs/method.md, "How far to trust a score").
        groups: the same over removals of the groups given; empty if none.
    """

    single: Mapping[str, Agreement]
    subsets: Mapping[str, Agreement]
    truth: Tensor
    scores: Mapping[str, Tensor]
    removals: Sequence[Removal]
    levels: Mapping[str, float]
    groups: Mapping[str, Agreement] = field(default_factory=dict)

    def to_pandas(self) -> pd.DataFrame:
        """One row per estimator: each statistic with its confidence interval."""
        import pandas as pd

        rows = []
        for name, agreement in self.single.items():
            row: dict[str, Any] = {"estimator": name}
            for statistic in ("spearman", "pearson", "relative_error"):
                estimate = getattr(agreement, statistic)
                row |= {statistic: estimate.value, f"{statistic}_low": estimate.low, f"{statistic}_high": estimate.high}
            if name in self.subsets:
                lds = self.subsets[name].spearman
                row |= {"lds": lds.value, "lds_low": lds.low, "lds_high": lds.high}
            if name in self.groups:
                agreements = self.groups[name]
                row |= {
                    "groups_spearman": agreements.spearman.value,
                    "groups_relative_error": agreements.relative_error.value,
                }
            rows.append(row)
        return pd.DataFrame(rows)

    @property
    def best(self) -> str:
        """The estimator that ranks single removals most as retraining does."""
        return max((n for n in self.single if n != CEILING), key=lambda n: self.single[n].spearman.value)

    @property
    def conclusion(self) -> str:
        """What may and may not be concluded, in words."""
        best = self.best
        agreement, sentences = self.single[best], []
        spearman = agreement.spearman
        if spearman.low > 0.9:
            sentences.append(
                f"Scores of '{best}' rank removals as retraining does ({spearman}); their order can be relied on."
            )
        elif spearman.low > 0.5:
            sentences.append(
                f"Scores of '{best}' rank removals roughly as retraining does ({spearman}); rely on extremes only."
            )
        else:
            sentences.append(
                f"Scores of '{best}' do not reliably rank removals ({spearman}); do not act on single scores."
            )
        if agreement.relative_error.value < 0.2:
            sentences.append("Their size can be read as a change of the loss.")
        else:
            sentences.append(
                f"Their size is off by {agreement.relative_error.value:.0%} and should not be read as a change of the loss."
            )
        ceiling = self.single.get(CEILING)
        if ceiling is not None and ceiling.spearman.value < 0.9:
            sentences.append(
                f"The effect itself is reproducible only to {ceiling.spearman} from a slightly moved initialisation: what "
                "agrees better knows this one run, not the samples, and single removals mean little in it."
            )
        return " ".join(sentences)

    @property
    def trust(self) -> dict[str, Any]:
        """What a report's page says of trust: ``report.metadata |= check.trust``."""
        ceiling = self.single[CEILING].spearman if CEILING in self.single else None
        return Measured(self.levels, self.single[self.best].spearman, ceiling, self.conclusion).to_json()

    def __repr__(self) -> str:
        singles, n_queries = next(iter(self.single.values())).n_removals, self.truth.shape[1]
        lines = "; ".join(f"spearman of {name!r} {agreement.spearman}" for name, agreement in self.single.items())
        of_groups = next(iter(self.groups.values())).n_removals if self.groups else 0
        subsets = len(self.removals) - singles - of_groups
        groups = f" and {of_groups} groups" if of_groups else ""
        return f"Faithfulness({singles} removals and {subsets} subsets{groups}, {n_queries} queries; {lines})"

    def _repr_html_(self) -> str:
        return in_notebook(self.conclusion, self.to_pandas())

    def __str__(self) -> str:
        table = self.to_pandas().round(3).to_string(index=False)
        levels = ", ".join(f"{name} {value:.2g}" for name, value in self.levels.items())
        return f"{table}\nrelative sizes of error: {levels}\n{self.conclusion}"


def check_faithfulness(
    log: str | Path | LoggedSteps,
    *,
    queries: Any,
    model: Any,
    data: Any,
    target: Target = None,
    counterfactual: Literal["drop", "zero"] = "drop",
    query_loss: QueryLoss | None = None,
    make_model: Callable[[], Any] | None = None,
    estimators: Mapping[str, Mapping[str, Any]] = ESTIMATORS,
    removals: int | Sequence[int] = 30,
    subsets: int = 0,
    subset_size: float = 0.1,
    groups: GroupsOf | None = None,
    ceiling: bool = True,
    dtype: torch.dtype | None = torch.float64,
    results: str | Path | None = None,
    workers: int = 0,
    seed: int = 0,
    progress: bool = True,
) -> Faithfulness:
    """Train the recorded run again without some samples, and compare what happens with what was predicted.

    ``log``, ``queries``, ``model`` (as it left ``fit``), ``target``, ``counterfactual`` and ``query_loss`` are as of
    `attribute`; its other arguments are those of the ``estimators``.

    Args:
        data: the training data of the run: a datamodule, a loader or a dataset.
        make_model: gives the module at its initialisation; by default taken from the log's first snapshot.
        estimators: `attribute`'s keyword arguments by name.
        removals: sample ids to remove, or how many to draw.
        subsets: how many random subsets of ``subset_size`` of the samples to remove besides, for the linear
            datamodeling score.
        groups: as of `attribute`, to remove besides: what removing each as a whole does is predicted and measured.
        ceiling: measure the truth once more from a slightly moved initialisation, and with other random numbers where
            the module draws any.
        dtype: of retraining; None for the run's own.
        results: a file that keeps finished retrainings, so that an interrupted check can be continued; the file of
            another run, other queries or another counterfactual is refused.
        workers: processes that retrain side by side (`retraining.each_effect`).

    Raises:
        ConfigurationError: no initialisation, samples that the run did not use, too few removals, no estimator, or
            ``results`` of another check.
    """
    check_target(target)
    if not estimators:
        raise ConfigurationError("estimators is empty; name at least one, as in faithfulness.ESTIMATORS.")
    task = as_task(model)
    steps, source = LoggedSteps.of(log), TrainingData.of(data)
    held = Queries.of(queries, data=source, precision=steps.manifest.precision).held()
    named = {} if groups is None else named_groups(groups)
    asked = _removals(consumed_by(steps, ()), removals, subsets, subset_size, named, seed)
    together = {str(number): sorted(r) for number, r in enumerate(asked) if isinstance(r, frozenset)}
    reports = {
        name: attribute(
            steps, queries=held.for_gradients(), model=task, data=source, target=target, query_loss=query_loss,
            counterfactual=counterfactual, groups=together or None, progress=progress, **options,
        )
        for name, options in estimators.items()
    }  # fmt: skip
    run = own_run(steps, task, source, make_model, dtype=dtype, seed=seed)
    truth_queries = held if dtype is None else held.to_dtype(dtype)

    def losses(module: nn.Module) -> Tensor:
        return asked_of(query_losses(task.on(module), truth_queries, query_loss), target)

    baseline = losses(retrain(run))
    asked_for = target if target is None or isinstance(target, str) else torch.as_tensor(target).tolist()
    subject = {
        "baseline": baseline.tolist(),
        "counterfactual": counterfactual,
        "target": asked_for,
        "dtype": str(dtype),
    }
    finished = None if results is None else Results(Path(results), subject)
    effects = _Effects(run, asked, losses, counterfactual, workers, progress, finished)
    truth = effects.measure("retraining")
    scores = {name: _predicted(report, asked) for name, report in reports.items()}
    measured = dict(scores)
    if ceiling:
        moved = moved_initialisation(replace(run, seed=seed + 1), seed=seed)
        measured[CEILING] = replace(effects, run=moved).measure(CEILING)
    n, m = len(asked) - subsets - len(named), len(asked) - len(named)
    single, of_subsets, of_groups = (
        {name: agreement_of(scored[part], truth[part]) for name, scored in measured.items()}
        if part.start < part.stop
        else {}
        for part in (slice(0, n), slice(n, m), slice(m, len(asked)))
    )
    return Faithfulness(
        single,
        of_subsets,
        truth,
        scores,
        asked,
        _levels(reports, baseline, losses, task.module, run.make_module),
        of_groups,
    )


@dataclass(frozen=True)
class _Effects:
    """Measures removals, those apart that results already hold."""

    run: Run
    removals: Sequence[Removal]
    losses: Callable[[nn.Module], Tensor]
    counterfactual: Literal["drop", "zero"]
    workers: int
    progress: bool
    results: Results | None

    def measure(self, what: str) -> Tensor:
        """What each removal changes, ``(n_removals, n_queries)`` float64; finished ones are kept under ``what``."""
        done = {} if self.results is None else self.results.done(what)
        waiting = [r for r in self.removals if _key(r) not in done]
        each = each_effect(self.run, waiting, self.losses, counterfactual=self.counterfactual, workers=self.workers)
        if waiting:
            for number, effect in tqdm(each, what, len(waiting), unit="run", delay=2, disable=not self.progress):
                key = _key(waiting[number])
                done[key] = effect.tolist()
                if self.results is not None:
                    self.results.keep(what, key, done[key])
        return torch.tensor([done[_key(r)] for r in self.removals], dtype=torch.float64)


def _key(removal: Removal) -> str:
    return json.dumps(sorted(removal) if isinstance(removal, frozenset) else removal)


def _removals(
    used: Tensor,
    singles: int | Sequence[int],
    subsets: int,
    size: float,
    groups: Mapping[str, Sequence[int]],
    seed: int,
) -> list[Removal]:
    """Samples, then random subsets, then groups."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(singles, int):
        order = torch.randperm(len(used), generator=generator)
        chosen = used[order[: max(singles, 0)]].sort().values.tolist()
    else:
        chosen = list(singles)
        unknown = sorted(set(chosen) - set(used.tolist()))
        if unknown:
            raise ConfigurationError(f"sample {unknown[0]} was not used in the run; choose from report.sample_ids.")
    if not 0 < size < 1:
        raise ConfigurationError(
            f"a subset of {size:g} of the samples cannot be removed; give a fraction between 0 and 1."
        )
    for what, n in (("removals", len(chosen)), ("subsets", subsets), ("groups", len(groups))):
        if n < 3 and (what == "removals" or n):
            raise ConfigurationError(f"{n} {what} are too few for a correlation; give at least 3.")
    n = max(1, round(size * len(used)))
    drawn = [used[torch.randperm(len(used), generator=generator)[:n]].tolist() for _ in range(subsets)]
    return [*chosen, *map(frozenset, drawn), *map(frozenset, groups.values())]


def _predicted(report: InfluenceReport, removals: Sequence[Removal]) -> Tensor:
    """Scores ``(n_removals, n_queries)``, of what leaves together by the joint response."""
    singles = [r for r in removals if not isinstance(r, frozenset)]
    rows = report.scores[torch.searchsorted(report.sample_ids, torch.tensor(singles))]
    return (rows if report.groups is None else torch.cat([rows, report.groups.scores])).double()


def _levels(
    reports: Mapping[str, InfluenceReport],
    baseline: Tensor,
    losses: Callable[[nn.Module], Tensor],
    module: nn.Module,
    make_module: Callable[[], Any],
) -> dict[str, float]:
    """Sizes of the three levels of error, relative to the scores, as far as the estimators asked for show them."""
    levels = {}
    settings = ("response", "curvature")
    for assumed in (r for r in reports.values() if r.metadata["optimizer_assumption"]):
        for matched in (r for r in reports.values() if not r.metadata["optimizer_assumption"]):
            if all(assumed.metadata[k] == matched.metadata[k] for k in settings):
                levels["config"] = float((assumed.scores - matched.scores).norm() / matched.scores.norm())
    for report in reports.values():
        if report.metadata["response"] == "finite" and not report.metadata["optimizer_assumption"]:
            levels["algorithm"] = float(report.nonlinearity.norm() / report.scores.norm())
    twin = make_module()
    twin.load_state_dict(module.state_dict())
    ended = losses(twin.to(torch.float64) if baseline.dtype == torch.float64 else twin)
    levels["system"] = float((baseline - ended).abs().max() / ended.abs().max())
    return levels
