"""Rows of scores, one for every sample and step."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_influence.core.scores import RowScores
from lightning_influence.errors import ConfigurationError


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.integers(0, 20), min_size=1, max_size=30), bins=st.integers(1, 40), seed=st.integers(0, 99))
def test_bins_over_time_are_means_of_neighbouring_steps(steps: list[int], bins: int, seed: int) -> None:
    scores = torch.randn(len(steps), 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = RowScores(torch.arange(len(steps)), torch.tensor(steps), scores, scores)
    first, helped, harmed = rows.over_time(bins)
    n = max(steps) + 1
    assert len(first) == len(helped) == len(harmed) == min(bins, n)
    edges = [*first.tolist(), n]
    assert edges[0] == 0 and all(a < b for a, b in itertools.pairwise(edges))
    assert max(b - a for a, b in itertools.pairwise(edges)) - 1 <= n // min(bins, n)
    for number, (start, stop) in enumerate(itertools.pairwise(edges)):
        means = [float(scores[i].mean()) for i, step in enumerate(steps) if start <= step < stop]
        assert float(helped[number]) == pytest.approx(sum(m for m in means if m > 0) / (stop - start), abs=1e-12)
        assert float(harmed[number]) == pytest.approx(sum(m for m in means if m < 0) / (stop - start), abs=1e-12)


def test_bins_over_time_are_at_least_one() -> None:
    rows = RowScores(torch.arange(1), torch.arange(1), torch.ones(1, 1), torch.ones(1, 1))
    assert [len(part) for part in rows.over_time(1)] == [1, 1, 1]
    with pytest.raises(ConfigurationError, match="bins=0; give 1 or more"):
        rows.over_time(0)
