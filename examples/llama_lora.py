"""Which examples taught an adapter: LoRA on a Llama model, with the base frozen.

python examples/llama_lora.py

Weights of ``--weights`` are used where they are on this machine already; otherwise a small model is built from
its configuration, and the script says so.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lightning_influence import InfluenceCallback, InfluenceReport, attribute

IGNORED = -100


class Tuning(L.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.net(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=2e-3)


class Topics(Dataset[dict[str, Tensor]]):
    """A help topic's name as the instruction, the beginning of its text as the answer; bytes are tokens."""

    def __init__(self, length: int) -> None:
        self.names, self.length = sorted(pydoc_data.topics.topics), length

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        name = self.names[index]
        prompt = f"help({name!r})\n".encode("ascii", "ignore")
        text = (prompt + pydoc_data.topics.topics[name].encode("ascii", "ignore"))[: self.length]
        ids = torch.zeros(self.length, dtype=torch.int64)
        ids[: len(text)] = torch.tensor(list(text))
        labels = ids.clone()
        labels[: len(prompt)] = labels[len(text) :] = IGNORED
        return {"input_ids": ids, "attention_mask": (torch.arange(self.length) < len(text)).long(), "labels": labels}


def base_model(weights: str, width: int) -> nn.Module:
    try:
        model = AutoModelForCausalLM.from_pretrained(weights, local_files_only=True)
    except OSError:
        print(f"{weights} is not on this machine: built from a configuration, with random weights")
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=128, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
            )
        )  # fmt: skip
    print(f"weights of {weights}")
    return model


def main(argv: Sequence[str] | None = None) -> InfluenceReport:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", default="meta-llama/Llama-3.2-1B")
    parser.add_argument("--n-train", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--width", type=int, default=64, help="where the model is built from a configuration")
    parser.add_argument("--out", type=Path, default=Path("runs/llama_lora"))
    args = parser.parse_args(argv)

    L.seed_everything(0, verbose=False)
    topics = Topics(args.tokens)
    train = torch.utils.data.Subset(topics, range(args.n_train))
    queries = torch.utils.data.Subset(topics, range(len(topics) - 4, len(topics)))
    adapters = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    module = Tuning(get_peft_model(base_model(args.weights, args.width), adapters))

    influence = InfluenceCallback(args.out / "log", record="replay", existing="overwrite")
    trainer = L.Trainer(
        max_epochs=args.epochs, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[influence]
    )
    trainer.fit(module, DataLoader(train, 8, shuffle=True))

    report = attribute(args.out / "log", queries=DataLoader(queries, 4), model=module, target="mean")
    for title, table in (("most helpful", report.top(5)), ("most harmful", report.bottom(5))):
        print(f"\n{title} topics")
        for row in table.itertuples():
            print(f"  {row.score:+.2e}  {topics.names[row.sample_id]}")
    report.to_csv(args.out / "scores.csv")
    print(f"wrote {args.out / 'scores.csv'}")
    return report


if __name__ == "__main__":
    main()
