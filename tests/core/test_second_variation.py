"""The error proxy against finite differences of the second derivative of the whole run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp
from toy import RUNS, SCHEDULE, OptimizerFactory, Toy, ToyTrajectory, adamw

from lightning_influence.core.clipping import clip_adjoint
from lightning_influence.core.optimizers import UPDATES, step
from lightning_influence.core.second_variation import _clip_variations, scaled_learning_rate, second_variation
from lightning_influence.core.sweep import Method, sweep
from lightning_influence.core.trajectory import Clip, StepRecord
from lightning_influence.errors import ConfigurationError, CurvatureUnavailable

PAIRS = [(1, 0), (3, 0), (4, 1), (8, 2), (2, 3)]


def second_difference(toy: Toy, sample: int, step: int, drop: bool, h: float = 2e-3) -> torch.Tensor:
    """Half the second derivative in the removed share, central differences of fourth order."""
    f = {e: toy.query_losses(toy.train((sample, step), e * h, drop)) for e in (-2, -1, 0, 1, 2)}
    return (-f[-2] + 16 * f[-1] - 30 * f[0] + 16 * f[1] - f[2]) / (12 * h**2) / 2


def pairs_of(name: str) -> list[tuple[int, int]]:
    schedule = RUNS[name].schedule
    return [(z, t) for z, t in PAIRS if t < len(schedule) and any(z in micro for micro in schedule[t])]


@pytest.mark.parametrize(
    ("name", "counterfactual"),
    [
        ("adamw", "zero"),
        ("adamw, some steps clipped", "drop"),
        ("adamw, clipped value", "drop"),
        ("adamw, accumulated and clipped", "drop"),
        ("adamw, maximized and clipped", "drop"),
        ("adamw, some parameters unused", "drop"),
        ("adam l2", "drop"),
        ("amsgrad", "zero"),
        ("nesterov", "drop"),
    ],
)
def test_proxy_is_half_the_second_derivative(name: str, counterfactual: str) -> None:
    toy, pairs = RUNS[name], pairs_of(name)
    run = ToyTrajectory(toy)
    proxy = second_variation(
        run,
        run.query_gradients(),
        pairs,
        curvature="hessian",
        counterfactual=counterfactual,
        query_curvature=run.query_curvature,
    )
    reference = torch.stack([second_difference(toy, z, t, counterfactual == "drop") for z, t in pairs])
    assert list(zip(proxy.sample_ids.tolist(), proxy.steps.tolist(), strict=True)) == pairs
    assert (proxy.second_order - reference).norm() <= 1e-4 * reference.norm()


def test_tangent_is_the_sweep_s() -> None:
    run = ToyTrajectory(RUNS["adamw, clipped norm"])
    proxy = second_variation(run, run.query_gradients(), PAIRS, curvature="hessian")
    rows = sweep(run, run.query_gradients(), Method("hessian", "tangent"))
    for i, (z, t) in enumerate(PAIRS):
        torch.testing.assert_close(proxy.tangent[i], rows.scores[(rows.sample_ids == z) & (rows.steps == t)][0])


COUPLED = Toy(lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=10.0), SCHEDULE)
"""The gradient holds the parameter, which stays where it is in what is elementwise."""


@pytest.mark.parametrize("toy", [RUNS["adamw"], COUPLED])
def test_step_and_memory_are_what_the_finite_response_adds(toy: Toy) -> None:
    """For a small removal, finite minus tangent is the second-order elementwise part."""
    pairs = PAIRS
    run = ToyTrajectory(toy)
    share = 1e-3
    proxy = second_variation(run, run.query_gradients(), pairs, curvature="hessian")
    elementwise = proxy.step + proxy.memory
    shrunk = ToyTrajectory(toy)
    shares = shrunk.shares
    shrunk.shares = lambda t: {k: type(s)(share * s.values) for k, s in shares(t).items()}  # type: ignore[method-assign]
    rows = sweep(shrunk, run.query_gradients(), Method("hessian", "finite", memory_window=50))
    for i, (z, t) in enumerate(pairs):
        row = (rows.sample_ids == z) & (rows.steps == t)
        difference = (rows.scores - rows.tangent)[row][0] / share**2
        torch.testing.assert_close(difference, elementwise[i], rtol=2e-2, atol=1e-6 * float(elementwise.abs().max()))


@pytest.mark.parametrize("name", RUNS)
def test_finite_part_is_the_response_of_the_whole_run(name: str) -> None:
    run, pairs = ToyTrajectory(RUNS[name]), pairs_of(name)
    proxy = second_variation(run, run.query_gradients(), pairs, curvature="hessian")
    rows = sweep(run, run.query_gradients(), Method("hessian", "finite", memory_window=50))
    for i, (z, t) in enumerate(pairs):
        row = (rows.sample_ids == z) & (rows.steps == t)
        torch.testing.assert_close(proxy.finite[i], (rows.scores - rows.tangent)[row][0], rtol=1e-4, atol=1e-8)


def test_proxy_stays_right_where_the_second_variation_diverges() -> None:
    """A coordinate that has seen a sample and little else: its removal is no small change."""
    toy = RUNS["adamw"]
    run = ToyTrajectory(toy)
    proxy = second_variation(
        run, run.query_gradients(), PAIRS, curvature="hessian", query_curvature=run.query_curvature
    )
    truth = torch.stack([toy.true_effect(z, t) for z, t in PAIRS])
    missed = truth - proxy.tangent
    assert (proxy.total - missed).norm() < 0.5 * (proxy.second_order - missed).norm()
    assert (proxy.corrected - truth).norm() < 0.5 * missed.norm()
    torch.testing.assert_close(proxy.corrected - truth, proxy.total - missed)


def test_fisher_proxy_needs_no_model() -> None:
    run = ToyTrajectory(RUNS["adamw"])
    exact = second_variation(run, run.query_gradients(), PAIRS, curvature="hessian")
    fisher = second_variation(run, run.query_gradients(), PAIRS, curvature="fisher")
    torch.testing.assert_close(fisher.step, exact.step, rtol=0.5, atol=float(exact.step.abs().max()))
    assert not torch.allclose(fisher.second_order, exact.second_order)


def quadratic_run(run: ToyTrajectory, curvature: str, sample: int, at_step: int, eps: Tensor) -> Tensor:
    """Query losses to first order at the end of a run whose gradient at every step is ``G + F (theta - recorded theta)``,
    ``F`` the dense Fisher of the batch from each sample's own loss, and from whose step ``at_step`` a share ``eps`` of a sample is
    taken: what the recorded run is under that curvature.
    """
    toy, update, names = run.toy, UPDATES[run.optimizer], list(run.sizes)
    sizes = [kept for kept, _ in run.sizes.values()]
    theta = torch.cat([run.thetas[0][k].flatten() for k in names])
    moments = {k: run.record(0).moments[k] for k in names}
    for t in range(len(run)):
        record, at = run.record(t), run.thetas[t]
        recorded = torch.cat([at[k].flatten() for k in names])
        gradient = torch.cat([record.gradients[k] for k in names])
        if curvature == "fisher":
            for micro in toy.schedule[t]:
                for z in micro:
                    own = grad(toy.sample_loss)(at, toy.x[z], toy.y[z])
                    g = torch.cat([own[k].flatten() for k in names])
                    gradient = gradient + g * (g @ (theta - recorded)) / (len(micro) * len(toy.schedule[t]))
        if t == at_step:
            whole, without = (
                grad(lambda p, e=e: toy.batch_loss(p, at_step, (sample, at_step), e))(at) for e in (0.0, 1.0)
            )
            gradient = gradient + eps * torch.cat([(without[k] - whole[k]).flatten() for k in names])
        if toy.clip.rule == "norm":
            gradient = gradient * torch.clamp(toy.clip.bound / (gradient.norm() + 1e-6), max=1.0)
        parts = []
        for k, value, g in zip(names, theta.split(sizes), gradient.split(sizes), strict=True):
            new, moments[k] = step(update, value, moments[k], g, record.hyper[k])
            parts.append(new)
        theta = torch.cat(parts)
    return torch.cat([run.query_gradients()[k] for k in names], 1) @ theta


@pytest.mark.parametrize("curvature", ["fisher", "none"])
@pytest.mark.parametrize("name", ["adamw", "adamw, accumulated and clipped", "adam l2", "amsgrad"])
def test_proxy_under_an_assumed_curvature_is_half_the_second_derivative(name: str, curvature: str) -> None:
    """Against autograd, twice, through all steps of the run that has this curvature."""
    run, pairs = ToyTrajectory(RUNS[name]), pairs_of(name)
    proxy = second_variation(run, run.query_gradients(), pairs, curvature=curvature)  # type: ignore[arg-type]
    start = torch.zeros((), dtype=torch.float64)
    for i, pair in enumerate(pairs):

        def queries(eps: Tensor, pair: tuple[int, int] = pair) -> Tensor:
            return quadratic_run(run, curvature, *pair, eps)

        slope = jvp(queries, (start,), (torch.ones_like(start),))[1]
        bend = jvp(lambda e: jvp(queries, (e,), (torch.ones_like(e),))[1], (start,), (torch.ones_like(start),))[1]
        torch.testing.assert_close(proxy.tangent[i], slope, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(proxy.second_order[i], bend / 2, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "optimizer", [adamw(), adamw(eps=0.1), RUNS["sgd"].optimizer], ids=["adamw", "large eps", "sgd"]
)
def test_scaled_learning_rate_is_that_run_where_the_path_does_not_matter(optimizer: OptimizerFactory) -> None:
    """A single step: the recorded path is the scaled run's own."""
    one = [RUNS["adamw"].schedule[0]]
    run = ToyTrajectory(Toy(optimizer, one))
    slow = ToyTrajectory(Toy(optimizer, one, lr_factor=lambda t: 0.1))
    queries = run.query_gradients()
    scaled, reference, unscaled = (
        second_variation(r, queries, [(1, 0)], curvature="hessian", query_curvature=run.query_curvature)
        for r in (scaled_learning_rate(run, 0.1), slow, run)
    )
    for part in ("second_order", "tangent", "total"):
        mine, other, before = (getattr(proxy, part) for proxy in (scaled, reference, unscaled))
        torch.testing.assert_close(mine, other)
        assert before.norm() < 1e-7 or (mine - before).norm() > 0.5 * before.norm()


