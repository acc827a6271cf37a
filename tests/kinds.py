"""Modules as people write them, small: each a kind that a way of recording has to get right, or to refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import lightning as L
import torch
import torchmetrics
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset, default_collate

N, BATCH, QUERIES, TOKENS, WORDS = 12, 4, 3, 5, 7
Samples = list[Any]


def points(n: int) -> Samples:
    return list(zip(torch.randn(n, 6, dtype=torch.float64), torch.randint(0, 3, (n,)), strict=True))


def texts(n: int) -> Samples:
    return list(zip(torch.randint(0, WORDS, (n, TOKENS)), torch.randint(0, 3, (n,)), strict=True))


class Base(L.LightningModule):
    """A classifier in small, right in both ways of recording.

    Attributes:
        refused: ways of recording that may be refused, at the start of fit or at its first step.
        refused_later: whether they may be refused when the run comes to what could not be known before.
        options: of the callback.
        trainer_options: of the trainer.
        needs_data: whether batches are not stored, because they are not made of tensors.
        batches: indices of the samples.
    """

    refused: ClassVar[Sequence[str]] = ()
    refused_later: ClassVar[bool] = False
    options: ClassVar[dict[str, Any]] = {}
    trainer_options: ClassVar[dict[str, Any]] = {}
    needs_data: ClassVar[bool] = False
    batches: ClassVar[list[list[int]]] = [list(range(start, start + BATCH)) for start in range(0, N, BATCH)]
    samples: Callable[[int], Samples] = staticmethod(points)
    collate: Callable[[Samples], Any] = staticmethod(default_collate)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.build()
        self.double()

    def build(self) -> None:
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Any) -> Tensor:
        return self.head(F.gelu(self.body(x)))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-4)

    @staticmethod
    def callbacks() -> list[L.Callback]:
        return []

    @classmethod
    def loader(cls, samples: Samples, without: int | None) -> Any:
        batches = [[i for i in batch if i != without] for batch in cls.batches]
        return DataLoader(samples, batch_sampler=batches, collate_fn=cls.collate)  # type: ignore[arg-type]


KINDS: list[type[Base]] = [Base]


def kind(cls: type[Base]) -> type[Base]:
    KINDS.append(cls)
    return cls


GRADIENTS, BOTH = ("gradients",), ("gradients", "replay")

# -- layers ------------------------------------------------------------------------------------------------


class Texts(Base):
    samples = staticmethod(texts)

    def build(self) -> None:
        self.words, self.body, self.head = nn.Embedding(WORDS, 8), self.layer(), nn.Linear(8, 3)

    def layer(self) -> nn.Module:
        return nn.Linear(8, 8)

    def encode(self, words: Tensor) -> Tensor:
        return self.body(words)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encode(self.words(x)).mean(1))


@kind
class Lstm(Texts):
    def layer(self) -> nn.Module:
        return nn.LSTM(8, 8, batch_first=True)

    def encode(self, words: Tensor) -> Tensor:
        return self.body(words)[0]


@kind
class PackedGru(Texts):
    """Sequences of several lengths, packed."""

    refused = GRADIENTS

    def layer(self) -> nn.Module:
        return nn.GRU(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.words(x), 1 + x[:, 0] % TOKENS, batch_first=True, enforce_sorted=False)
        return self.head(self.body(packed)[1][0])


@kind
class LearnedState(Lstm):
    """The state before the first word is a parameter, given as ``(1, n, d)``."""

    refused = GRADIENTS

    def build(self) -> None:
        super().build()
        self.start = nn.ParameterList([nn.Parameter(torch.randn(1, 1, 8)) for _ in range(2)])

    def encode(self, words: Tensor) -> Tensor:
        state = tuple(p.expand(1, len(words), 8).contiguous() for p in self.start)
        return self.body(words, state)[0]


@kind
class StateOfSamples(Lstm):
    """The state before the first word comes from the sample, as ``(1, n, d)``."""

    def encode(self, words: Tensor) -> Tensor:
        state = words.mean(1)[None]
        return self.body(words, (state, torch.zeros_like(state)))[0]


@kind
class Causal(Texts):
    """A mask over positions is handed to the layer."""

    def layer(self) -> nn.Module:
        return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def encode(self, words: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(words.shape[1], dtype=words.dtype)
        return self.body(words, src_mask=mask, is_causal=True)


@kind
class CausalSquare(Causal):
    """As many positions as samples."""

    @staticmethod
    def samples(n: int) -> Samples:
        return [(x[:BATCH], y) for x, y in texts(n)]


@kind
class BatchSecond(Causal):
    """Attention with the batch in the second dimension, as is the default."""

    refused = GRADIENTS

    def layer(self) -> nn.Module:
        return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)

    def encode(self, words: Tensor) -> Tensor:
        return self.body(words.transpose(0, 1)).transpose(0, 1)


@kind
class EncoderDecoder(Texts):
    def layer(self) -> nn.Module:
        return nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True)

    def encode(self, words: Tensor) -> Tensor:
        return self.body(words, words.flip(1))


@kind
class Bag(Texts):
    def build(self) -> None:
        self.words, self.head = nn.EmbeddingBag(WORDS, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.words(x)))


@kind
class BagWithOffsets(Bag):
    """The words of all samples in one row, and where each sample begins."""

    refused = GRADIENTS

    @staticmethod
    def collate(samples: Samples) -> Any:
        texts = [x[: 1 + int(x[0]) % TOKENS] for x, _ in samples]
        starts = torch.tensor([0, *(len(t) for t in texts)]).cumsum(0)[:-1]
        return torch.stack([y for _, y in samples]), torch.cat(texts), starts

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.head(F.gelu(self.words(batch[1], batch[2]))), batch[0])


@kind
class WeightNorm(Base):
    refused = GRADIENTS

    def build(self) -> None:
        super().build()
        self.body = weight_norm(self.body)


@kind
class OldWeightNorm(Base):
    """The weight is computed before the layer's forward, by a hook."""

    refused = GRADIENTS

    def build(self) -> None:
        super().build()
        self.body = nn.utils.weight_norm(self.body)


