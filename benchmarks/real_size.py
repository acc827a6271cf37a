"""Language models at the size that people train, from their configurations: time and memory beside plain training, and truth.

    python benchmarks/real_size.py gpt2                  # 124 million parameters, all of them trained
    python benchmarks/real_size.py llama --steps 4       # 1.24 billion, with adapters (LoRA) of rank 16 on q and v
    python benchmarks/real_size.py gpt2 --layers 2 --width 128 --vocabulary 2000   # small, to try it

Text is Python's own documentation, a word a token; weights are random. Each phase runs in a process of its own, whose peak of
resident memory is printed; what lies in files that are mapped is not counted. Needs 24 GB for gpt2.
"""

from __future__ import annotations

import argparse
import multiprocessing
import pydoc_data.topics
import re
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from measure import quiet, show
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lightning_influence import InfluenceCallback, SelectionDataModule, attribute, error_proxy

N_QUERIES = 4


@dataclass(frozen=True)
class Setting:
    """A run; ``layers``, ``width`` and ``vocabulary`` are those of the published model where they are None."""

    model: str
    steps: int
    batch: int
    tokens: int
    lr: float
    layers: int | None
    width: int | None
    vocabulary: int | None

    def network(self) -> nn.Module:
        if self.model == "gpt2":
            config = GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
            config.n_layer, config.n_embd = self.layers or 12, self.width or 768
            config.n_head = config.n_embd // 64
            config.vocab_size = self.vocabulary or config.vocab_size
            return GPT2LMHeadModel(config)
        from peft import LoraConfig, get_peft_model

        width = self.width or 2048
        config = LlamaConfig(
            vocab_size=self.vocabulary or 128_256, hidden_size=width, intermediate_size=4 * width, head_dim=width // 32,
            num_hidden_layers=self.layers or 16, num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True,
            max_position_embeddings=4096,
        )  # fmt: skip
        return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))

    def blocks(self) -> Tensor:
        """Words of the text as numbers, in blocks."""
        words = re.findall(r"\w+|\S", "\n".join(pydoc_data.topics.topics.values()))
        number = {word: i for i, word in enumerate(dict.fromkeys(words))}
        ids = torch.tensor([number[word] % (self.vocabulary or 50_000) for word in words])
        blocks = ids[: len(ids) // self.tokens * self.tokens].view(-1, self.tokens)
        return blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))]

    def train(self) -> TensorDataset:
        return TensorDataset(self.blocks()[: self.steps * self.batch])

    def queries(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(self.blocks()[-N_QUERIES:]), 1)

    def module(self) -> LanguageModel:
        return LanguageModel(self)


class LanguageModel(L.LightningModule):
    """The same weights every time; the learning rate warms up over a quarter of the steps."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self._setting = setting.network(), setting

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (tokens,) = batch
        loss: Tensor = self.net(input_ids=tokens, labels=tokens).loss
        return loss

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer, warm = torch.optim.AdamW(trained, lr=self._setting.lr), max(1, self._setting.steps // 4)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, (t + 1) / warm))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


# -- phases: each in a process of its own -------------------------------------------------------------------


def plain(setting: Setting, where: Path) -> float:
    return _fit(setting, setting.module())


def recorded(setting: Setting, where: Path) -> float:
    module = setting.module()
    callback = InfluenceCallback(where / "log", record="replay", existing="overwrite")
    seconds = _fit(setting, module, callback)
    torch.save({k: p for k, p in module.named_parameters() if p.requires_grad}, where / "trained.pt")
    return seconds


def selected(setting: Setting, where: Path) -> float:
    """Half of each batch is kept, for the queries."""
    data = SelectionDataModule(DataLoader(setting.train(), setting.batch), setting.queries(), every=1, keep=0.5)
    return _fit(setting, setting.module(), data=data)


def scored(setting: Setting, where: Path, **options: Any) -> tuple[float, dict[int, float], int]:
    """Seconds, the score of every sample, and the memory window that was used."""
    module = _trained(setting, where)
    start = time.perf_counter()
    report = attribute(where / "log", queries=setting.queries(), model=module, target="mean", progress=False, **options)
    seconds, scores = time.perf_counter() - start, report.scores[:, 0].tolist()
    return seconds, dict(zip(report.sample_ids.tolist(), scores, strict=True)), report.metadata["memory_window"]


def proxied(setting: Setting, where: Path, **options: Any) -> float:
    module = _trained(setting, where)
    start = time.perf_counter()
    error_proxy(
        where / "log", queries=setting.queries(), model=module, target="mean", pairs=1, progress=False, **options
    )
    return time.perf_counter() - start


def retrained(setting: Setting, where: Path, without: int | None) -> float:
    """Mean loss of the queries after a plain loop of torch, without one sample or with all."""
    module = setting.module()
    configured = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    (data,) = setting.train().tensors
    module.train()
    for step in range(setting.steps):
        ids = [i for i in range(step * setting.batch, (step + 1) * setting.batch) if i != without]
        optimizer.zero_grad()
        module.training_step([data[ids]], step).backward()
        optimizer.step()
        schedule.step()
    module.eval()
    with torch.no_grad():
        return float(sum(module.training_step(batch, 0).double() for batch in setting.queries()) / N_QUERIES)


def _trained(setting: Setting, where: Path) -> LanguageModel:
    module = setting.module()
    module.load_state_dict(torch.load(where / "trained.pt"), strict=False)
    return module


def _fit(setting: Setting, module: LanguageModel, *callbacks: L.Callback, data: Any = None) -> float:
    trainer = L.Trainer(
        max_epochs=1, accelerator="auto", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks),
    )  # fmt: skip
    start = time.perf_counter()
    trainer.fit(module, DataLoader(setting.train(), setting.batch) if data is None else data)
    return time.perf_counter() - start


class Peak:
    """The most resident memory of this process, without mapped files, in GB."""

    def __init__(self) -> None:
        self.most, self._over = 0.0, threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            text = Path("/proc/self/status").read_text()
            self.most = max(self.most, int(re.search(r"RssAnon:\s+(\d+)", text)[1]) / 2**20)  # type: ignore[index]

    def end(self) -> float:
        self._over.set()
        return max(self.most, torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0)


def apart(work: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, float]:
    """What work gives in a process of its own, and its peak memory."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_apart, args=(send, work, args, options))
    process.start()
    send.close()
    try:
        found: tuple[Any, float] = receive.recv()
    except EOFError:
        raise SystemExit(f"{work.__name__} was ended by the system, most likely for want of memory") from None
    process.join()
    return found


