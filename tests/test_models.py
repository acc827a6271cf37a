"""Whole architectures under a trainer: every sample's logged share is its own gradient."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from modules import digits, fit, loader
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lightning_influence import InfluenceCallback, attribute
from lightning_influence.log.steps import LoggedTrajectory
from lightning_influence.run.batches import example, to_dtype

STEPS, BATCH, TOKENS = 3, 4, 12


def text(n: int = 16, padded: bool = False) -> list[dict[str, Tensor]]:
    """Python's own documentation as blocks of bytes; padded ones end early."""
    raw = torch.tensor(list("\n".join(pydoc_data.topics.topics.values()).encode("ascii", "ignore")))
    blocks = []
    for i in range(n):
        ids = raw[i * TOKENS : (i + 1) * TOKENS].clone()
        labels, mask = ids.clone(), torch.ones_like(ids)
        if padded:
            length = 4 + 3 * i % 8
            labels[length:], mask[length:] = -100, 0
        blocks.append({"input_ids": ids, "labels": labels, "attention_mask": mask})
    return blocks


def gpt2(dropout: float = 0.0) -> nn.Module:
    rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=128, n_positions=TOKENS, n_embd=16, n_layer=2, n_head=2, **rates, **ends)
    )


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=TOKENS,
        )
    )


def lora() -> nn.Module:
    return get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


class Residual(nn.Module):
    """A block of a residual network."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.GroupNorm(2, channels),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, padding=1, groups=2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(x + self.body(x))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 4, 3, stride=2),
        Residual(4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 10),
    )


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 10))


class Images(L.LightningModule):
    def __init__(self, build: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = build()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": nn.functional.cross_entropy(self.net(batch[0]), batch[1]), "seen": len(batch[1])}

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class Text(Images):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(**batch).loss


@dataclass
class Output:
    """What a model may return instead of a tensor."""

    logits: Tensor
    hidden: list[Tensor]


class Structured(nn.Module):
    """Dicts in, a dataclass out, one part of it checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 8), nn.Linear(8, 10)

    def forward(self, inputs: dict[str, Tensor]) -> Output:
        hidden = checkpoint(lambda x: self.first(x).tanh(), inputs["x"], use_reentrant=False)
        assert isinstance(hidden, Tensor)
        return Output(self.second(hidden), [hidden])


class FromOutput(Images):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self.net({"x": batch[0]}).logits, batch[1])


