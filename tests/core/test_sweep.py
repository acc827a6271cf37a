"""The sweep against finite differences of the whole run, dense brute force, and retraining."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch.func import grad
from toy import RUNS, SCHEDULE, Toy, ToyTrajectory, hyper_of

from lightning_influence.core.optimizers import UPDATES, step
from lightning_influence.core.shares import Dense
from lightning_influence.core.sweep import Method, sweep, walk_back
from lightning_influence.core.trajectory import Clip, StepRecord
from lightning_influence.errors import ConfigurationError


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("counterfactual", ["drop", "zero"])
def test_tangent_is_the_derivative_of_the_whole_run(name: str, counterfactual: str) -> None:
    """Against a float64 finite difference of training with a share eps of the sample removed."""
    toy = RUNS[name]
    run = ToyTrajectory(toy)
    rows = sweep(run, run.query_gradients(), Method("hessian", "tangent", counterfactual=counterfactual))
    mine = rows.scores
    drop = counterfactual == "drop"
    pairs = zip(rows.sample_ids.tolist(), rows.steps.tolist(), strict=True)
    reference = torch.stack([toy.derivative(z, t, drop) for z, t in pairs])
    assert (mine - reference).norm() <= 1e-5 * reference.norm()


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("counterfactual", ["drop", "zero"])
@pytest.mark.parametrize("lr", [1e-3, 1e-4])
def test_finite_reproduces_retraining(name: str, counterfactual: str, lr: float) -> None:
    toy = RUNS[name]
    run_at_lr = Toy(toy.optimizer, toy.schedule, toy.clip, lambda t: toy.lr_factor(t) * lr / 1e-2)
    run = ToyTrajectory(run_at_lr)
    rows = sweep(run, run.query_gradients(), Method("hessian", "finite", counterfactual=counterfactual))
    pairs = list(zip(rows.sample_ids.tolist(), rows.steps.tolist(), strict=True))
    truth = torch.stack([run_at_lr.true_effect(z, t, counterfactual == "drop") for z, t in pairs])
    # pooled over the queries: among some twenty rows a single swap of neighbours costs 0.0013
    assert spearmanr(rows.scores.flatten(), truth.flatten()).statistic >= 0.999
    assert (rows.scores - truth).norm() <= 0.05 * truth.norm()


def _dense_fisher_scores(run: ToyTrajectory) -> torch.Tensor:
    """The paper's score by brute force: dense Fisher matrices and autograd through every step."""
    update, toy = UPDATES[run.optimizer], run.toy
    names = list(run.sizes)
    u = {k: (q, *(torch.zeros_like(q) for _ in update.moments)) for k, q in run.query_gradients().items()}
    blocks = []
    for t in reversed(range(len(run))):
        record = run.record(t)
        pulled, direct = {}, {}
        for k in names:
            inputs = (record.parameters[k], record.gradients[k], *record.moments[k])

            def outputs(theta, g, *moments, k=k):  # type: ignore[no-untyped-def]
                new, moments = step(update, theta, moments, g, record.hyper[k])
                return sum(w @ x for w, x in zip(u[k], (new, *moments), strict=True))

            jacobian = torch.autograd.functional.jacobian(outputs, inputs)
            pulled[k], direct[k] = (jacobian[0], *jacobian[2:]), jacobian[1]
        a = torch.cat([direct[k] for k in names], 1)

        def batch_gradient(sample=None, t=t):  # type: ignore[no-untyped-def]
            found = grad(lambda p: toy.batch_loss(p, t, (sample, t), 1.0))(run.thetas[t])
            return torch.cat([found[k].flatten() for k in names])

        micro_batches = toy.schedule[t]
        changes = [batch_gradient(z) - batch_gradient() for micro in micro_batches for z in micro]
        blocks.append(torch.stack(changes) @ a.T)
        fisher = torch.zeros(a.shape[1], a.shape[1], dtype=torch.float64)
        for micro in micro_batches:
            for z in micro:
                own = grad(toy.sample_loss)(run.thetas[t], toy.x[z], toy.y[z])
                g = torch.cat([own[k].flatten() for k in names])
                fisher += torch.outer(g, g) / len(micro) / len(micro_batches)
        bent = dict(zip(names, (a @ fisher).split([run.sizes[k][0] for k in names], 1), strict=True))
        u = {k: (pulled[k][0] + bent[k], *pulled[k][1:]) for k in names}
    return torch.cat(blocks[::-1])


