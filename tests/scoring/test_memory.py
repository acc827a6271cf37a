"""`max_memory` bounds what attribution holds, and changes no score."""

from __future__ import annotations

import gc
import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from modules import Classifier, fit, loader, split_digits
from torch import Tensor

from lightning_influence import InfluenceCallback, InfluenceReport, attribute, error_proxy
from lightning_influence.core import response, sweep, window
from lightning_influence.errors import ConfigurationError
from lightning_influence.replay.passes import Passes

STEPS, WIDTH = 12, 128


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    log = tmp_path_factory.mktemp("run") / "log"
    train, val = split_digits(STEPS * 4, 3)
    module = Classifier(lambda m: torch.optim.AdamW(m.parameters(), lr=1e-4), width=WIDTH)
    fit(module, loader(train, 4), InfluenceCallback(log, record="replay", snapshot_every=STEPS))
    return log, module, [val.tensors]


def live_bytes() -> int:
    """Of the storages of all tensors that Python holds; what autograd saves is not among them."""
    storages = {}
    for o in gc.get_objects():
        if type(o) in (Tensor, torch.nn.Parameter) and o.layout == torch.strided:
            with suppress(NotImplementedError):  # one that functorch wraps, and is held, too
                storages[o.untyped_storage().data_ptr()] = o.untyped_storage().nbytes()
    return sum(storages.values())


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Bytes that are live before a pass, around a step of the walk, and inside the finite response."""
    seen: list[int] = []

    def around(function: Any, every: int = 1) -> Any:
        calls = itertools.count()

        def wrapper(*args: Any, **options: Any) -> Any:
            looked_at = next(calls) % every == 0  # looking takes longer than the work
            if looked_at:
                seen.append(live_bytes())
            result = function(*args, **options)
            if looked_at:
                seen.append(live_bytes())
            return result

        return wrapper

    with monkeypatch.context() as patched:
        patched.setattr(Passes, "loss", around(Passes.loss, 7))
        patched.setattr(sweep._Walk, "back", around(sweep._Walk.back, 2))
        patched.setattr(sweep._Walk, "_pass", around(sweep._Walk._pass, 3))
        patched.setattr(sweep, "finite_response", around(response.finite_response, 499))
        yield seen


def scores(run: tuple[Path, Any, Any], max_memory: Any, **options: Any) -> InfluenceReport:
    log, module, queries = run
    return attribute(log, queries=queries, model=module, progress=False, max_memory=max_memory, **options)


def least(run: tuple[Path, Any, Any], **options: Any) -> int:
    """What the error says would do."""
    with pytest.raises(ConfigurationError, match="too little for this run") as caught:
        scores(run, 1000, **options)
    found = re.search(r"Give max_memory=(\d+) or more", str(caught.value))
    assert found is not None
    return int(found[1])


def with_window(run: tuple[Path, Any, Any]) -> int:
    with pytest.raises(ConfigurationError) as caught:
        scores(run, 1000)
    found = re.search(r"\((\d+) with the memory window in memory", str(caught.value))
    assert found is not None
    return int(found[1])


@pytest.mark.parametrize("target", ["mean", None])
def test_memory_is_bounded_and_scores_are_the_same(
    run: tuple[Path, Any, Any], target: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = scores(run, 2**30, target=target)
    evaluation = 2 * sum(4 * p.numel() for p in run[1].parameters())  # its gradient, and what Python sees of its shares
    enough = with_window(run)
    for max_memory in (enough, 2 * enough):
        gc.collect()
        before = live_bytes()
        with watched(monkeypatch) as seen:
            report = scores(run, max_memory, target=target)
        assert max(seen) - before <= max_memory + evaluation, max_memory
        assert (report.rows.scores - whole.rows.scores).norm() <= 1e-6 * whole.rows.scores.norm()
        assert report.metadata["memory_window"] == 8


def test_a_window_that_does_not_fit_lies_in_files(run: tuple[Path, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    number, whole = least(run), scores(run, 2**30)
    with pytest.raises(ConfigurationError, match=str(number)):
        scores(run, number - 1)
    mapped: list[int] = []
    real = window._mapped
    monkeypatch.setattr(window, "_mapped", lambda size, dtype: (mapped.append(size), real(size, dtype))[1])
    report = scores(run, number)
    assert len(mapped) == 2 * STEPS * 3, "gradients and adjoints of every step, for each of three queries"
    assert report.metadata["memory_window"] == 8
    assert (report.rows.scores - whole.rows.scores).norm() <= 1e-6 * whole.rows.scores.norm()


def test_a_window_without_room_anywhere_is_shorter_and_the_report_says_so(
    run: tuple[Path, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_influence.scoring.memory._free_on_disk", lambda: 0)
    short = (least(run) + with_window(run)) // 2
    with pytest.warns(UserWarning, match="memory window of . steps instead of 8"):
        report = scores(run, short, target="mean")
    used = report.metadata["memory_window"]
    assert 0 < used < 8
    same = scores(run, 2**30, target="mean", memory_window=used)
    assert (report.rows.scores - same.rows.scores).norm() <= 1e-6 * same.rows.scores.norm()
    with pytest.warns(UserWarning, match="memory window"):
        assert scores(run, least(run), target="mean").metadata["memory_window"] == 0


def test_what_max_memory_may_be(run: tuple[Path, Any, Any]) -> None:
    for wrong in (0, -5, "much", 1.5, True):
        with pytest.raises(ConfigurationError, match="give a number of bytes, or 'auto'"):
            scores(run, wrong)


def test_the_error_proxy_is_bounded_too(run: tuple[Path, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    log, module, queries = run
    pairs = [(int(z), 9) for z in scores(run, 2**30, response="tangent").rows.sample_ids[36:39]]
    options: dict[str, Any] = {"queries": queries, "model": module, "pairs": pairs, "target": None, "progress": False}
    whole = error_proxy(log, **options).proxies[1.0]
    with pytest.raises(ConfigurationError, match="too little for this run") as caught:
        error_proxy(log, **options, max_memory=1000)
    found = re.search(r"Give max_memory=(\d+) or more", str(caught.value))
    assert found is not None
    evaluation = 6 * sum(4 * p.numel() for p in module.parameters())  # of the query curvature, too
    gc.collect()
    before = live_bytes()
    with watched(monkeypatch) as seen:
        proxy = error_proxy(log, **options, max_memory=int(found[1])).proxies[1.0]
    assert max(seen) - before <= int(found[1]) + evaluation
    for name in ("tangent", "finite", "curvature", "step", "memory"):
        a, b = getattr(proxy, name), getattr(whole, name)
        assert (a - b).norm() <= 1e-5 * b.norm(), name
