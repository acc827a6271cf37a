"""A training sample as a person would recognise it: an image, a text, or a few named numbers."""

from __future__ import annotations

import base64
import html
import io
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, Subset, TensorDataset

from lightning_influence.errors import ConfigurationError, LogError
from lightning_influence.run.batches import batch_size, example, leaves
from lightning_influence.run.data import TrainingData, set_up
from lightning_influence.run.lightning_names import is_a

Shown: TypeAlias = "str | Image.Image | Tensor | np.ndarray | Mapping[str, Any]"
Render: TypeAlias = "Callable[[Any], Shown]"
"""``render(sample) -> text | image | image tensor or array | mapping``, which becomes a small table."""


@dataclass(frozen=True)
class Size:
    """How much of a sample is shown: characters of a text, values of a table, the longest side of an image."""

    characters: int
    values: int
    side: int


CARD = Size(600, 12, 192)
FULL = Size(20_000, 100, 480)

_CRISP = 64  # an image up to this side keeps its pixels when it is enlarged
_INPUTS = ("input_ids", "image", "img", "pixel_values", "text", "x")
_LABELS = ("label", "labels", "target", "y")
_CHANNELS = (1, 3, 4)
_PNG = ("1", "I", "I;16", "L", "LA", "P", "RGB", "RGBA")


def indexed(data: Any) -> tuple[Any, int | None]:
    """What gives sample ``i`` as ``[i]``, and how many there are where that is known.

    Args:
        data: a dataset, or a loader or datamodule, whose training dataset it is then; a table (`pandas.DataFrame`) gives
            its rows. An iterable dataset has no indices: None.

    Raises:
        ConfigurationError: something else without indices.
    """
    try:
        dataset = TrainingData.of(data).dataset
    except LogError as error:
        raise ConfigurationError(str(error)) from error
    if dataset is None or isinstance(dataset, IterableDataset):
        return None, None
    known = hasattr(dataset, "__len__") and not isinstance(dataset, Mapping)  # a mapping's keys may be any ids
    return dataset.iloc if _is_pandas(dataset, "DataFrame") else dataset, len(dataset) if known else None


def query_examples(queries: Any, n_columns: int) -> tuple[Any, int | None]:
    """What gives the query of column ``i`` as ``[i]``, and how many there are where that is known.

    Args:
        queries: in any form that `attribute` takes, or a list of examples. A list is taken for one of batches where these hold
            as many examples as there are columns, and the list itself has another length or each of them holds one.

    Raises:
        ConfigurationError: none of these.
    """
    if is_a(queries, "LightningDataModule"):
        set_up(queries)
        queries = queries.val_dataloader()
    if not hasattr(queries, "__getitem__") and not hasattr(queries, "__iter__") and callable(queries):
        return query_examples(queries(), n_columns)
    if isinstance(queries, (list, tuple)) and (len(queries) != n_columns or all(map(_like_batch_of_one, queries))):
        examples = [_example(batch, i) for batch in queries if leaves(batch) for i in range(batch_size(batch))]
        queries = examples if len(examples) == n_columns else queries
    return indexed(queries)


def _like_batch_of_one(query: Any) -> bool:
    tensors = leaves(query)
    return len(tensors) > 0 and all(tensor.dim() > 0 and len(tensor) == 1 for tensor in tensors)


def _example(batch: Any, index: int) -> Any:
    """An example of a batch as its dataset gave it: without the dimension over which it was collated."""
    return apply_to_collection(example(batch, index), Tensor, lambda t: t[0] if t.dim() and t.shape[0] == 1 else t)


def training_samples(data: Any, sample_ids: Tensor) -> Any:
    """What gives the samples of a report, whose ids ascend; None where they cannot be read.

    Raises:
        ConfigurationError: `data` holds too few, or has no indices.
    """
    samples, n = indexed(data)
    if n is not None and len(sample_ids) and int(sample_ids[-1]) >= n:
        raise ConfigurationError(
            f"data has {n} samples, but sample {int(sample_ids[-1])} is in the report; give the training dataset of the run."
        )
    return samples


