"""Architectures of `transformers`, from small configurations, against Lightning run again without a sample, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from modules import fit
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_influence import InfluenceCallback, InfluenceError, attribute

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

N, BATCH, QUERIES, TOKENS, WORDS = 12, 4, 3, 6, 31
SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ATTENTION = {"max_position_embeddings": 16, "vocab_size": WORDS}


def bert(dropout: float = 0.0) -> nn.Module:
    rates = dict.fromkeys(WITHOUT_DROPOUT, dropout)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(**SMALL, **ATTENTION, **rates, num_labels=3)
    )


def as_from_pretrained() -> nn.Module:
    """In eval mode, with the dropout that is then not drawn."""
    return bert(dropout=0.3).eval()


def distilbert() -> nn.Module:
    return transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(
            dim=8,
            n_layers=1,
            n_heads=2,
            hidden_dim=16,
            dropout=0.0,
            attention_dropout=0.0,
            seq_classif_dropout=0.0,
            num_labels=3,
            **ATTENTION,
        )
    )


def roberta() -> nn.Module:
    return transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(**SMALL, **ATTENTION, **WITHOUT_DROPOUT, num_labels=3)
    )


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**SMALL, **WITHOUT_DROPOUT, image_size=8, patch_size=4, num_labels=3)
    )


def t5() -> nn.Module:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            d_model=8,
            d_kv=4,
            d_ff=16,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,
            vocab_size=WORDS,
            decoder_start_token_id=0,
            relative_attention_num_buckets=8,
        )
    )


def opt() -> nn.Module:
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            ffn_dim=16,
            dropout=0.0,
            attention_dropout=0.0,
            word_embed_proj_dim=8,
            **ATTENTION,
        )
    )


def gemma() -> nn.Module:
    return transformers.GemmaForCausalLM(
        transformers.GemmaConfig(**SMALL, **ATTENTION, num_key_value_heads=1, head_dim=4, pad_token_id=0)
    )


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=8,
            n_layer=1,
            n_head=2,
            n_positions=16,
            vocab_size=WORDS,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **ATTENTION, num_key_value_heads=1))


def adapted() -> nn.Module:
    """Adapters on linear layers and on the embedding."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "embed_tokens"], init_lora_weights=False)
    model: nn.Module = peft.get_peft_model(llama(), config)
    return model


def images(n: int) -> list[dict[str, Tensor]]:
    return [{"pixel_values": torch.randn(3, 8, 8, dtype=torch.float64), "labels": label} for label in classes(n)]


def classes(n: int) -> Tensor:
    return torch.randint(0, 3, (n,))


def words(n: int) -> Tensor:
    return torch.randint(3, WORDS, (n, TOKENS))


def classified(n: int) -> list[dict[str, Tensor]]:
    """Texts of several lengths, padded."""
    kept = torch.arange(TOKENS) < torch.randint(3, TOKENS + 1, (n, 1))
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": label}
        for ids, mask, label in zip(words(n), kept.long(), classes(n), strict=True)
    ]


def translated(n: int) -> list[dict[str, Tensor]]:
    return [{"input_ids": ids, "labels": labels} for ids, labels in zip(words(n), words(n), strict=True)]


def continued(n: int) -> list[dict[str, Tensor]]:
    """Texts whose first tokens, of several numbers, are not learned."""
    answered = torch.arange(TOKENS) >= torch.randint(0, 3, (n, 1))
    return [
        {"input_ids": ids, "labels": torch.where(mask, ids, -100)} for ids, mask in zip(words(n), answered, strict=True)
    ]


REFUSED = {"t5", "llama with adapters"}  # by a log of gradients: tables looked up once for all samples, or by hand
RATES = {"llama with adapters": 1e-3}  # few parameters, whose effects are small beside the rounding of float32 inside
Data = Callable[[int], list[dict[str, Tensor]]]
FAMILIES: dict[str, tuple[Callable[[], nn.Module], Data]] = {
    "bert": (bert, classified),
    "bert in eval mode": (as_from_pretrained, classified),
    "distilbert": (distilbert, classified),
    "roberta": (roberta, classified),
    "vit": (vit, images),
    "t5": (t5, translated),
    "opt": (opt, continued),
    "gemma": (gemma, continued),
    "gpt2": (gpt2, continued),
    "llama": (llama, continued),
    "llama with adapters": (adapted, continued),
}


class Model(L.LightningModule):
    def __init__(self, build: Callable[[], nn.Module], rate: float) -> None:
        super().__init__()
        self.rate = rate
        torch.manual_seed(1)
        self.model = build().double()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.rate)


def samples(make: Data) -> list[dict[str, Tensor]]:
    torch.manual_seed(2)
    return make(N + QUERIES)


def trained(name: str, without: int | None = None, callbacks: Sequence[L.Callback] = ()) -> Model:
    build, make = FAMILIES[name]
    module = Model(build, RATES.get(name, 1e-4))
    batches = [[i for i in range(start, start + BATCH) if i != without] for start in range(0, N, BATCH)]
    fit(module, DataLoader(samples(make)[:N], batch_sampler=batches), *callbacks, precision="64-true")  # type: ignore[arg-type]
    return module


def losses(name: str, module: Model) -> Tensor:
    module.eval()
    loader = DataLoader(samples(FAMILIES[name][1])[N:], 1)  # type: ignore[arg-type]
    with torch.no_grad():
        return torch.stack([module.training_step(batch, 0) for batch in loader])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_against_retraining(name: str, tmp_path: Path) -> None:
    plain = trained(name)
    before = losses(name, plain).mean()
    truth = torch.stack([losses(name, trained(name, z)).mean() - before for z in range(N)])
    for record in ("replay", "gradients"):
        log = tmp_path / record
        callback = InfluenceCallback(log, record=record)  # type: ignore[arg-type]
        if record == "gradients" and name in REFUSED:
            with pytest.raises(InfluenceError, match="record='replay'"):
                trained(name, callbacks=[callback])
            continue
        module = trained(name, callbacks=[callback])
        for p, q in zip(plain.parameters(), module.parameters(), strict=True):
            assert torch.equal(p, q), "the run ends where it ends without the callback"
        queries = DataLoader(samples(FAMILIES[name][1])[N:], QUERIES)  # type: ignore[arg-type]
        report = attribute(log, queries=queries, model=module, progress=False)
        scores = report.scores.double().mean(1)
        error = float((scores - truth).norm() / truth.norm())
        assert error <= (0.03 if record == "replay" else 0.1)


def test_dropout_is_drawn_again_as_it_was(tmp_path: Path) -> None:
    """The truth without a sample draws other masks, so scores are held against those of the same run from its log of gradients."""
    torch.manual_seed(0)
    FAMILIES["bert with dropout"] = lambda: bert(dropout=0.1), classified
    try:
        scores = []
        for record in ("replay", "gradients"):
            torch.manual_seed(0)
            module = trained("bert with dropout", callbacks=[InfluenceCallback(tmp_path / record, record=record)])  # type: ignore[arg-type]
            queries = DataLoader(samples(classified)[N:], QUERIES)  # type: ignore[arg-type]
            report = attribute(tmp_path / record, queries=queries, model=module, curvature="none", progress=False)
            scores.append(report.scores)
    finally:
        del FAMILIES["bert with dropout"]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-7)
