"""A small smooth run in float64 with everything computed densely: the reference the sweep is held to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jvp, vmap

from lightning_influence.core.optimizers import UPDATES, Update, effective_gradient
from lightning_influence.core.trajectory import Clip, StepRecord
from lightning_influence.run.optimizer import read_hyper, read_moments, update_name

Params = dict[str, Tensor]
Removed = tuple[int | frozenset[int], int | None] | None
OptimizerFactory = Callable[[list[Tensor]], torch.optim.Optimizer]


class DenseShares:
    """Per-sample shares as a plain matrix, independent of the library's own forms."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.n_samples, self.n_coordinates = values.shape

    def inner(self, vectors: Tensor) -> Tensor:
        return vectors @ self.values.to(vectors).T

    def combine(self, weights: Tensor) -> Tensor:
        return weights @ self.values.to(weights)

    def dense(self, samples: slice = slice(None)) -> Tensor:
        return self.values[samples]


@dataclass
class Toy:
    """A GELU network on random data, a schedule of micro-batches and an optimizer.

    `schedule[t]` is a list of micro-batches, each a list of sample indices. `unused[t]` names parameters that the loss of
    step `t` does not depend on: they have no gradient there, and the optimizer passes them over.
    """

    optimizer: OptimizerFactory
    schedule: list[list[list[int]]]
    clip: Clip = field(default_factory=Clip)
    lr_factor: Callable[[int], float] = lambda t: 1.0
    unused: Mapping[int, set[str]] = field(default_factory=dict)
    n_samples: int = 12
    n_queries: int = 3
    width: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)
        kwargs = {"generator": g, "dtype": torch.float64}
        self.x = torch.randn(self.n_samples, 4, **kwargs)
        self.y = torch.randint(0, 3, (self.n_samples,), generator=g)
        self.query_x = torch.randn(self.n_queries, 4, **kwargs)
        self.query_y = torch.randint(0, 3, (self.n_queries,), generator=g)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(4, self.width), torch.nn.GELU(), torch.nn.Linear(self.width, 3)
        ).double()
        self.start: Params = {k: 0.5 * torch.randn(p.shape, **kwargs) for k, p in self.net.named_parameters()}

    def sample_loss(self, params: Params, x: Tensor, y: Tensor) -> Tensor:
        logits = functional_call(self.net, params, (x[None],))
        return torch.nn.functional.cross_entropy(logits, y[None])

    def used(self, params: Params, step: int) -> Params:
        """The parameters as the loss of a step sees them."""
        unused = self.unused.get(step, set())
        return {k: torch.zeros_like(p) if k in unused else p for k, p in params.items()}

    def losses(self, params: Params, indices: list[int]) -> Tensor:
        logits = functional_call(self.net, params, (self.x[indices],))
        return torch.nn.functional.cross_entropy(logits, self.y[indices], reduction="none")

    def query_losses(self, params: Params) -> Tensor:
        logits = functional_call(self.net, params, (self.query_x,))
        return torch.nn.functional.cross_entropy(logits, self.query_y, reduction="none")

    def batch_loss(
        self,
        params: Params,
        step: int,
        removed: Removed = None,
        eps: float = 0.0,
        drop: bool = True,
    ) -> Tensor:
        """Loss of a step with a share `eps` of `removed[0]`, a sample or several, taken out of step `removed[1]`, of every
        step for None.
        """
        total = torch.zeros((), dtype=torch.float64)
        micro_batches = self.schedule[step]
        for indices in micro_batches:
            losses = self.losses(self.used(params, step), indices)
            loss = losses.mean()
            gone = frozenset[int]() if removed is None or removed[1] not in (step, None) else _set(removed[0])
            if not gone.isdisjoint(indices):
                keep = torch.tensor([i not in gone for i in indices])
                rest = losses[keep].sum() / (max(int(keep.sum()), 1) if drop else len(indices))
                loss = (1 - eps) * loss + eps * rest
            total = total + loss / len(micro_batches)
        return total

    def train(
        self,
        removed: Removed = None,
        eps: float = 0.0,
        drop: bool = True,
        until: int | None = None,
        observe: Callable[[int, Params, torch.optim.Optimizer, float], None] = lambda *_: None,
    ) -> Params:
        """Run the schedule with a real torch optimizer; final parameters."""
        params = {k: p.clone().requires_grad_() for k, p in self.start.items()}
        optimizer = self.optimizer(list(params.values()))
        initial = [group["lr"] for group in optimizer.param_groups]
        for t in range(len(self.schedule) if until is None else until):
            for group, lr in zip(optimizer.param_groups, initial, strict=True):
                group["lr"] = lr * self.lr_factor(t)
            loss = self.batch_loss(params, t, removed, eps, drop)
            gradients = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
            for p, g in zip(params.values(), gradients, strict=True):
                p.grad = g
            norm = torch.cat([g.flatten() for g in gradients if g is not None]).norm()
            observe(t, params, optimizer, float(norm))
            if self.clip.rule == "norm":
                torch.nn.utils.clip_grad_norm_(list(params.values()), self.clip.bound)
            elif self.clip.rule == "value":
                torch.nn.utils.clip_grad_value_(list(params.values()), self.clip.bound)
            optimizer.step()
        return {k: p.detach() for k, p in params.items()}

    def true_effect(self, sample: int | frozenset[int], step: int | None, drop: bool = True) -> Tensor:
        """Brute-force retraining without (sample, step), or without the sample or samples: change of every query loss."""
        without = self.train((sample, step), 1.0, drop)
        return self.query_losses(without) - self.query_losses(self.train())

    def derivative(self, sample: int, step: int, drop: bool = True, h: float = 1e-4) -> Tensor:
        """Central finite difference of the query losses in the removed share of (sample, step)."""
        plus, minus = (self.query_losses(self.train((sample, step), e, drop)) for e in (h, -h))
        return (plus - minus) / (2 * h)