@kind
class SpectralNorm(Base):
    refused = GRADIENTS

    def build(self) -> None:
        super().build()
        self.body = spectral_norm(self.body)


@kind
class Tied(Texts):
    """One table looks words up and scores them."""

    samples = staticmethod(lambda n: [(x, x[0]) for x, _ in texts(n)])

    def build(self) -> None:
        super().build()
        self.head = nn.Linear(8, WORDS, bias=False)
        self.head.weight = self.words.weight


class Convolved(Base):
    def build(self) -> None:
        self.body, self.norm, self.head = nn.Conv1d(1, 4, 3), self.layer(), nn.Linear(4, 3)

    def layer(self) -> nn.Module:
        return nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.norm(self.body(x[:, None])) + x[:, None, :4]).mean(2))


@kind
class GroupNorm(Convolved):
    pass


@kind
class InstanceNorm(Convolved):
    def layer(self) -> nn.Module:
        return nn.InstanceNorm1d(4, affine=True)


@kind
class BatchNormInEvalMode(Convolved):
    def layer(self) -> nn.Module:
        norm = nn.BatchNorm1d(4)
        norm.running_mean += 0.2
        return norm.eval()

    def on_train_epoch_start(self) -> None:
        self.norm.eval()


@kind
class FrozenBatchNorm(Convolved):
    options: ClassVar[dict[str, Any]] = {"frozen_batch_norm": True}

    def layer(self) -> nn.Module:
        return nn.BatchNorm1d(4)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.norm.eval()  # so that the run without the callback is the same


