"""Precision x optimizer x clipping x accumulation x parameter groups, each against brute force.

The reference is a plain training loop in float64: the derivative of the query loss in the removed share of a sample, by
central differences; in half precision, the loss without the sample.
"""

from __future__ import annotations

import copy
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from modules import Classifier, digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceCallback, attribute

BATCH, STEPS = 4, 6
OPTIMIZERS: dict[str, Any] = {
    "adamw": (torch.optim.AdamW, {"lr": 2e-3, "weight_decay": 0.1}),
    "adam": (torch.optim.Adam, {"lr": 2e-3, "weight_decay": 0.02}),
    "amsgrad": (torch.optim.AdamW, {"lr": 2e-3, "amsgrad": True}),
    "sgd": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.02}),
    "momentum": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.1}),
    "nesterov": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
}
CLIPS: dict[str, dict[str, Any]] = {
    "unclipped": {},
    "norm": {"gradient_clip_val": 0.8},
    "value": {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
}
TOLERANCE = {"64-true": 1e-5, "32-true": 1e-3, "bf16-mixed": 0.15}


class Combination(NamedTuple):
    """One of the table's."""

    precision: str
    optimizer: str
    clip: str
    accumulate: int
    groups: int


EVERY = [Combination(*c) for c in product(TOLERANCE, OPTIMIZERS, CLIPS, (1, 2), (1, 2))]


def pairwise(every: list[Combination]) -> list[Combination]:
    """Few combinations in which every pair of choices occurs."""

    def pairs(c: Combination) -> set[Any]:
        return {(i, c[i], j, c[j]) for i, j in combinations(range(len(c)), 2)}

    missing, chosen = set().union(*map(pairs, every)), []
    while missing:
        best = max(every, key=lambda c: len(pairs(c) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 6), nn.GELU(), nn.Linear(6, 10))


def optimizer_of(c: Combination, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    kind, settings = OPTIMIZERS[c.optimizer]
    if c.groups == 1:
        return kind(parameters, **settings)
    slow = {"lr": settings["lr"] / 4, "weight_decay": 0.0}
    return kind([{"params": parameters[:2]}, {"params": parameters[2:], **slow}], **settings)


def data(dtype: torch.dtype) -> tuple[TensorDataset, TensorDataset]:
    x, y = digits(BATCH * STEPS + 8, dtype).tensors
    return TensorDataset(x[:-8], y[:-8]), TensorDataset(x[-8:], y[-8:])


def reference(c: Combination, removed: int, eps: float) -> Tensor:
    """Query losses after a plain loop in which a share of a sample is removed."""
    (train, queries), module = data(torch.float64), net().double()
    x, y = train.tensors
    optimizer = optimizer_of(c, list(module.parameters()))
    for start in range(0, len(x), BATCH * c.accumulate):
        optimizer.zero_grad()
        for first in range(start, start + BATCH * c.accumulate, BATCH):
            here = torch.arange(first, first + BATCH)
            losses = nn.functional.cross_entropy(module(x[here]), y[here], reduction="none")
            loss, kept = losses.mean(), here != removed
            if not kept.all():
                loss = (1 - eps) * loss + eps * losses[kept].mean()
            (loss / c.accumulate).backward()
        if c.clip == "norm":
            nn.utils.clip_grad_norm_(module.parameters(), CLIPS["norm"]["gradient_clip_val"])
        if c.clip == "value":
            nn.utils.clip_grad_value_(module.parameters(), CLIPS["value"]["gradient_clip_val"])
        optimizer.step()
    with torch.no_grad():
        return nn.functional.cross_entropy(module(queries.tensors[0]), queries.tensors[1], reduction="none")


def check(c: Combination, path: Path) -> None:
    dtype = torch.float64 if c.precision == "64-true" else torch.float32
    train, queries = data(dtype)
    module = Classifier(lambda m: optimizer_of(c, list(m.net.parameters())), net=copy.deepcopy(net()))
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        precision=c.precision,  # type: ignore[arg-type]
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=c.accumulate,
        callbacks=[InfluenceCallback(path, record="replay", snapshot_every=1)],
        **CLIPS[c.clip],
    )
    trainer.fit(module, DataLoader(train, BATCH))
    # in half precision the micro-batches' parts of a gradient may cancel exactly, where Adam's slope is lr / eps: there the
    # whole removal is compared, not its derivative
    whole = c.precision == "bf16-mixed"
    response = "finite" if whole else "tangent"
    report = attribute(path, queries=DataLoader(queries, 8), model=module, response=response, progress=False)
    chosen = [1, 9, 14, 22]
    low, high = (0.0, 1.0) if whole else (-1e-4, 1e-4)
    truth = torch.stack([(reference(c, z, high) - reference(c, z, low)) / (high - low) for z in chosen])
    found = report.scores[chosen].double()
    assert (found - truth).norm() <= TOLERANCE[c.precision] * truth.norm(), float((found - truth).norm() / truth.norm())


def name(c: Combination) -> str:
    return f"{c.precision}-{c.optimizer}-{c.clip}-accumulate{c.accumulate}-groups{c.groups}"


@pytest.mark.parametrize("combination", pairwise(EVERY), ids=name)
def test_pairs(combination: Combination, tmp_path: Path) -> None:
    check(combination, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("combination", EVERY, ids=name)
def test_every(combination: Combination, tmp_path: Path) -> None:
    check(combination, tmp_path)