@pytest.mark.parametrize("name", ["adamw", "adamw, accumulated"])
def test_fisher_sweep_equals_dense_brute_force(name: str) -> None:
    run = ToyTrajectory(RUNS[name])
    rows = sweep(run, run.query_gradients(), Method("fisher", "tangent"))
    reference = _dense_fisher_scores(run)
    assert (rows.scores - reference).norm() <= 1e-6 * reference.norm()


def test_sgd_assumption_is_the_sweep_of_plain_sgd() -> None:
    """On a run of plain SGD the assumption is true and changes nothing; on AdamW it does."""
    toy = Toy(lambda p: torch.optim.SGD(p, lr=0.1), SCHEDULE)
    run = ToyTrajectory(toy)
    matched, assumed = (
        sweep(run, run.query_gradients(), Method("hessian", "finite", optimizer_assumption=o)).scores
        for o in (None, "sgd")
    )
    assert torch.equal(matched, assumed)
    run = ToyTrajectory(RUNS["adamw"])
    matched, assumed = (
        sweep(run, run.query_gradients(), Method("fisher", "tangent", optimizer_assumption=o)).scores
        for o in (None, "sgd")
    )
    assert (matched - assumed).norm() > 0.5 * matched.norm()


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("curvature", ["hessian", "fisher"])
@pytest.mark.parametrize("window", [0, 1, 2, 8])
def test_pieces_of_parameters_change_nothing(
    name: str, curvature: Any, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scored from pieces of three coordinates, which are no rows of a matrix, and by a window that forgets."""
    run, method = ToyTrajectory(RUNS[name]), Method(curvature, memory_window=window)
    whole = sweep(run, run.query_gradients(), method)
    monkeypatch.setattr("lightning_influence.core.pieces._COORDINATES", 3)
    pieces = sweep(run, run.query_gradients(), method)
    for column in ("scores", "tangent", "interaction"):
        torch.testing.assert_close(getattr(pieces, column), getattr(whole, column), rtol=1e-9, atol=1e-14)


def test_memory_window_converges_to_the_whole_memory() -> None:
    run = ToyTrajectory(RUNS["adamw"])
    scores = [sweep(run, run.query_gradients(), Method("hessian", memory_window=w)).scores for w in (0, 1, 4, 50)]
    errors = [(s - scores[-1]).norm() for s in scores]
    assert errors[0] > errors[1] > errors[2] == 0


def test_scored_range_gives_those_rows_alone() -> None:
    run = ToyTrajectory(RUNS["adamw"])
    whole = sweep(run, run.query_gradients())
    seen, record = [], run.record
    run.record = lambda t: seen.append(t) or record(t)  # type: ignore[method-assign]
    part = sweep(run, run.query_gradients(), scored=range(2, 3))
    assert seen == [4, 3, 2], "the walk ends at the first that is scored"
    keep = whole.steps == 2
    assert torch.equal(part.scores, whole.scores[keep]) and torch.equal(part.sample_ids, whole.sample_ids[keep])
    none = sweep(run, run.query_gradients(), scored=range(0))
    assert none.scores.shape == none.tangent.shape == (0, 3) and none.sample_ids.shape == none.steps.shape == (0,)


@pytest.mark.parametrize("name", ["adamw", "amsgrad", "adamw, some steps clipped"])
def test_finite_scores_of_a_last_step_are_exact(name: str) -> None:
    """Nothing follows that could bend: the change of the queries' first order is the step's own, to the last digits."""
    toy = RUNS[name]
    run, last = ToyTrajectory(toy), len(toy.schedule) - 1
    rows = sweep(run, run.query_gradients(), Method("none", "finite"), scored=range(last, last + 1))
    with_it = toy.train()
    for z, scores in zip(rows.sample_ids.tolist(), rows.scores, strict=True):
        without = toy.train((z, last), 1.0)
        truth = sum(q @ (without[k] - with_it[k]).flatten() for k, q in run.query_gradients().items())
        torch.testing.assert_close(scores, truth, rtol=1e-10, atol=1e-14)


def test_chunks_and_parameters_end_to_end_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    run = ToyTrajectory(RUNS["adamw, accumulated and clipped"])
    whole = sweep(run, run.query_gradients()).scores
    for constant in ("sweep._CHUNK_ELEMENTS", "window._JOINED_COORDINATES"):
        monkeypatch.setattr(f"lightning_influence.core.{constant}", 1)
        torch.testing.assert_close(sweep(run, run.query_gradients()).scores, whole, rtol=1e-10, atol=1e-14)


class Repeated:
    """A clipped run of two steps whose parameter ``a`` holds its first three coordinates ``copies`` times, all of them kept or
    only the first three: what a mask does not see is then exactly what it extrapolates.
    """

    optimizer = "adam"

    def __init__(self, copies: int, *, masked: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        seen = 1 if masked else copies
        self.sizes = {"a": (3 * seen, 3 * copies), "b": (2, 2)}
        hyper = hyper_of("adamw", 3)
        self._shares, self._records = [], []
        for t in range(2):
            a, b = (torch.randn(4, d, generator=generator, dtype=torch.float64) / 4 for d in (3, 2))
            m, v = torch.randn(5, generator=generator).double(), torch.rand(5, generator=generator).double()
            norm = float(torch.cat([a.sum(0).repeat(copies), b.sum(0)]).norm())
            shares = {"a": Dense(a.repeat(1, seen)), "b": Dense(b)}
            self._shares.append(shares)
            self._records.append(
                StepRecord(
                    t,
                    torch.arange(4),
                    torch.full((4,), 0.25, dtype=torch.float64),
                    torch.zeros(4, dtype=torch.int64),
                    {k: s.values.sum(0) for k, s in shares.items()},
                    {"a": (m[:3].repeat(seen), v[:3].repeat(seen)), "b": (m[3:], v[3:])},
                    {"a": hyper, "b": hyper},
                    clip=Clip("norm", norm / 2, norm),
                )
            )

    def __len__(self) -> int:
        return 2

    def sample_ids(self, index: int) -> torch.Tensor:
        return self._records[index].sample_ids

    def record(self, index: int) -> StepRecord:
        return self._records[index]

    def shares(self, index: int) -> dict[str, Dense]:
        return self._shares[index]


def test_norms_of_masked_gradients_are_extrapolated() -> None:
    """Clipping is that of the whole gradient, though a log keeps a part of it."""
    masked, whole = Repeated(4, masked=True), Repeated(4, masked=False)
    asked = {"a": torch.randn(2, 3).double(), "b": torch.randn(2, 2).double()}
    method = Method("none", "finite")
    first_copy = {"a": torch.nn.functional.pad(asked["a"], (0, 9)), "b": asked["b"]}
    torch.testing.assert_close(sweep(masked, asked, method).scores, sweep(whole, first_copy, method).scores)
    every_copy = {"a": asked["a"].repeat(1, 4), "b": asked["b"]}
    mine, reference = walk_back(masked, asked, method), walk_back(whole, every_copy, method)
    for t in range(2):
        for k, size in (("a", 3), ("b", 2)):
            torch.testing.assert_close(mine[t].gradient[k], reference[t].gradient[k][:, :size])


def test_unknown_choices_are_refused() -> None:
    for wrong in (
        {"curvature": "kfac"},
        {"response": "infinite"},
        {"optimizer_assumption": "lion"},
        {"memory_window": -1},
    ):
        with pytest.raises(ConfigurationError, match=str(next(iter(wrong.values())))):
            Method(**wrong)
    run = ToyTrajectory(RUNS["adamw"])
    with pytest.raises(ConfigurationError, match="halve"):
        sweep(run, run.query_gradients(), Method(counterfactual="halve"))