@kind
class Complex(Base):
    """A parameter of complex numbers."""

    refused = BOTH

    def build(self) -> None:
        super().build()
        self.filter = nn.Parameter(torch.randn(4, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.fft.irfft(torch.fft.rfft(x) * self.filter, 6))


@kind
class Sparse(Texts):
    """An embedding with sparse gradients, which AdamW does not take and SGD does."""

    refused = BOTH

    def build(self) -> None:
        super().build()
        self.words = nn.Embedding(WORDS, 8, sparse=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


# -- parameters --------------------------------------------------------------------------------------------


@kind
class Lists(Base):
    """Parameters of the module itself, in lists and by name."""

    refused = GRADIENTS

    def build(self) -> None:
        self.weights = nn.ParameterList([nn.Parameter(0.3 * torch.randn(6, 8)), nn.Parameter(0.3 * torch.randn(8, 3))])
        self.shifts = nn.ParameterDict({"hidden": nn.Parameter(torch.zeros(8))})

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(torch.einsum("nd,dh->nh", x, self.weights[0]) + self.shifts["hidden"])
        return torch.einsum("nh,hc->nc", hidden, self.weights[1])


@kind
class Hypernetwork(Base):
    """A submodule returns the weight of another."""

    refused = GRADIENTS

    class Weight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Parameter(0.3 * torch.randn(8, 6))

        def forward(self) -> Tensor:
            return self.value.tanh()

    def build(self) -> None:
        super().build()
        self.body = self.Weight()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(F.linear(x, self.body())))


@kind
class Domain(Base):
    """A row that all samples share is put beside each of them."""

    refused = GRADIENTS

    def build(self) -> None:
        self.domain, self.body, self.head = nn.Embedding(2, 3), nn.Linear(9, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        shared = self.domain(torch.zeros(1, dtype=torch.int64))
        return super().forward(torch.cat([x, shared.expand(len(x), -1)], 1))


@kind
class Orphan(Base):
    """The optimizer moves a parameter that no module owns."""

    refused = BOTH

    def build(self) -> None:
        super().build()
        self.kept = [nn.Parameter(torch.ones(3, dtype=torch.float64))]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.kept[0]

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([*self.parameters(), *self.kept], lr=1e-4)


@kind
class Gate(Base):
    """A layer that comes into use at the second epoch."""

    def build(self) -> None:
        super().build()
        self.late = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (self.late(x) if self.current_epoch > 0 or not self.training else 0.0)


# -- samples that see each other ---------------------------------------------------------------------------


@kind
class Graph(Base):
    """A graph over the batch, made by the collate function."""

    refused = GRADIENTS

    @staticmethod
    def collate(samples: Samples) -> Any:
        x, y = default_collate(samples)
        return x, y, torch.exp(-torch.cdist(x, x))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[2] @ batch[0] / len(batch[0])), batch[1])


@kind
class Mixup(Base):
    refused = GRADIENTS

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        other = torch.randperm(len(x), generator=torch.Generator().manual_seed(batch_idx))
        mixed = self(0.7 * x + 0.3 * x[other])
        return 0.7 * F.cross_entropy(mixed, y) + 0.3 * F.cross_entropy(mixed, y[other])


@kind
class Siamese(Base):
    """The same layers twice."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        one, other = self(batch[0]), self(batch[0].flip(1))
        return F.cross_entropy(one, batch[1]) + (one - other).square().mean()


@kind
class Triplets(Base):
    """Every other row is compared with its neighbour."""

    refused = GRADIENTS

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        z = self(batch[0])
        return F.triplet_margin_loss(z, z.roll(1, 0), z.roll(2, 0)) + F.cross_entropy(z, batch[1])


@kind
class ContrastiveLater(Base):
    """From the second epoch on, samples are told from each other."""

    refused = GRADIENTS
    refused_later = True

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        z = self(batch[0])
        loss = F.cross_entropy(z, batch[1])
        if self.current_epoch > 0 and self.training:
            loss = loss + F.cross_entropy(z @ self(batch[0] + 0.1).T, torch.arange(len(z)))
        return loss


@kind
class PermutedInside(Base):
    """Rows are put in another order inside the training step."""

    refused = GRADIENTS

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        order = batch[0][:, 0].argsort()
        return F.cross_entropy(self(batch[0][order]), batch[1][order])


# -- batches -----------------------------------------------------------------------------------------------


@kind
class Named(Base):
    """A batch by name, with strings and numbers in it."""

    @staticmethod
    def samples(n: int) -> Samples:
        return [{"name": f"sample {i}", "x": x, "y": y, "year": 1990 + i} for i, (x, y) in enumerate(points(n))]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        assert len(batch["name"]) == len(batch["x"])
        return F.cross_entropy(self(batch["x"]), batch["y"])


@kind
class PythonLists(Base):
    """Labels are a list of Python's numbers."""

    @staticmethod
    def collate(samples: Samples) -> Any:
        return {"x": torch.stack([x for x, _ in samples]), "y": [int(y) for _, y in samples]}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch["x"]), torch.tensor(batch["y"]))