def _apart(send: Any, work: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> None:
    quiet()
    peak = Peak()
    result = work(*args, **options)
    send.send((result, peak.end()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["gpt2", "llama"])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, help="8 blocks for gpt2, 2 for llama")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--lr", type=float, help="1e-5 for gpt2, 1e-4 for llama")
    for size in ("layers", "width", "vocabulary"):
        parser.add_argument(f"--{size}", type=int, help="where it is to be smaller than published")
    parser.add_argument(
        "--max-memory", type=int, default=None, help="of attribution, in bytes; by default what it finds free"
    )
    parser.add_argument("--removals", type=int, default=4, help="to be held against retraining, spread over the steps")
    parser.add_argument("--proxy", action="store_true", help="the error proxy of one pair, too")
    parser.add_argument("--selection", action="store_true", help="training with selection inside the step, too")
    parser.add_argument(
        "--only-training", action="store_true", help="no attribution: what recording costs over many steps"
    )
    args = parser.parse_args()
    gpt2 = args.model == "gpt2"
    setting = Setting(
        args.model, args.steps, args.batch or (8 if gpt2 else 2), args.tokens, args.lr or (1e-5 if gpt2 else 1e-4),
        args.layers, args.width, args.vocabulary,
    )  # fmt: skip
    memory = {} if args.max_memory is None else {"max_memory": args.max_memory}
    with tempfile.TemporaryDirectory() as name:
        table = Table()
        training(setting, Path(name), table, selects=args.selection)
        if not args.only_training:
            attribution(setting, Path(name), table, memory, args.removals, proxy=args.proxy)


class Table:
    """Phases beside the first of them, printed as they end."""

    def __init__(self) -> None:
        self._plain: float | None = None

    def note(self, phase: str, seconds: float, peak: float) -> None:
        self._plain = self._plain or seconds
        show([{"phase": phase, "s": seconds, "times plain": seconds / self._plain, "GB": peak}], 2)


def training(setting: Setting, where: Path, table: Table, *, selects: bool) -> None:
    (total, trained), _ = apart(_count, setting)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    print(
        f"{setting.model}: {total / 1e6:.0f} million parameters, {trained / 1e6:.1f} trained ({4 * trained / 2**30:.2f} GB); "
        f"{setting.steps} steps of {setting.batch} x {setting.tokens} tokens, lr {setting.lr:g}; {device}",
        flush=True,
    )
    table.note("plain", *apart(plain, setting, where))
    table.note("recorded", *apart(recorded, setting, where))
    print(f"log: {sum(f.stat().st_size for f in where.rglob('*.safetensors')) / 2**30:.2f} GB", flush=True)
    if selects:
        table.note("selection inside the step", *apart(selected, setting, where))


def attribution(
    setting: Setting, where: Path, table: Table, memory: dict[str, int], removals: int, *, proxy: bool
) -> None:
    (seconds, _, _), peak = apart(scored, setting, where, response="tangent", **memory)
    table.note("tangent + Hessian", seconds, peak)
    (seconds, scores, window), peak = apart(scored, setting, where, **memory)
    table.note("finite + Hessian", seconds, peak)
    print(f"memory window of {window} steps", flush=True)
    if proxy:
        table.note("error proxy, one pair", *apart(proxied, setting, where, **memory))
    if removals:
        _truth(setting, where, scores, removals)


def _count(setting: Setting) -> tuple[int, int]:
    parameters = list(setting.module().parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def _truth(setting: Setting, where: Path, scores: dict[int, float], removals: int) -> None:
    """Scores of one sample of each of some steps, the first among them, beside retraining without it."""
    steps = torch.linspace(0, setting.steps - 1, min(removals, setting.steps)).round().long().tolist()
    chosen = [step * setting.batch for step in steps]
    baseline, _ = apart(retrained, setting, where, None)
    truth = torch.tensor([apart(retrained, setting, where, z)[0] - baseline for z in chosen], dtype=torch.float64)
    found = torch.tensor([scores[z] for z in chosen], dtype=torch.float64)
    show([{"step": t, "score": float(s), "truth": float(e)} for t, s, e in zip(steps, found, truth, strict=True)], 6)
    error = float((found - truth).norm() / truth.norm())
    print(f"Spearman {spearmanr(found, truth).statistic:.3f}, relative error {error:.3f}")


if __name__ == "__main__":
    main()
