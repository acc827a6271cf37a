"""Every capture rule against `torch.func.vmap(grad)` in float64."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from lightning_influence.capture import GradientCapture
from lightning_influence.errors import ConfigurationError, UncoveredParameter

N = 4


def captured(module: nn.Module, loss: Callable[[], Tensor], n: int = N, **options: Any) -> dict[str, Tensor]:
    """Shares out of one backward pass; their sum is the gradient."""
    capture = GradientCapture(module, **options)
    capture.attach()
    capture.begin(n)
    module.zero_grad()
    loss().backward()
    shares = {name: form.dense() for name, form in capture.take().items()}
    capture.detach()
    for name, p in capture.parameters.items():
        reference = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(shares[name].sum(0), reference.flatten(), rtol=1e-8, atol=1e-10)
    return shares


def scalar(output: Any, weights: Tensor) -> Tensor:
    """A nonlinear loss per item, summed."""
    return (torch.tanh(output) * weights).sum()


def check(module: nn.Module, x: Tensor) -> None:
    """Captured shares equal vmap(grad) to 1e-8, in float64."""
    module = module.double()
    torch.manual_seed(1)
    weights = torch.randn_like(module(x).detach())

    def one(parameters: dict[str, Tensor], item: Tensor, weight: Tensor) -> Tensor:
        return scalar(functional_call(module, parameters, (item[None],)), weight[None])

    parameters = {k: p.detach() for k, p in module.named_parameters()}
    reference = vmap(grad(one), (None, 0, 0))(parameters, x, weights)
    shares = captured(nn.Sequential(module), lambda: scalar(module(x), weights), n=len(x))
    for name, rows in reference.items():
        torch.testing.assert_close(shares[f"0.{name}"], rows.flatten(1), rtol=1e-8, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(leading=st.lists(st.integers(1, 3), max_size=2), bias=st.booleans(), seed=st.integers(0, 999))
def test_linear(leading: list[int], bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    check(nn.Linear(5, 3, bias=bias), torch.randn(N, *leading, 5).double())


@settings(max_examples=60, deadline=None)
@given(data=st.data(), dimensions=st.integers(1, 3), seed=st.integers(0, 999))
def test_convolution(data: st.DataObject, dimensions: int, seed: int) -> None:
    torch.manual_seed(seed)
    groups = data.draw(st.sampled_from([1, 2]))
    stride = data.draw(st.integers(1, 2))
    mode = data.draw(st.sampled_from(["zeros", "reflect", "circular"]))
    padding = data.draw(st.sampled_from([0, 1, "same"] if stride == 1 else [0, 1]))
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    layer = kind(
        4, 6, data.draw(st.integers(1, 3)), stride, padding, data.draw(st.integers(1, 2)), groups, mode != "zeros", mode
    )
    check(layer, torch.randn(N, 4, *range(6, 6 + dimensions)).double())


@settings(max_examples=40, deadline=None)
@given(data=st.data(), dimensions=st.integers(1, 3), seed=st.integers(0, 999))
def test_transposed_convolution(data: st.DataObject, dimensions: int, seed: int) -> None:
    torch.manual_seed(seed)
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dimensions - 1]
    stride = data.draw(st.integers(1, 2))
    layer = kind(
        4,
        6,
        data.draw(st.integers(2, 3)),
        stride,
        padding=data.draw(st.integers(0, 1)),
        output_padding=data.draw(st.integers(0, stride - 1)),
        groups=data.draw(st.sampled_from([1, 2])),
        dilation=data.draw(st.integers(1, 2)),
    )
    check(layer, torch.randn(N, 4, *range(3, 3 + dimensions)).double())


NORMS = {
    "layer": (nn.LayerNorm(6), (N, 6)),
    "layer, tokens": (nn.LayerNorm(6), (N, 3, 2, 6)),
    "layer, two dimensions": (nn.LayerNorm((2, 6)), (N, 3, 2, 6)),
    "layer, no bias": (nn.LayerNorm(6, bias=False), (N, 3, 6)),
    "rms": (nn.RMSNorm(6), (N, 3, 6)),
    "rms, eps": (nn.RMSNorm((2, 6), eps=1e-2), (N, 3, 2, 6)),
    "group": (nn.GroupNorm(2, 6), (N, 6, 5)),
    "group, flat": (nn.GroupNorm(2, 6), (N, 6)),
    "group, images": (nn.GroupNorm(3, 6), (N, 6, 4, 4)),
    "instance": (nn.InstanceNorm1d(6, affine=True), (N, 6, 5)),
    "instance, images": (nn.InstanceNorm2d(6, affine=True), (N, 6, 4, 4)),
    "instance, volumes": (nn.InstanceNorm3d(6, affine=True), (N, 6, 2, 3, 4)),
    "batch, eval": (nn.BatchNorm1d(6).eval(), (N, 6)),
    "batch, images, eval": (nn.BatchNorm2d(6).eval(), (N, 6, 4, 4)),
}


@pytest.mark.parametrize("name", NORMS)
def test_normalization(name: str) -> None:
    torch.manual_seed(0)
    layer, shape = NORMS[name]
    for p in layer.parameters():
        nn.init.normal_(p, 1.0, 0.3)
    check(layer, torch.randn(*shape).double())


@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("tokens", [(), (5,), (2, 3)])
def test_embedding(padding_idx: int | None, tokens: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    check(nn.Embedding(7, 3, padding_idx=padding_idx), torch.randint(0, 7, (N, *tokens)))


class Scale(nn.Module):
    """Plain parameters used elementwise."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.table = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(3, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.table


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x.flip(1))[0]


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.net = kind(6, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[0]


def test_generic_modules() -> None:
    torch.manual_seed(0)
    x = torch.randn(N, 3, 6).double()
    with pytest.warns(UserWarning, match="no rule for.*Scale"):
        check(Scale(), x)
    with pytest.warns(UserWarning, match="MultiheadAttention"):
        check(Attention(), x)
    with pytest.warns(UserWarning, match="Bilinear"):
        check(Pair(), x)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(6, 6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.bilinear(x, x2) if (x2 := x.sin()) is not None else x


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_modules(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    module, x = Recurrent(kind).double(), torch.randn(N, 3, 6).double()
    weights = torch.randn(N, 3, 4).double()
    with pytest.warns(UserWarning, match=kind.__name__):
        shares = captured(module, lambda: scalar(module(x), weights))
    for i in range(N):
        loss = scalar(module(x[i : i + 1]), weights[i : i + 1])
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        for name, g in zip(dict(module.named_parameters()), gradients, strict=True):
            torch.testing.assert_close(shares[name][i], g.flatten(), rtol=1e-8, atol=1e-10)


class Reused(nn.Module):
    """One layer used twice, weights tied between an embedding and a head, positions shared by the batch."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(9, 6), nn.Embedding(5, 6)
        self.mix, self.head = nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.tokens.weight
        self.checkpointed = checkpointed

    def block(self, h: Tensor) -> Tensor:
        return h + torch.relu_(self.mix(h))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.tokens(ids) + self.positions(torch.arange(ids.shape[1])[None])
        for _ in range(2):
            h = checkpoint(self.block, h, use_reentrant=False) if self.checkpointed else self.block(h)
        return self.head(h.flatten(0, 1)).unflatten(0, ids.shape)


def test_reused_tied_shared_and_flattened() -> None:
    torch.manual_seed(0)
    check(Reused(), torch.randint(0, 9, (N, 5)))


def test_checkpointed_activations() -> None:
    torch.manual_seed(0)
    module, ids = Reused().double(), torch.randint(0, 9, (N, 5))
    shares = []
    for module.checkpointed in (False, True):
        shares.append(captured(module, lambda: module(ids).square().sum()))
    for name, rows in shares[0].items():
        torch.testing.assert_close(shares[1][name], rows, rtol=1e-12, atol=1e-14)


def live_tensors() -> int:
    gc.collect()
    return sum(isinstance(o, Tensor) for o in gc.get_objects())


@pytest.mark.filterwarnings("ignore:.*no rule for")
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize(
    "make", [Reused, lambda: Reused(True), Attention, Scale, lambda: Recurrent(nn.LSTM), lambda: nn.Conv1d(3, 4, 2)]
)
def test_nothing_is_left_of_a_pass(make: Callable[[], nn.Module], create_graph: bool) -> None:
    """A hook that holds a part of the graph it hangs on is never freed, nor is that graph."""
    module = nn.Sequential(make())
    x = torch.randint(0, 9, (N, 5)) if isinstance(module[0], Reused) else torch.randn(N, 3, 6)
    capture = GradientCapture(module)

    def run() -> None:
        capture.attach()
        capture.begin(N)
        loss = module(x).square().sum()
        gradients = torch.autograd.grad(loss, list(module.parameters()), create_graph=create_graph)
        assert capture.take() and gradients
        capture.detach()

    run()
    before = live_tensors()
    for _ in range(3):
        run()
    assert live_tensors() == before


@pytest.mark.parametrize("n", [1, 3])
def test_batches_of_one_and_of_token_length(n: int) -> None:
    torch.manual_seed(0)
    check(Reused(), torch.randint(0, 9, (n, 3)))


def test_half_precision_is_captured_in_single() -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)), torch.randn(N, 6)
    capture = GradientCapture(module)
    capture.attach()
    capture.begin(N)
    with torch.autocast("cpu", torch.bfloat16):
        loss = module(x).float().square().mean()
    loss.backward()
    for name, form in capture.take().items():
        gradient = module.get_parameter(name).grad
        assert form.dense().dtype == torch.float32
        assert (form.dense().sum(0) - gradient.flatten()).norm() <= 2e-2 * gradient.norm()


def test_batch_norm_is_refused_or_frozen() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 2)).double()
    x = torch.randn(N, 1, 6, 6).double()
    with pytest.raises(ConfigurationError, match=r"1 \(BatchNorm2d\).*GroupNorm.*frozen_batch_norm"):
        GradientCapture(module)
    module[1].running_mean.normal_()
    before = module[1].running_mean.clone()
    shares = captured(module, lambda: module(x).square().sum(), frozen_batch_norm=True)
    assert torch.equal(module[1].running_mean, before)
    module.eval()
    for i in range(N):
        gradients = torch.autograd.grad(module(x[i : i + 1]).square().sum(), list(module.parameters()))
        for rows, g in zip(shares.values(), gradients, strict=True):
            torch.testing.assert_close(rows[i], g.flatten(), rtol=1e-8, atol=1e-10)


def test_what_cannot_be_captured_is_refused() -> None:
    with pytest.raises(UncoveredParameter, match="scale, table belongs to Scale itself"):
        GradientCapture(Scale())
    with pytest.raises(ConfigurationError, match="batch_first=True"):
        GradientCapture(nn.Sequential(nn.MultiheadAttention(4, 2)))
    compiled = nn.Sequential(torch.compile(nn.Linear(3, 3)))
    with pytest.raises(ConfigurationError, match="without torch.compile"):
        GradientCapture(compiled)
    with pytest.raises(ConfigurationError, match="without torch.jit"):
        GradientCapture(nn.Sequential(torch.jit.script(nn.Linear(3, 3))))
    GradientCapture(nn.Sequential(nn.Linear(3, 3), torch.jit.script(nn.Linear(3, 3).requires_grad_(False))))
    layer = nn.Sequential(nn.Embedding(5, 3, scale_grad_by_freq=True))
    with pytest.raises(ConfigurationError, match="scale_grad_by_freq"):
        captured(layer, lambda: layer(torch.tensor([[1], [2]])).sum(), n=2)
    linear = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(ConfigurationError, match="saw 5 items in a batch of 4"):
        captured(linear, lambda: linear(torch.randn(5, 3)).sum())
    dropout = nn.Sequential(nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True))
    x = torch.randn(N, 3, 4)
    with pytest.warns(UserWarning, match="no rule"), pytest.raises(ConfigurationError, match="one sample at a time"):
        captured(dropout, lambda: dropout[0](x, x, x)[0].sum())


def test_exclude_leaves_parameters_out() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    capture = GradientCapture(module, exclude=["0.*"])
    assert list(capture.parameters) == ["1.weight", "1.bias"]
    assert capture.excluded_ids == {id(p) for p in module[0].parameters()}


def test_frozen_parameters_are_not_captured() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    module[0].requires_grad_(False)
    assert list(GradientCapture(module).parameters) == ["1.weight", "1.bias"]