@kind
class Arrays(Base):
    """Arrays of NumPy and lists of lists beside tensors."""

    @staticmethod
    def collate(samples: Samples) -> Any:
        x, y = default_collate(samples)
        return {"x": x.numpy(), "y": y, "boxes": [[float(v) for v in row[:2]] for row in x], "mask": None}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, boxes = torch.as_tensor(batch["x"]), torch.tensor(batch["boxes"], dtype=torch.float64)
        return F.cross_entropy(self(x) + 0.1 * boxes[:, :1], batch["y"])


@dataclass
class Data:
    """As libraries for graphs and boxes have them."""

    x: Any
    y: Tensor


class Joined:
    """An object that nobody else can take apart."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.content = {"x": x, "y": y}


@kind
class DataClasses(Base):
    """A batch is a dataclass."""

    needs_data = True

    @staticmethod
    def collate(samples: Samples) -> Any:
        return Data(*default_collate(samples))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch.x), batch.y)


@kind
class Objects(Base):
    """A batch is an object of a class of its own."""

    refused = GRADIENTS
    needs_data = True

    @staticmethod
    def collate(samples: Samples) -> Any:
        return Joined(*default_collate(samples))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch.content["x"]), batch.content["y"])


@kind
class MadeInside(Base):
    """The step makes tensors of the default type, which a trainer in double precision sets, and draws such numbers."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        noise = 0.1 * torch.rand(6, generator=torch.Generator().manual_seed(batch_idx)) if self.training else 0.0
        return F.cross_entropy(self((batch[0] + noise) @ torch.eye(6)), batch[1])


@kind
class Ragged(Base):
    """A batch is a list of tensors, one a sample."""

    @staticmethod
    def collate(samples: Samples) -> Any:
        return [x[: 3 + int(y)] for x, y in samples], torch.stack([y for _, y in samples])

    @staticmethod
    def samples(n: int) -> Samples:
        return [(x.clone(), y) for x, y in points(n)]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(torch.stack([F.pad(x, (0, 6 - len(x))) for x in batch[0]])), batch[1])


@kind
class Dropped(Base):
    """The collate function leaves samples out."""

    @staticmethod
    def collate(samples: Samples) -> Any:
        return default_collate([s for s in samples if s[0][0] > -1.0] or samples)


@kind
class Windows(Base):
    """The collate function makes two rows of every sample."""

    @staticmethod
    def collate(samples: Samples) -> Any:
        x, y = default_collate(samples)
        return torch.cat([x, -x]), torch.cat([y, y])


@kind
class SummedWindows(Windows):
    """And their losses are summed."""

    options: ClassVar[dict[str, Any]] = {"reduction": "sum"}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1], reduction="sum")


