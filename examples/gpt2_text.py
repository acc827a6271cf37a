"""Which passages taught a language model: GPT-2's architecture on Python's own documentation, byte by byte.

python examples/gpt2_text.py
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_influence import InfluenceCallback, InfluenceReport, attribute, token_scores


class LanguageModel(L.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (tokens,) = batch
        return self.net(input_ids=tokens, labels=tokens).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=5e-4)


class Letters:
    """The tokenizer of a model that reads bytes."""

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("ascii", "replace")


def main(argv: Sequence[str] | None = None) -> InfluenceReport:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n-train", type=int, default=256, help="blocks of text")
    parser.add_argument("--tokens", type=int, default=96, help="bytes in a block")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/gpt2_text"))
    args = parser.parse_args(argv)

    L.seed_everything(0, verbose=False)
    raw = torch.tensor(list("\n".join(pydoc_data.topics.topics.values()).encode("ascii", "ignore")))
    blocks = raw[: len(raw) // args.tokens * args.tokens].view(-1, args.tokens)
    blocks = blocks[torch.randperm(len(blocks))]
    train, queries = TensorDataset(blocks[: args.n_train]), TensorDataset(blocks[-2:])

    config = GPT2Config(
        vocab_size=128, n_positions=args.tokens, n_embd=args.width, n_layer=args.layers, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    module = LanguageModel(GPT2LMHeadModel(config))
    influence = InfluenceCallback(args.out / "log", record="replay", existing="overwrite")
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[influence]
    )
    trainer.fit(module, DataLoader(train, 16, shuffle=True))

    report = attribute(args.out / "log", queries=DataLoader(queries, 2), model=module)
    for query in report.query_ids:
        print(f"\nquery {query}: {bytes(queries[int(query)][0].tolist())!r}")
        for title, table in (("helped", report.top(3, query)), ("harmed", report.bottom(3, query))):
            for row in table.itertuples():
                print(f"  {title} {row.score:+.2e}: {bytes(train[row.sample_id][0].tolist())!r}")
    # which letters of the blocks that helped and harmed most did it
    ends = [*report.top(3).sample_id, *report.bottom(3).sample_id]
    tokens = token_scores(args.out / "log", ends, queries=DataLoader(queries, 2), model=module)
    options = {"data": train, "queries": queries, "tokens": tokens, "tokenizer": Letters()}
    page = report.to_html(args.out / "report.html", title="Which passages taught the model?", **options)
    report.to_csv(args.out / "scores.csv")
    print(f"wrote {args.out / 'scores.csv'} and {page}")
    return report


if __name__ == "__main__":
    main()
