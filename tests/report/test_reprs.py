"""No object prints raw tensors: a line in a terminal, a table in a notebook."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
from modules import digits, loader
from test_page_samples import some_tokens, visited
from test_report import some_report

from lightning_influence import FunctionTask, InfluenceCallback, SelectionDataModule
from lightning_influence.core.scores import RowScores
from lightning_influence.core.second_variation import ErrorProxy
from lightning_influence.lightning.tuning import Tuning
from lightning_influence.report.groups import Groups
from lightning_influence.selection.decisions import SelectionReport
from lightning_influence.trust.agreement import agreement_of
from lightning_influence.trust.cleaning import Cleaning
from lightning_influence.trust.error_proxy import PredictedErrors
from lightning_influence.trust.faithfulness import CEILING, Faithfulness


def faithfulness() -> Faithfulness:
    truth = torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    single = {"finite": agreement_of(truth[:5] * 1.01, truth[:5]), CEILING: agreement_of(truth[:5].flip(0), truth[:5])}
    subsets = {"finite": agreement_of(truth[5:] * 0.9, truth[5:])}
    removals = [1, 2, 3, 4, 5, *(frozenset([z, z + 1]) for z in (1, 2, 3))]
    return Faithfulness(single, subsets, truth, {"finite": truth}, removals, {"config": 0.9})


def predicted() -> PredictedErrors:
    parts = [torch.full((3, 2), float(i + 1)) for i in range(len(ErrorProxy.__dataclass_fields__) - 2)]
    return PredictedErrors({1.0: ErrorProxy(torch.arange(3), torch.arange(3), *parts)}, "hessian", 9)


def decisions() -> SelectionReport:
    report = SelectionReport()
    report.add(4, torch.arange(3), torch.randn(3), torch.tensor([1.0, 0.0, 1.0]))
    return report


def some_groups() -> Groups:
    rows = RowScores(torch.arange(2), torch.arange(2), *(torch.ones(2, 3) for _ in range(2)))
    return Groups(["odd", "even"], [3, 4], rows, ["a", "b", "c"])


def selecting() -> SelectionDataModule:
    module = SelectionDataModule(loader(digits(8), 4), keep=0.5, horizon=2)
    module.selector.report = decisions()
    return module


OBJECTS: dict[str, tuple[Callable[[], Any], str]] = {
    "report": (some_report, "InfluenceReport(40 samples x 3 queries, 40 rows; finite, fisher)"),
    "rows": (lambda: some_report().rows, "RowScores(40 rows x 3 queries, 5 steps)"),
    "faithfulness": (
        faithfulness,
        "Faithfulness(5 removals and 3 subsets, 2 queries; spearman of 'finite' 1.000 [1.000",
    ),
    "agreement": (lambda: faithfulness().single["finite"], "Agreement(spearman 1.000 [1.000, 1.000], pearson"),
    "errors": (predicted, "PredictedErrors(3 pairs x 2 queries, hessian; error / score "),
    "tuning": (
        lambda: Tuning(pd.DataFrame({"horizon": [0, 4], "lr": [0.1, 0.01], "loss": [2.0, 1.5], "kept": [0.5, 0.5]})),
        "Tuning(2 runs; lowest loss 1.5 at horizon 4, lr 0.01)",
    ),
    "decisions": (decisions, "SelectionReport(1 decisions on 3 samples; mean weight 0.667)"),
    "no decisions": (SelectionReport, "SelectionReport(0 decisions on 0 samples)"),
    "proxy": (lambda: predicted().proxies[1.0], "ErrorProxy(3 pairs x 2 queries)"),
    "dynamics": (lambda: visited(12, 3), "TrainingDynamics(12 samples, 36 visits)"),
    "visits": (lambda: visited(12, 3).visits, "Dynamics(36 visits, 10 classes)"),
    "groups": (some_groups, "Groups(2 groups x 3 queries: odd, even)"),
    "task": (
        lambda: FunctionTask(torch.nn.Linear(2, 1), torch.nn.functional.mse_loss),
        "FunctionTask(Linear of 3 parameters; loss function mse_loss)",
    ),
    "cleaning": (lambda: Cleaning([3, 4], torch.ones(2)), "Cleaning(2 samples removed; predicted_change 1)"),
    "tokens": (some_tokens, "TokenScores(2 samples, 5 tokens x 1 queries)"),
    "callback": (
        lambda: InfluenceCallback("runs/log", record="replay"),
        "InfluenceCallback('runs/log', record='replay',",
    ),
    "selection": (selecting, "SelectionDataModule(DataLoader; selection: horizon=2, every='epoch', Fraction("),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_a_line_and_a_table(name: str) -> None:
    make, told = OBJECTS[name]
    shown = make()
    assert repr(shown).startswith(told) and "\n" not in repr(shown) and "tensor" not in repr(shown)
    if name not in ("rows", "proxy", "visits", "task"):
        assert "<table" in shown._repr_html_() and "tensor(" not in shown._repr_html_()


def test_a_datamodule_prints_without_a_trainer() -> None:
    assert str(selecting()) == repr(selecting())
    off = SelectionDataModule(loader(digits(8), 4), online_selection=False)
    assert "selection: off" in repr(off)
    assert "scores of a report" in repr(SelectionDataModule.from_report(loader(digits(8), 4), some_report(8)))