@kind
class Nodes(Base):
    """Graphs of several sizes, joined into one whose rows are nodes."""

    refused = GRADIENTS

    @staticmethod
    def samples(n: int) -> Samples:
        edges = torch.tensor([[0, 1], [1, 0]])
        return [(torch.randn(2 + i % 3, 6, dtype=torch.float64), edges, y) for i, (_, y) in enumerate(points(n))]

    @staticmethod
    def collate(samples: Samples) -> Any:
        sizes = torch.tensor([len(x) for x, *_ in samples])
        starts = sizes.cumsum(0) - sizes
        return {
            "x": torch.cat([x for x, *_ in samples]),
            "edges": torch.cat([edges + start for (_, edges, _), start in zip(samples, starts, strict=True)], 1),
            "graph": torch.arange(len(samples)).repeat_interleave(sizes),
            "y": torch.stack([y for *_, y in samples]),
        }

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, (source, end) = self.body(batch["x"]), batch["edges"]
        hidden = F.gelu(x.index_add(0, end, x[source]))
        pooled = hidden.new_zeros(len(batch["y"]), 8).index_add(0, batch["graph"], hidden)
        return F.cross_entropy(self.head(pooled), batch["y"])


@kind
class TwoRowsEach(Base):
    """The collate function makes two rows of every sample, one after the other."""

    @staticmethod
    def collate(samples: Samples) -> Any:
        x, y = default_collate(samples)
        return torch.stack([x, -x], 1).flatten(0, 1), y.repeat_interleave(2)


@kind
class Combined(Base):
    """Two loaders; a step reads both."""

    refused = BOTH

    @classmethod
    def loader(cls, samples: Samples, without: int | None) -> Any:
        return CombinedLoader({"a": super().loader(samples, without), "b": super().loader(samples, None)}, "min_size")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        a, b = (batch["a"], batch["b"]) if isinstance(batch, dict) else (batch, batch)
        return F.cross_entropy(self(a[0]), a[1]) + 0.1 * F.cross_entropy(self(b[0]), b[1])


class Point(NamedTuple):
    x: Tensor
    y: Tensor


@kind
class NamedTuples(Base):
    """A batch is a named tuple."""

    @staticmethod
    def collate(samples: Samples) -> Any:
        return Point(*default_collate(samples))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch.x), batch.y)


@kind
class Padded(Texts):
    """Texts of several lengths, whose mean is taken over the padding, too."""

    refused = GRADIENTS

    @staticmethod
    def samples(n: int) -> Samples:
        found = texts(n)
        lengths = [2 + i % 4 if i < N else TOKENS for i in range(n)]
        return [(x[:length], y) for length, (x, y) in zip(lengths, found, strict=True)]

    @staticmethod
    def collate(samples: Samples) -> Any:
        return pad_sequence([x for x, _ in samples], batch_first=True), torch.stack([y for _, y in samples])


@kind
class PackedTags(Padded):
    """A label for every word; what is unpacked is as long as the longest text that is left."""

    @staticmethod
    def samples(n: int) -> Samples:
        return [(x, x % 3) for x, _ in Padded.samples(n)]

    @staticmethod
    def collate(samples: Samples) -> Any:
        words, tags = ([s[i] for s in samples] for i in range(2))
        lengths = torch.tensor([len(x) for x in words])
        padded = pad_sequence(tags, batch_first=True, padding_value=-100)
        return pad_sequence(words, batch_first=True), padded, lengths

    def layer(self) -> nn.Module:
        return nn.GRU(8, 8, batch_first=True)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        packed = pack_padded_sequence(self.words(batch[0]), batch[2], batch_first=True, enforce_sorted=False)
        hidden, _ = pad_packed_sequence(self.body(packed)[0], batch_first=True)
        return F.cross_entropy(self.head(hidden).flatten(0, 1), batch[1].flatten())


@kind
class Boxes(Base):
    """Targets of several lengths, as detectors have them; the last layers run sample by sample."""

    refused = GRADIENTS

    @staticmethod
    def samples(n: int) -> Samples:
        return [(x, {"boxes": torch.randn(1 + i % 3, 3), "label": y}) for i, (x, y) in enumerate(points(n))]

    @staticmethod
    def collate(samples: Samples) -> Any:
        return tuple(zip(*samples, strict=True))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        hidden, total = self.body(torch.stack(batch[0])), 0.0
        for row, target in zip(hidden, batch[1], strict=True):
            found = self.head(row)
            total += F.cross_entropy(found, target["label"]) + F.l1_loss(
                found.expand(target["boxes"].shape), target["boxes"]
            )
        return total / len(hidden)


