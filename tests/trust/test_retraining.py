"""The retraining harness against Lightning itself, and against runs written out by hand."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from modules import Classifier, digits, fit, loader, two_groups

from lightning_influence import InfluenceCallback
from lightning_influence.errors import ConfigurationError
from lightning_influence.scoring.queries import query_losses
from lightning_influence.trust.retraining import leave_one_out, moved_initialisation, recorded_run, retrain


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
    fit(
        module,
        loader(digits(110), 24),
        InfluenceCallback(tmp_path / "log", record="gradients"),
        max_epochs=2,
        **options,
    )
    run = recorded_run(tmp_path / "log", lambda: Classifier(two_groups), digits(110))
    assert torch.equal(parameters(retrain(run)), parameters(module))


def small_run(tmp_path: Path, **options):  # type: ignore[no-untyped-def]
    fit(
        Classifier(two_groups),
        loader(digits(30), 8),
        InfluenceCallback(tmp_path / "log", record="gradients"),
        max_epochs=2,
        **options,
    )
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
        optimizer.param_groups[0]["lr"] = step.hyper["net.0.weight"]["lr"]
        optimizer.param_groups[1]["lr"] = step.hyper["net.0.bias"]["lr"]
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
        ratio = float((b - a).detach().square().mean().sqrt() / a.detach().square().mean().sqrt())
        assert 0.3e-3 < ratio < 3e-3


def test_scheduled_momentum_comes_back(tmp_path: Path) -> None:
    """OneCycleLR moves the betas with the learning rate."""

    def one_cycle(module: torch.nn.Module):  # type: ignore[no-untyped-def]
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    module = Classifier(one_cycle)
    fit(
        module,
        loader(digits(50), 8),
        InfluenceCallback(tmp_path / "log", record="gradients"),
        accumulate_grad_batches=3,
    )
    run = recorded_run(tmp_path / "log", lambda: Classifier(one_cycle), digits(50))
    assert len({step.hyper["net.0.bias"]["beta1"] for step in run.steps}) == len(run.steps)
    assert torch.equal(parameters(retrain(run)), parameters(module))


@pytest.mark.skipif(not sys.platform.startswith("linux") or torch.cuda.is_available(), reason="workers are forked")
def test_workers_find_what_one_process_finds(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    x, y = (t[:6] for t in digits(40).tensors)

    def losses(module):  # type: ignore[no-untyped-def]
        return query_losses(module, [(x, y)])

    removals = [0, (run.steps[4].micro_batches[0].sample_ids[0], 4), frozenset({1, 2, 3}), 29]
    threads = torch.get_num_threads()
    parallel = leave_one_out(run, removals, losses, workers=2)
    assert torch.get_num_threads() == threads
    torch.set_num_threads(1)
    try:
        serial = leave_one_out(run, removals, losses)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(parallel, serial) and (serial != 0).all()


def test_a_set_is_removed_together(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    gone = {4, 11, 25}
    batch = [digits(40).tensors]

    def losses(module):  # type: ignore[no-untyped-def]
        return query_losses(module, batch).mean()[None]

    (effect,) = leave_one_out(run, [frozenset(gone)], losses)
    assert torch.equal(effect, losses(retrain(run, gone)).double() - losses(retrain(run)).double())


def test_dropout_is_reseeded_step_by_step(tmp_path: Path) -> None:
    """With a seed, a rerun is the same run again."""

    def noisy() -> Classifier:
        return Classifier(net=torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(64, 10)))

    torch.manual_seed(0)
    initial = noisy().state_dict()

    def make_module() -> Classifier:
        module = noisy()
        module.load_state_dict(initial)
        return module

    fit(make_module(), loader(digits(30), 8), InfluenceCallback(tmp_path / "log", record="gradients"))
    run = recorded_run(tmp_path / "log", make_module, digits(30), seed=3)
    first, again = retrain(run), retrain(run)
    other = retrain(replace(run, seed=4))
    assert torch.equal(parameters(first), parameters(again)) and not torch.equal(parameters(first), parameters(other))


def test_removals_that_make_no_sense(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    absent = next(z for z in range(30) if not run.steps[1].holds({z}))
    with pytest.raises(ConfigurationError, match=f"step 1 of 8 did not consume sample {absent}"):
        leave_one_out(run, [(absent, 1)], lambda module: torch.zeros(1))
    with pytest.raises(ConfigurationError, match="counterfactual='remove'"):
        retrain(run, [0], counterfactual="remove")  # type: ignore[arg-type]