@pytest.mark.parametrize("elements", [1, 100, 2**22])
def test_pairs_do_not_depend_on_each_other_or_their_order(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor on how many are carried through the run together."""
    monkeypatch.setattr("lightning_influence.core.second_variation._ELEMENTS", elements)
    run = ToyTrajectory(RUNS["adamw"])
    together = second_variation(run, run.query_gradients(), PAIRS[::-1], curvature="hessian")
    for i, pair in enumerate(PAIRS[::-1]):
        alone = second_variation(run, run.query_gradients(), [pair], curvature="hessian")
        assert (int(together.sample_ids[i]), int(together.steps[i])) == pair
        for part in ("tangent", "step", "memory", "curvature", "finite"):
            torch.testing.assert_close(getattr(together, part)[i], getattr(alone, part)[0], rtol=1e-9, atol=1e-14)


def test_bad_requests_are_refused() -> None:
    run = ToyTrajectory(RUNS["adamw"])
    with pytest.raises(ConfigurationError, match="did not consume sample 11"):
        second_variation(run, run.query_gradients(), [(11, 0)])

    with pytest.raises(ConfigurationError, match=r"\(1, 99\) names a step"):
        second_variation(run, run.query_gradients(), [(1, 99)])

    class Logged:
        def __getattr__(self, name: str) -> object:
            if name == "third_derivative":
                raise AttributeError(name)
            return getattr(run, name)

    with pytest.raises(CurvatureUnavailable, match="third derivative"):
        second_variation(Logged(), run.query_gradients(), PAIRS, curvature="hessian")


def test_clipping_extrapolates_masked_parameters_as_the_adjoint_does() -> None:
    """``<A, variation of the clipped>`` is ``<adjoint of A, variation>`` in the inner product of all coordinates."""
    g = torch.Generator().manual_seed(0)
    scales = {"a": 3.0, "b": 1.0}
    gradients = {k: torch.randn(d, generator=g, dtype=torch.float64) for k, d in (("a", 5), ("b", 4))}
    norm = 1.2 * float(sum(scales[k] * v.square().sum() for k, v in gradients.items())) ** 0.5
    clip = Clip("norm", norm / 2, norm)
    one = torch.ones(1, dtype=torch.int64)
    record = StepRecord(0, one, one.double(), one, gradients, {}, {}, clip=clip)
    bent = {k: torch.randn(3, len(v), generator=g, dtype=torch.float64) for k, v in gradients.items()}
    asked = {k: torch.randn(2, len(v), generator=g, dtype=torch.float64) for k, v in gradients.items()}
    first, _ = _clip_variations(record, bent, scales)
    pulled = clip_adjoint(clip, gradients, asked, scales)
    forward = sum(scales[k] * first[k] @ asked[k].T for k in gradients)
    backward = sum(scales[k] * bent[k] @ pulled[k].T for k in gradients)
    torch.testing.assert_close(forward, backward)