class Stream(IterableDataset[Any]):
    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Any]:
        return iter(self.samples)


@kind
class Streamed(Base):
    """An iterable dataset that says which samples it gives."""

    options: ClassVar[dict[str, Any]] = {"sample_ids": "id"}
    trainer_options: ClassVar[dict[str, Any]] = {"max_epochs": 1}
    batches: ClassVar[list[list[int]]] = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]

    @staticmethod
    def samples(n: int) -> Samples:
        return [{"id": i, "x": x, "y": y} for i, (x, y) in enumerate(points(n))]

    @classmethod
    def loader(cls, samples: Samples, without: int | None) -> Any:
        whole = [[samples[i] for i in batch if i != without] for batch in cls.batches]
        return DataLoader(Stream([default_collate(batch) for batch in whole]), batch_size=None)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch["x"]), batch["y"])


@kind
class Again(Base):
    """Samples drawn with replacement, some twice in a batch."""

    batches: ClassVar[list[list[int]]] = [[0, 1, 1, 2], [3, 4, 5, 1], [6, 6, 6, 7], [8, 9, 10, 11]]


@kind
class ChangedInPlace(Base):
    """The training step writes into its batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        batch[0].mul_(0.5).add_(0.1)
        return F.cross_entropy(self(batch[0]), batch[1])


# -- losses ------------------------------------------------------------------------------------------------


@kind
class SoftTargets(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), 0.8 * F.one_hot(batch[1], 3) + 0.2 / 3)


@kind
class PosWeight(Base):
    def build(self) -> None:
        super().build()
        self.loss = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 3.0, 0.5]))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(self(batch[0]), F.one_hot(batch[1], 3).double())


@kind
class Smoothed(Base):
    def build(self) -> None:
        super().build()
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.1, weight=torch.tensor([1.0, 3.0, 0.5]))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(self(batch[0]), batch[1])


@kind
class Ctc(Texts):
    """A loss that can be differentiated once only."""

    samples = staticmethod(lambda n: [(x, 1 + x[:2] % 2) for x, _ in texts(n)])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.body(self.words(x))))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        n = len(batch[0])
        lengths = torch.full((n,), TOKENS), torch.full((n,), 2)
        return F.ctc_loss(self(batch[0]).log_softmax(2).transpose(0, 1), batch[1], *lengths, zero_infinity=True)


@kind
class Sum(Base):
    """A sum that nobody said is one."""

    refused = GRADIENTS

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.mse_loss(self(batch[0]), F.one_hot(batch[1], 3).double(), reduction="sum")


@kind
class SaidSum(Sum):
    refused = ()
    options: ClassVar[dict[str, Any]] = {"reduction": "sum"}


@kind
class Tokens(Texts):
    """A mean over the words that are not ignored."""

    samples = staticmethod(lambda n: [(x, torch.where(x.flip(0) < 2, -100, x.flip(0))) for x, _ in texts(n)])

    def build(self) -> None:
        super().build()
        self.head = nn.Linear(8, WORDS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.body(self.words(x))))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten())


@kind
class TokensByClass(Tokens):
    """The same with the classes in the second dimension."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]).transpose(1, 2), batch[1])


@kind
class Shifted(Tokens):
    """The next word is predicted."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0])[:, :-1].flatten(0, 1), batch[1][:, 1:].flatten())


@kind
class ByHand(Base):
    """A sum that is divided by the number of samples."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1], reduction="sum") / len(batch[0])


@kind
class ByNumber(Base):
    """A sum that is divided by a number of its own."""

    refused = GRADIENTS

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1], reduction="sum") / BATCH


@kind
class MaskedMean(Tokens):
    """A mean over words, made by hand."""

    refused = GRADIENTS

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        each = F.cross_entropy(self(batch[0]).transpose(1, 2), batch[1], reduction="none")
        kept = batch[1] != -100
        return (each * kept).sum() / kept.sum()