def _set(samples: int | frozenset[int]) -> frozenset[int]:
    return samples if isinstance(samples, frozenset) else frozenset([samples])


class ToyTrajectory:
    """A recorded `Toy` run with dense exact Hessians."""

    def __init__(self, toy: Toy) -> None:
        self.toy = toy
        self.records: list[StepRecord] = []
        self.thetas: list[Params] = []
        self._hessians: dict[int, Tensor] = {}
        self.final = toy.train(observe=self._observe)
        self.sizes = {k: (p.numel(), p.numel()) for k, p in toy.start.items()}

    def _observe(self, t: int, params: Params, optimizer: torch.optim.Optimizer, norm: float) -> None:
        toy = self.toy
        self.optimizer = update_name(optimizer)
        update = UPDATES[self.optimizer]
        groups = {id(p): g for g in optimizer.param_groups for p in g["params"]}
        indices = [i for micro in toy.schedule[t] for i in micro]
        numbers = [m for m, micro in enumerate(toy.schedule[t]) for _ in micro]
        present = {k: p for k, p in params.items() if p.grad is not None}
        kappa = [1 / (len(micro) * len(toy.schedule[t])) for micro in toy.schedule[t] for _ in micro]
        self.thetas.append({k: p.detach().clone() for k, p in params.items()})
        self.records.append(
            StepRecord(
                index=t,
                sample_ids=torch.tensor(indices),
                loss_weights=torch.tensor(kappa, dtype=torch.float64),
                micro_batch_numbers=torch.tensor(numbers),
                gradients={k: p.grad.detach().flatten().clone() for k, p in present.items()},
                moments={
                    k: tuple(m.flatten().clone() for m in read_moments(optimizer.state.get(p, {}), update, p))
                    for k, p in present.items()
                },
                hyper={
                    k: read_hyper(groups[id(p)], optimizer.state.get(p, {}), type(optimizer))
                    for k, p in present.items()
                },
                clip=Clip(toy.clip.rule, toy.clip.bound, norm),
                parameters={k: p.detach().flatten().clone() for k, p in params.items()},
            )
        )

    @property
    def starts(self) -> list[int]:
        return list(range(len(self)))

    def __len__(self) -> int:
        return len(self.records)

    def record(self, index: int) -> StepRecord:
        if not 0 <= index < len(self):
            raise IndexError(f"step {index} of {len(self)}")
        return self.records[index]

    def sample_ids(self, index: int) -> Tensor:
        return self.records[index].sample_ids

    def shares(self, index: int) -> Mapping[str, DenseShares]:
        ids, kappa = self.records[index].sample_ids, self.records[index].loss_weights
        used = self.toy.used(self.thetas[index], index)
        rows = vmap(grad(self.toy.sample_loss), (None, 0, 0))(used, self.toy.x[ids], self.toy.y[ids])
        return {k: DenseShares(kappa[:, None] * rows[k].flatten(1)) for k in self.records[index].gradients}

    def select(self, name: str, values: Tensor) -> Tensor:
        return values.flatten(-len(self.toy.start[name].shape))

    def dense_hessian(self, index: int) -> Tensor:
        if index not in self._hessians:
            self._hessians[index] = self._dense_hessian(index)
        return self._hessians[index]

    def _dense_hessian(self, index: int) -> Tensor:
        blocks = hessian(lambda params: self.toy.batch_loss(params, index))(self.thetas[index])
        sizes = {k: n for k, (n, _) in self.sizes.items()}
        return torch.cat([torch.cat([blocks[i][j].reshape(sizes[i], sizes[j]) for j in sizes], 1) for i in sizes])

    def curvature_product(self, index: int, kind: str, vectors: Params) -> Params:
        assert kind == "hessian"
        n, like = next(iter(vectors.values())).shape[0], next(iter(vectors.values()))
        whole = [vectors.get(k, like.new_zeros(n, size)) for k, (size, _) in self.sizes.items()]
        product = (torch.cat(whole, 1) @ self.dense_hessian(index).to(like)).split([w.shape[1] for w in whole], 1)
        return {k: p for k, p in zip(self.sizes, product, strict=True) if k in vectors}

    def third_derivative(self, index: int, vectors: Params) -> Params:
        names = list(vectors)
        out = []
        for rows in zip(*vectors.values(), strict=True):
            direction = {k: r.reshape(self.toy.start[k].shape) for k, r in zip(names, rows, strict=True)}

            def gradient(eps: Tensor, direction: Params = direction) -> Params:
                moved = self.thetas[index] | {k: self.thetas[index][k] + eps * direction[k] for k in names}
                return grad(lambda p: self.toy.batch_loss(p, index))(moved)

            zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
            second = jvp(lambda e: jvp(gradient, (e,), (one,))[1], (zero,), (one,))[1]
            out.append({k: second[k].flatten() for k in names})
        return {k: torch.stack([o[k] for o in out]) for k in names}

    def query_curvature(self, directions: Params) -> Tensor:
        """Second derivatives (k, q) of the queries along directions, by dense Hessians."""
        flat = torch.cat(list(directions.values()), 1)
        columns = []
        for x, y in zip(self.toy.query_x, self.toy.query_y, strict=True):
            blocks = hessian(lambda p, x=x, y=y: self.toy.sample_loss(p, x, y))(self.final)
            sizes = {k: n for k, (n, _) in self.sizes.items()}
            dense = torch.cat([torch.cat([blocks[i][j].reshape(sizes[i], sizes[j]) for j in sizes], 1) for i in sizes])
            columns.append(torch.einsum("ki,ij,kj->k", flat, dense, flat))
        return torch.stack(columns, 1)

    def query_gradients(self) -> Params:
        rows = vmap(grad(self.toy.sample_loss), (None, 0, 0))(self.final, self.toy.query_x, self.toy.query_y)
        return {k: r.flatten(1) for k, r in rows.items()}