def default_render(tokenizer: Any = None) -> Render:
    """Images from image-like tensors, text from token ids where a tokenizer is given, otherwise the first values.

    A sample may be a tensor, an array, a text, a PIL image, a tuple whose first entry is the input and whose second is
    the label, or a mapping; a mapping without an input of a usual name, in itself or deeper, is a table row.

    Example:
        >>> render = default_render()
        >>> render((torch.tensor([1.5, 2.0]), 3))
        {'0': 1.5, '1': 2.0}
        >>> render({"text": "a note", "label": 1})
        'a note'
    """

    def render(sample: Any) -> Shown:
        content = _content(sample)
        if isinstance(content, (str, Image.Image, Mapping)):
            return content
        values = _tensor(content)
        if values is None:
            return str(content)
        if _is_image(values):
            return values
        ids = values.squeeze(0) if values.dim() == 2 else values  # a tokenizer may have returned (1, L)
        if tokenizer is not None and ids.dim() == 1 and not (ids.is_floating_point() or ids.is_complex()):
            return str(tokenizer.decode(ids.tolist()))
        return {str(i): v for i, v in enumerate(values.flatten().tolist())}

    return render


def like_token_ids(sample: Any) -> bool:
    """Whether a sample is a sequence of whole numbers, as a tokenizer makes them."""
    values = _tensor(_content(sample))
    if values is None or values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        return False
    return values.squeeze().dim() == 1


def label_of(sample: Any) -> str:
    """The label that comes with a sample, or nothing."""
    label = sample[1] if isinstance(sample, (tuple, list)) and len(sample) > 1 else None
    if isinstance(sample, Mapping) or _is_pandas(sample, "Series"):
        label = next((sample[k] for k in _LABELS if k in sample), None)
    if isinstance(label, (Tensor, np.ndarray, np.generic)):
        return str(label.item()) if math.prod(label.shape) == 1 else ""
    return (
        "" if label is None or (isinstance(label, (Sequence, Mapping)) and not isinstance(label, str)) else str(label)
    )


def labels_of(data: Any) -> list[str] | None:
    """The labels of a whole dataset where they are at hand without reading its samples; None otherwise.

    They are in a `TensorDataset`, in an attribute ``targets`` as torchvision's datasets have it, and in a `Subset` of
    these.

    Example:
        >>> labels_of(TensorDataset(torch.zeros(3, 2), torch.tensor([1, 0, 1])))
        ['1', '0', '1']
    """
    if isinstance(data, Subset):
        whole = labels_of(data.dataset)
        return None if whole is None else [whole[i] for i in data.indices]
    known = data.tensors[1] if isinstance(data, TensorDataset) and len(data.tensors) > 1 else None
    known = getattr(data, "targets", None) if known is None else known
    if known is None or not hasattr(known, "__len__") or isinstance(known, Mapping) or len(known) != len(data):
        return None
    values = known.tolist() if isinstance(known, (Tensor, np.ndarray)) else list(known)
    return None if any(isinstance(v, (list, Tensor)) for v in values) else [str(v) for v in values]


def as_html(shown: Shown, size: Size = CARD) -> str:
    """What `Render` gave, as a piece of a page that needs no other file.

    Raises:
        TypeError: it gave something else.
    """
    if isinstance(shown, str):
        return f"<pre>{html.escape(_cut(shown, size.characters))}</pre>"
    if isinstance(shown, Mapping):
        return _table(shown, size.values)
    if isinstance(shown, (Tensor, np.ndarray)):
        shown = as_image(shown)
    if not isinstance(shown, Image.Image):
        raise TypeError(
            f"render returned {type(shown).__name__}; it has to return text, a PIL image, an image tensor or a mapping"
        )
    return _image(shown, size.side)