@kind
class SaidWeights(MaskedMean):
    """The same, and how much every sample weighs is said."""

    refused = ()
    options: ClassVar[dict[str, Any]] = {"sample_weights": lambda batch: (batch[1] != -100).sum(1)}


@kind
class Penalty(Base):
    """A penalty on the weights, written into the loss."""

    refused = GRADIENTS

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) + 1e-2 * sum(p.square().sum() for p in self.parameters())


@kind
class PseudoLabels(Base):
    """What the module predicts is its own target, behind a stop of the gradient."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(batch[0])
        with torch.no_grad():
            target = self(batch[0] + 0.1).softmax(1)
        return F.cross_entropy(logits, batch[1]) + F.cross_entropy(logits, target) + 0 * logits.detach().sum()


@kind
class Outputs(Base):
    """The loss is one of several things that are returned."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, prog_bar=True)
        return {"loss": loss, "logits": self(batch[0]).detach()}


# -- what else a step reads --------------------------------------------------------------------------------


@kind
class Teacher(Base):
    """A slow copy of the module, moved after every batch, is followed."""

    refused = BOTH

    def build(self) -> None:
        super().build()
        self.slow = nn.Linear(6, 3).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(batch[0])
        return F.cross_entropy(logits, batch[1]) + (logits - self.slow(batch[0])).square().mean()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.slow.weight.data.mul_(0.9).add_(0.1 * (self.head.weight @ self.body.weight).detach())


