"""From a Lightning run to scores: compressions agree, targets aggregate, float32 is enough."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Fabric
from modules import Classifier, fit, loader, split_digits
from scipy.stats import spearmanr
from torch.utils.data import DataLoader

from lightning_influence import InfluenceCallback, InfluenceReport, attribute
from lightning_influence.core.sweep import Method
from lightning_influence.errors import ConfigurationError
from lightning_influence.scoring import attribution
from lightning_influence.scoring.attribution import open_trajectory
from lightning_influence.scoring.memory import held_by_a_sweep
from lightning_influence.scoring.queries import query_losses


def logged(tmp_path: Path, name: str = "log", compression: str = "auto", **options):  # type: ignore[no-untyped-def]
    precision = options.get("precision", "32-true")
    train, val = split_digits(96, 10)
    module = Classifier()
    fit(
        module,
        loader(train),
        InfluenceCallback(tmp_path / name, compression=compression, record="gradients"),
        max_epochs=2,
        **options,
    )
    queries = DataLoader(val, 4)
    if precision == "64-true":
        queries = [(x.double(), y) for x, y in queries]
    return module, queries, tmp_path / name


def test_report_of_a_run(tmp_path: Path) -> None:
    module, queries, log = logged(tmp_path)
    report = attribute(log, queries=queries, model=module)
    assert report.sample_ids.tolist() == list(range(96)) and report.scores.shape == (96, 10)
    rows = report.rows
    whole = rows.scores if rows.interaction is None else rows.scores + rows.interaction
    assert len(rows.sample_ids) == 192 and set(rows.steps.tolist()) == set(range(12))
    for z in (0, 17, 95):
        torch.testing.assert_close(report.scores[z], whole[rows.sample_ids == z].sum(0))
    assert report.metadata["coverage"]["fraction"] == 1.0
    assert report.metadata["optimizer"] == "AdamW" and report.metadata["curvature"] == "fisher"
    assert report.to_pandas().columns[0] == "sample_id"
    report.save(tmp_path / "report.safetensors")
    assert torch.equal(InfluenceReport.load(tmp_path / "report.safetensors").scores, report.scores)


def test_factored_and_full_agree(tmp_path: Path) -> None:
    reports = {}
    for compression in ("full", "factored", "auto"):
        module, queries, log = logged(tmp_path, compression, compression)
        reports[compression] = attribute(log, queries=queries, model=module).scores
    for compression in ("factored", "auto"):
        error = (reports[compression] - reports["full"]).norm() / reports["full"].norm()
        assert error <= 1e-5, (compression, error)


def test_targets_are_sums_of_columns(tmp_path: Path) -> None:
    """The answer is linear in the queries, so one column for the mean is the mean of the columns."""
    module, queries, log = logged(tmp_path)
    each = attribute(log, queries=queries, model=module).scores
    mean = attribute(log, queries=queries, model=module, target="mean").scores
    weights = torch.linspace(-1, 1, 10)
    weighted = attribute(log, queries=queries, model=module, target=weights).scores
    torch.testing.assert_close(mean[:, 0], each.mean(1), rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(weighted[:, 0], each @ weights, rtol=1e-3, atol=1e-6)


def test_default_query_loss_is_the_module_s_own(tmp_path: Path) -> None:
    module, queries, log = logged(tmp_path)

    def per_example(model, batch):  # type: ignore[no-untyped-def]
        return torch.nn.functional.cross_entropy(model.net(batch[0]), batch[1], reduction="none")

    torch.testing.assert_close(query_losses(module, queries), query_losses(module, queries, per_example))
    default = attribute(log, queries=queries, model=module).scores
    given = attribute(log, queries=queries, model=module, query_loss=per_example).scores
    torch.testing.assert_close(default, given, rtol=1e-4, atol=1e-7)


def test_attribution_leaves_the_module_alone(tmp_path: Path) -> None:
    module, queries, log = logged(tmp_path)
    module.train()
    module.net[0].bias.requires_grad_(False)
    state = {k: v.clone() for k, v in module.state_dict().items()}
    attribute(log, queries=queries, model=module)
    assert module.training and not module.net[0].bias.requires_grad and module.net[0].weight.requires_grad
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())


def test_float32_ranks_like_float64(tmp_path: Path) -> None:
    scores = []
    for precision in ("32-true", "64-true"):
        module, queries, log = logged(tmp_path, precision, precision=precision)
        scores.append(attribute(log, queries=queries, model=module).scores.double())
    for single, double in zip(scores[0].T, scores[1].T, strict=True):
        assert spearmanr(single, double).statistic >= 0.999


def test_mask_sees_its_share_and_says_so(tmp_path: Path) -> None:
    train, val = split_digits(96, 10)
    module = Classifier()
    fit(
        module, loader(train), InfluenceCallback(tmp_path / "log", compression="mask", mask_size=40, record="gradients")
    )
    report = attribute(tmp_path / "log", queries=DataLoader(val, 10), model=module)
    seen = 40 * 3 + 16 + 16 + 10
    assert report.metadata["coverage"]["kept"] <= seen
    assert report.metadata["coverage"]["fraction"] == pytest.approx(
        report.metadata["coverage"]["kept"] / sum(p.numel() for p in module.parameters())
    )


def _queries(held: Any, max_memory: int) -> int:
    try:
        return int(held(max_memory).queries)
    except ConfigurationError:
        return 0


def test_queries_in_turns_are_the_same_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, val = split_digits(40, 7)
    module = Classifier()
    fit(module, loader(train, 8), InfluenceCallback(tmp_path / "log", record="replay"))
    calls: list[int] = []
    real = attribution.sweep

    def counted(trajectory: Any, gradients: Any, *args: Any, **options: Any) -> Any:
        calls.append(len(next(iter(gradients.values()))))
        return real(trajectory, gradients, *args, **options)

    monkeypatch.setattr(attribution, "sweep", counted)
    options: dict[str, Any] = {"queries": [val.tensors], "model": module, "progress": False}
    whole = attribute(tmp_path / "log", **options)
    with open_trajectory(tmp_path / "log", module, "hessian") as run:
        held = partial(held_by_a_sweep, run, Method("hessian"), dict(module.named_parameters()), 7)
        enough = next(n for n in range(10**5, 10**8, 10**4) if _queries(held, n) == 3)
    parts = attribute(tmp_path / "log", **options, max_memory=enough)
    assert calls == [7, 3, 3, 1]
    torch.testing.assert_close(parts.scores, whole.scores, rtol=1e-4, atol=1e-9)


def _spread(fabric: Any, log: Path, module: Any, queries: Any) -> None:
    torch.set_num_threads(1)
    report = attribute(log, queries=queries, model=module, progress=False, fabric=fabric)
    report.save(log / f"from-{fabric.global_rank}.safetensors")


@pytest.mark.parametrize("strategy", ["ddp_fork", pytest.param("ddp_spawn", marks=pytest.mark.slow)])
def test_queries_spread_over_processes_are_the_same_scores(strategy: str, tmp_path: Path) -> None:
    train, val = split_digits(40, 5)
    module = Classifier()
    log = tmp_path / "log"
    fit(module, loader(train, 8), InfluenceCallback(log, record="replay"))
    module.make_optimizer = None  # a lambda, which a new process cannot be sent
    object.__setattr__(module, "_trainer", None)
    whole = attribute(log, queries=[val.tensors], model=module, progress=False)
    Fabric(accelerator="cpu", devices=2, strategy=strategy).launch(_spread, log, module, [val.tensors])
    for rank in (0, 1):
        found = InfluenceReport.load(log / f"from-{rank}.safetensors")
        torch.testing.assert_close(found.scores, whole.scores, rtol=1e-4, atol=1e-9)
        assert torch.equal(found.sample_ids, whole.sample_ids)