def effective(record: StepRecord, name: str) -> Tensor:
    parameters = record.parameters or {}
    return effective_gradient(record.gradients[name], parameters.get(name), record.hyper[name])


SCHEDULE = [[[0, 1, 2, 3]], [[4, 5, 6]], [[7, 8, 9, 10, 11]], [[0, 2, 4, 6]], [[1, 3, 5, 7, 9]]]
ACCUMULATED = [[[0, 1, 2], [3, 4]], [[5, 6], [7]], [[8, 9, 10], [11, 0]], [[1, 2], [3, 4, 5]]]


def adamw(**options: Any) -> OptimizerFactory:
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1} | options

    def build(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
        half = len(parameters) // 2
        groups = [
            {"params": parameters[:half]},
            {"params": parameters[half:], "lr": options["lr"] / 3, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, **options)

    return build


RUNS = {
    "adamw": Toy(adamw(), SCHEDULE),
    "adamw, schedule": Toy(adamw(), SCHEDULE, lr_factor=lambda t: (0.2, 1.0, 0.7, 0.4, 0.1)[t]),
    "adamw, clipped norm": Toy(adamw(), SCHEDULE, clip=Clip("norm", 0.3)),
    "adamw, some steps clipped": Toy(adamw(), SCHEDULE, clip=Clip("norm", 0.9)),
    "adamw, clipped value": Toy(adamw(), SCHEDULE, clip=Clip("value", 0.1)),
    "adamw, accumulated": Toy(adamw(), ACCUMULATED),
    "adamw, accumulated and clipped": Toy(adamw(), ACCUMULATED, clip=Clip("norm", 0.3)),
    "adamw, maximized and clipped": Toy(adamw(maximize=True), SCHEDULE, clip=Clip("norm", 0.9)),
    "adamw, some parameters unused": Toy(
        adamw(), SCHEDULE, unused={1: {"0.bias"}, 2: {"2.bias"}, 3: {"2.bias", "0.weight"}}
    ),
    "adam l2": Toy(lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1), SCHEDULE),
    "amsgrad": Toy(lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True), SCHEDULE),
    "sgd": Toy(lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1), SCHEDULE),
    "nesterov": Toy(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), SCHEDULE),
}

OPTIMIZERS: dict[str, OptimizerFactory] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "adamw_maximize": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, maximize=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adam_l2": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "adam_l2_maximize": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1, maximize=True),
    "adam_decoupled": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1, decoupled_weight_decay=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "adam_amsgrad_l2": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, weight_decay=0.1),
    "sgd_maximize": lambda p: torch.optim.SGD(p, lr=1e-2, weight_decay=0.1, maximize=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, dampening=0.3, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
}


def hyper_of(kind: str, step_count: int) -> dict[str, float]:
    """Hyperparameters of one of `OPTIMIZERS` at a step."""
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = OPTIMIZERS[kind]([parameter])
    return read_hyper(optimizer.param_groups[0], {}, type(optimizer)) | {"step": float(step_count)}


def update_of(kind: str) -> Update:
    """The update rule of one of `OPTIMIZERS`."""
    return UPDATES[update_name(OPTIMIZERS[kind]([torch.zeros(1, requires_grad=True)]))]