def as_image(image: Tensor | np.ndarray) -> Image.Image:
    """An image tensor or array: bytes and numbers in [0, 1] as they are, others stretched.

    Args:
        image: ``(h, w)``, ``(c, h, w)`` or ``(h, w, c)`` of 1, 3 or 4 channels, the last being red, green, blue and alpha.

    Raises:
        TypeError: another shape, or values that are no numbers.
    """
    values = _tensor(image)
    if values is None or values.is_complex() or not (values.dim() == 2 or _channels_first(values) is not None):
        raise TypeError(
            f"render returned an image of shape {tuple(image.shape)} and {image.dtype}; an image has the shape (h, w), "
            "(c, h, w) or (h, w, c) with 1, 3 or 4 channels"
        )
    values = values.detach().cpu()
    if values.dtype != torch.uint8:
        values = values.float().nan_to_num()
        low, high = float(values.min()), float(values.max())
        if low < 0 or high > 1:
            values = (values - low) / max(high - low, 1e-12)
        values = (values * 255).round().to(torch.uint8)
    if _channels_first(values):
        values = values.permute(1, 2, 0)
    return Image.fromarray(values.squeeze(-1).numpy() if values.dim() == 3 else values.numpy())


def _content(sample: Any) -> Any:
    """The input of a sample."""
    if _is_pandas(sample, "Series"):
        sample = sample.to_dict()
    if isinstance(sample, Mapping):
        values = _flat(sample)
        inputs = (name for wanted in _INPUTS for name in values if _last(name) == wanted)
        key = next((name for name in inputs if not isinstance(values[name], (int, float, type(None)))), None)
        return values[key] if key is not None else {k: v for k, v in values.items() if _last(k) not in _LABELS}
    return _content(sample[0]) if isinstance(sample, (tuple, list)) and sample and not _numbers(sample) else sample


def _is_pandas(content: Any, kind: str) -> bool:
    """Whether it is a table or a row of one, which it cannot be where nobody has imported pandas."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(content, getattr(pandas, kind))


def _flat(values: Mapping[Any, Any], under: str = "") -> dict[str, Any]:
    """Nested mappings as one, with names like ``inputs.image``."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{under}{name}.") if isinstance(value, Mapping) else {f"{under}{name}": value}
    return flat


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _tensor(content: Any) -> Tensor | None:
    """Numbers of any container as a tensor; None where it holds something else."""
    if isinstance(content, Tensor):
        return content.to_dense()
    values = np.asarray(content) if _numbers(content) else content
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "biuf":
        return None
    # in the order and the bytes that torch takes
    return torch.from_numpy(values.astype(values.dtype.newbyteorder("="), order="C"))


def _numbers(content: Any) -> bool:
    return isinstance(content, (list, tuple)) and len(content) > 2 and all(isinstance(v, (int, float)) for v in content)


def _is_image(tensor: Tensor) -> bool:
    if tensor.is_complex():
        return False
    first = _channels_first(tensor)
    sides = (
        tensor.shape if tensor.dim() == 2 else () if first is None else tensor.shape[1:] if first else tensor.shape[:2]
    )
    return len(sides) == 2 and min(sides) > 3


def _channels_first(tensor: Tensor) -> bool | None:
    """Whether the channels of ``(c, h, w)`` or ``(h, w, c)`` come first; None where there are none."""
    if tensor.dim() != 3:
        return None
    first, last = tensor.shape[0], tensor.shape[2]
    if first in _CHANNELS and (last not in _CHANNELS or first <= last):
        return True
    return False if last in _CHANNELS else None


def _table(nested: Mapping[str, Any], most: int) -> str:
    values = _flat(nested)
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(_value(value))}</td></tr>"
        for name, value in list(values.items())[:most]
    )
    more = len(values) - most
    return f'<table class="features"><tbody>{rows}</tbody></table>' + (
        f'<p class="meta">and {more} more</p>' if more > 0 else ""
    )


def _value(value: Any) -> str:
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        value = value.item() if math.prod(value.shape) == 1 else f"shape {tuple(value.shape)}"
    return f"{value:.4g}" if isinstance(value, float) else _cut(str(value), 80)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[:length] + "…"


def _image(image: Image.Image, side: int) -> str:
    """Small ones exactly, larger ones as a thumbnail; inline in both cases."""
    crisp = max(image.size) <= _CRISP
    kind = "PNG" if crisp else "WEBP"
    if not crisp or image.mode not in _PNG:
        image = image.convert("RGBA" if "A" in image.getbands() else "RGB")
    if not crisp:
        image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, kind)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" class="{"crisp" if crisp else "photo"}" src="data:image/{kind.lower()};base64,{data}">'