class OwnGradients(L.Callback):
    """Each sample's gradient by autograd on the sample alone, before every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        own = {k: p for k, p in module.named_parameters() if p.requires_grad}
        rows = []
        for i in range(BATCH):
            output = module.training_step(example(batch, i), batch_idx)
            loss = output["loss"] if isinstance(output, dict) else output
            rows.append(torch.autograd.grad(loss, list(own.values()), allow_unused=True, materialize_grads=True))
        self.steps.append({k: torch.stack([row[j].flatten() for row in rows]) for j, k in enumerate(own)})


CASES: dict[str, tuple[Callable[[], L.LightningModule], Callable[[], Dataset[Any]]]] = {
    "mlp": (lambda: Images(mlp), lambda: digits(16)),
    "residual cnn": (lambda: Images(cnn), lambda: digits(16)),
    "gpt2": (lambda: Text(gpt2), text),  # type: ignore[dict-item]
    "gpt2, padded": (lambda: Text(gpt2), lambda: text(padded=True)),  # type: ignore[dict-item]
    "llama": (lambda: Text(llama), text),  # type: ignore[dict-item]
    "llama, padded": (lambda: Text(llama), lambda: text(padded=True)),  # type: ignore[dict-item]
    "llama, lora": (lambda: Text(lora), text),  # type: ignore[dict-item]
    "dataclass and checkpoint": (lambda: FromOutput(Structured), lambda: digits(16)),
}


def recorded(
    tmp_path: Path, module: L.LightningModule, data: Any, *callbacks: L.Callback, **options: Any
) -> LoggedTrajectory:
    influence = InfluenceCallback(tmp_path / "log", compression="factored", record="gradients")
    # the callback under test comes last: the others run the module outside the recorded forward
    fit(module, loader(data, BATCH), *callbacks, influence, max_steps=STEPS, **options)
    return LoggedTrajectory(tmp_path / "log")


@pytest.mark.parametrize("name", CASES)
def test_every_share_is_the_sample_s_own_gradient(tmp_path: Path, name: str) -> None:
    make, data = CASES[name]
    module, own = make(), OwnGradients()
    trajectory = recorded(tmp_path, module, data(), own, precision="64-true")
    assert list(trajectory.sizes) == [k for k, p in module.named_parameters() if p.requires_grad]
    # transformers computes its losses in float32 whatever the precision
    close = {"rtol": 1e-5, "atol": 1e-7} if isinstance(module, Text) else {"rtol": 1e-7, "atol": 1e-10}
    for index, expected in enumerate(own.steps):
        record, shares = trajectory.record(index), trajectory.shares(index)
        for k, rows in expected.items():
            torch.testing.assert_close(shares[k].dense(), record.loss_weights[:, None] * rows, **close)
            torch.testing.assert_close(shares[k].dense().sum(0), record.gradients[k], **close)


def test_adapters_are_all_that_is_logged(tmp_path: Path) -> None:
    trajectory = recorded(tmp_path, Text(lora), text())
    assert trajectory.sizes and all("lora_" in k for k in trajectory.sizes)


def test_a_tied_table_is_one_parameter(tmp_path: Path) -> None:
    trajectory = recorded(tmp_path, Text(gpt2), text())
    assert "net.transformer.wte.weight" in trajectory.sizes
    assert "net.lm_head.weight" not in trajectory.sizes


@pytest.mark.parametrize("name", ["residual cnn", "gpt2, padded", "llama, lora"])
def test_half_precision(tmp_path: Path, name: str) -> None:
    make, data = CASES[name]
    trajectory = recorded(tmp_path, make(), data(), precision="bf16-mixed")
    for index in range(STEPS):
        record, shares = trajectory.record(index), trajectory.shares(index)
        total = torch.cat([shares[k].dense().sum(0) for k in record.gradients])
        gradient = torch.cat(list(record.gradients.values()))
        assert float((total - gradient).norm() / gradient.norm()) < 0.01


def test_dropout_stays_what_it_was(tmp_path: Path) -> None:
    states = []
    for callbacks in ([], [InfluenceCallback(tmp_path / "log", record="gradients")]):
        module = Text(lambda: gpt2(dropout=0.1))
        torch.manual_seed(1)
        fit(module, DataLoader(text(), BATCH, shuffle=True), *callbacks, max_steps=STEPS)  # type: ignore[arg-type]
        states.append(module.state_dict())
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
def test_activation_checkpointing_of_a_language_model(tmp_path: Path, kind: str) -> None:
    def build() -> nn.Module:
        net = llama()
        net.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
        return net

    data = text(BATCH)
    plain = recorded(tmp_path / "plain", Text(llama), data, precision="64-true")
    saved = recorded(tmp_path / "saved", Text(build), data, precision="64-true")
    for k in plain.sizes:
        torch.testing.assert_close(saved.shares(0)[k].dense(), plain.shares(0)[k].dense(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["residual cnn", "gpt2", "llama, lora", "dataclass and checkpoint"])
def test_replay_of_real_architectures_is_the_log_of_gradients(tmp_path: Path, name: str) -> None:
    """The two recordings share no code but the sweep: with the same curvature they give the same scores."""
    make, data = CASES[name]
    module = make()
    fit(
        module,
        loader(data(), BATCH),
        InfluenceCallback(tmp_path / "a", compression="full", record="both"),
        InfluenceCallback(tmp_path / "b", record="replay", snapshot_every=2),
        max_steps=STEPS,
        precision="64-true",
    )
    queries = [to_dtype(b, torch.float64) for b in DataLoader(data(), BATCH)]
    reports = [attribute(tmp_path / x, queries=queries, model=module, target="mean", curvature="fisher") for x in "ab"]
    torch.testing.assert_close(reports[0].scores, reports[1].scores, rtol=1e-6, atol=1e-10)
    exact = attribute(tmp_path / "b", queries=queries, model=module, target="mean")
    assert exact.metadata["curvature"] == "hessian" and exact.scores.isfinite().all()
