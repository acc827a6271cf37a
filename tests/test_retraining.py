"""The retraining harness against Lightning itself, and against runs written out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from modules import Classifier, digits, fit, loader
from test_callback import two_groups

from lightning_influence import InfluenceCallback
from lightning_influence.queries import query_losses
from lightning_influence.retraining import leave_one_out, moved_initialisation, recorded_run, retrain


def parameters(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_clip_val": 0.5},
        {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
    ],
    ids=str,
)
def test_the_run_again_is_bitwise_lightning_s(options: dict[str, float], tmp_path: Path) -> None:
    """Two groups, a cosine schedule per step, a short last window."""
    module = Classifier(two_groups)
    fit(module, loader(digits(110), 24), InfluenceCallback(tmp_path / "log"), max_epochs=2, **options)
    run = recorded_run(tmp_path / "log", lambda: Classifier(two_groups), digits(110))
    assert torch.equal(parameters(retrain(run)), parameters(module))


def small_run(tmp_path: Path, **options):  # type: ignore[no-untyped-def]
    fit(Classifier(two_groups), loader(digits(30), 8), InfluenceCallback(tmp_path / "log"), max_epochs=2, **options)
    return recorded_run(tmp_path / "log", lambda: Classifier(two_groups), digits(30))


@pytest.mark.parametrize("counterfactual", ["drop", "zero"])
def test_removal_is_the_run_written_out_by_hand(counterfactual: str, tmp_path: Path) -> None:
    run = small_run(tmp_path)
    gone = run.steps[1].micro_batches[0].sample_ids[3]
    x, y = digits(30).tensors
    module = Classifier(two_groups)
    optimizer = two_groups(module)["optimizer"]
    for step in run.steps:
        (micro_batch,) = step.micro_batches
        kept = [z for z in micro_batch.sample_ids if z != gone]
        losses = torch.nn.functional.cross_entropy(module.net(x[kept]), y[kept], reduction="none")
        loss = losses.sum() / (len(kept) if counterfactual == "drop" else len(micro_batch.sample_ids))
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = step.learning_rates["net.0.weight"]
        optimizer.param_groups[1]["lr"] = step.learning_rates["net.0.bias"]
        optimizer.step()
    again = retrain(run, [gone], counterfactual=counterfactual)
    torch.testing.assert_close(parameters(again), parameters(module), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(parameters(again), parameters(retrain(run)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_leave_one_out_is_retraining(dtype: torch.dtype | None, tmp_path: Path) -> None:
    """The checkpoints of the baseline change nothing, bitwise."""
    small = small_run(tmp_path, gradient_clip_val=0.5)
    run = type(small)(**{**vars(small), "dtype": dtype})
    x, y = (t[:6] for t in digits(40).tensors)
    queries = [(x.to(dtype or torch.float32), y)]

    def losses(module):  # type: ignore[no-untyped-def]
        return query_losses(module, queries)

    removals = [3, 17, 29]
    effects = leave_one_out(run, removals, losses)
    pairs = [(run.steps[t].micro_batches[0].sample_ids[0], t) for t in (0, 3, 7)]
    one_step = leave_one_out(run, pairs, losses, counterfactual="zero")
    base = losses(retrain(run)).double()
    for effect, sample in zip(effects, removals, strict=True):
        assert torch.equal(effect, losses(retrain(run, [sample])).double() - base)
    for effect, (sample, step) in zip(one_step, pairs, strict=True):
        again = retrain(run, [sample], at_step=step, counterfactual="zero")
        assert torch.equal(effect, losses(again).double() - base)
    assert (effects != 0).all()


def test_a_batch_left_empty_still_steps(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    whole = run.steps[2].micro_batches[0].sample_ids
    assert not torch.equal(parameters(retrain(run, whole, at_step=2)), parameters(retrain(run)))


def test_moved_initialisation_moves_by_its_scale(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    start, moved = run.make_module(), moved_initialisation(run, 1e-3).make_module()
    for a, b in zip(start.parameters(), moved.parameters(), strict=True):
        ratio = float((b - a).square().mean().sqrt() / a.square().mean().sqrt())
        assert 0.3e-3 < ratio < 3e-3