@kind
class ByEpoch(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        scale = 1.0 + self.current_epoch + 0.1 * self.global_step + 0.2 * batch_idx
        return F.cross_entropy(self(batch[0]), batch[1]) * (scale if self.training else 1.0)


@kind
class ByTrainer(Base):
    """The step reads its trainer: the length of the run, the rate of its optimizer, its logger."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 6)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if not self.training:
            return loss
        trainer, rate = self.trainer, self.optimizers().param_groups[0]["lr"]
        self.log("rate", self.lr_schedulers().get_last_lr()[0])
        if self.logger is not None:
            self.logger.experiment.add_scalar("loss", loss, self.global_step)
        done = trainer.global_step / trainer.estimated_stepping_batches + trainer.current_epoch / trainer.max_epochs
        return loss * (1 + done + batch_idx / trainer.num_training_batches + 1e4 * rate)


@kind
class Counter(Base):
    """The module counts its own steps."""

    def build(self) -> None:
        super().build()
        self.count = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.training:
            self.count += 1
        return F.cross_entropy(self(batch[0]), batch[1]) * (1.0 + 0.1 * self.count if self.training else 1.0)


@kind
class AnnealedInDict(Base):
    """A hook sets the weight of a term, which is kept in a dict."""

    def build(self) -> None:
        super().build()
        self.weights = {"square": 0.0}

    def on_train_epoch_start(self) -> None:
        self.weights["square"] = 0.1 + self.current_epoch

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(batch[0])
        term = self.weights["square"] * logits.square().mean() if self.training else 0.0
        return F.cross_entropy(logits, batch[1]) + term


@kind
class Queue(Base):
    """What was seen before is kept in a buffer, and looked at."""

    refused = BOTH

    def build(self) -> None:
        super().build()
        self.register_buffer("queue", torch.ones(6, 3, dtype=torch.float64))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(batch[0])
        loss = F.cross_entropy(logits, batch[1]) + 0.1 * (logits @ self.queue.T).logsumexp(1).mean()
        if self.training:
            self.queue = torch.cat([logits.detach(), self.queue])[:6]
        return loss


@kind
class CountingBuffer(Base):
    """The module counts its own steps in a buffer."""

    def build(self) -> None:
        super().build()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.training:
            self.count += 1
        return F.cross_entropy(self(batch[0]), batch[1]) * (1.0 + 0.1 * self.count if self.training else 1.0)


@kind
class Metrics(Base):
    """Metrics are kept while training."""

    def build(self) -> None:
        super().build()
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        return F.cross_entropy(logits, batch[1])

    def on_train_epoch_end(self) -> None:
        seen = sum(len(batch) for batch in self.batches)
        counted = int(self.accuracy.tp.sum() + self.accuracy.fn.sum())
        assert counted in (seen, seen - 1), f"a metric saw {counted} samples of {seen}"


@kind
class Reentrant(Base):
    refused = BOTH

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(lambda z: F.gelu(self.body(z)), x.requires_grad_(), use_reentrant=True)
        return self.head(hidden)


@kind
class Checkpointed(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(lambda z: F.gelu(self.body(z)), x, use_reentrant=False))


@kind
class Compiled(Base):
    refused = BOTH

    def build(self) -> None:
        super().build()
        self.body = torch.compile(self.body, backend="eager")


# -- what counts as a step ---------------------------------------------------------------------------------


@kind
class Accumulated(Base):
    trainer_options: ClassVar[dict[str, Any]] = {"accumulate_grad_batches": 2}
    batches: ClassVar[list[list[int]]] = [[0, 1, 2, 3], [4, 5], [6, 7, 8], [9, 10, 11], [0, 5, 7]]


@kind
class EverySecond(Base):
    """The optimizer steps on every second batch."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx % 2 == 1:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


@kind
class WarmUp(Base):
    """The learning rate is set in the step of the optimizer."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 1e-4 * min(1.0, (self.global_step + 1) / 4)
        optimizer.step(closure=optimizer_closure)


@kind
class NeverZeroed(Base):
    """Gradients go on from one step to the next."""

    refused = BOTH

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        for p in self.parameters():
            if p.grad is not None:
                p.grad.mul_(0.5)


@kind
class ZeroedInPlace(Base):
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)


@kind
class Clipped(Base):
    trainer_options: ClassVar[dict[str, Any]] = {"gradient_clip_val": 0.3}


@kind
class OwnClipping(Base):
    refused = BOTH

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        nn.utils.clip_grad_value_(self.parameters(), 0.02)


@kind
class OwnClippingOfNorm(Base):
    refused = BOTH

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.3, gradient_clip_algorithm="norm")


@kind
class ChangedBeforeStep(Base):
    refused = BOTH

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for p in self.body.parameters():
            p.grad = p.grad * 0.1


class Halves(L.Callback):
    def __init__(self, hook: str) -> None:
        setattr(self, hook, self.halve)

    def halve(self, trainer: Any, module: Any, *_: Any) -> None:
        for p in module.body.parameters():
            p.grad.mul_(0.5)


@kind
class ChangedByCallback(Base):
    """A callback changes gradients before they are clipped."""

    refused = BOTH

    @staticmethod
    def callbacks() -> list[L.Callback]:
        return [Halves("on_before_optimizer_step")]


@kind
class ChangedByCallbackAfterBackward(Base):
    refused = BOTH

    @staticmethod
    def callbacks() -> list[L.Callback]:
        return [Halves("on_after_backward")]


@kind
class HookOnGradient(Base):
    """A hook on a parameter changes its gradient."""

    refused = BOTH

    def build(self) -> None:
        super().build()
        self.body.weight.register_hook(lambda g: 0.1 * g)


class Thaw(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.body)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.body, optimizer, lr=1e-4)


@kind
class Thawed(Base):
    """A layer begins to train at the second epoch."""

    refused = GRADIENTS
    refused_later = True

    @staticmethod
    def callbacks() -> list[L.Callback]:
        return [Thaw()]


@kind
class FrozenLater(Base):
    """A layer stops training at the second epoch."""

    def on_train_epoch_start(self) -> None:
        self.body.requires_grad_(self.current_epoch == 0)


@kind
class Skipped(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx == 1 and self.training else super().training_step(batch, batch_idx)


@kind
class Decoupled(Base):
    """The optimizer's closure is called by hand."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
