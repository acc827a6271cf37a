"""A training sample as a person would recognise it: an image, a text, or a few named numbers."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

Shown: TypeAlias = "str | Image.Image | Tensor | Mapping[str, Any]"
Render: TypeAlias = "Callable[[Any], Shown]"
"""``render(sample) -> text | image | image tensor | mapping``, which becomes a small table."""

_CHARACTERS = 600  # of a text that is shown
_VALUES = 12  # of a table that are shown
_SIDE = 192  # longest side of an image that is shown
_CRISP = 64  # an image up to this side keeps its pixels when it is enlarged
_INPUTS = ("input_ids", "image", "img", "pixel_values", "text", "x")
_LABELS = ("label", "labels", "target", "y")


def default_render(tokenizer: Any = None) -> Render:
    """Images from image-like tensors, text from token ids where a tokenizer is given, otherwise the first values.

    A sample may be a tensor, an array, a text, a PIL image, a tuple whose first entry is the input and whose second is
    the label, or a mapping; a mapping without an input of a usual name is a table row.
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
        if tokenizer is not None and values.dim() == 1 and not values.is_floating_point():
            return str(tokenizer.decode(values.tolist()))
        return {str(i): v for i, v in enumerate(values.flatten().tolist())}

    return render


def label_of(sample: Any) -> str:
    """The label that comes with a sample, or nothing."""
    label = sample[1] if isinstance(sample, (tuple, list)) and len(sample) > 1 else None
    if isinstance(sample, Mapping):
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
    """
    if isinstance(data, Subset):
        whole = labels_of(data.dataset)
        return None if whole is None else [whole[i] for i in data.indices]
    known = data.tensors[1] if isinstance(data, TensorDataset) and len(data.tensors) > 1 else None
    known = getattr(data, "targets", None) if known is None else known
    if known is None or len(known) != len(data):
        return None
    values = known.tolist() if isinstance(known, (Tensor, np.ndarray)) else list(known)
    return None if any(isinstance(v, (list, Tensor)) for v in values) else [str(v) for v in values]


def as_html(shown: Shown) -> str:
    """What `Render` gave, as a piece of a page that needs no other file.

    Raises:
        TypeError: it gave something else.
    """
    if isinstance(shown, str):
        return f"<pre>{html.escape(_cut(shown, _CHARACTERS))}</pre>"
    if isinstance(shown, Mapping):
        return _table(shown)
    if isinstance(shown, Tensor):
        shown = as_image(shown)
    if not isinstance(shown, Image.Image):
        raise TypeError(
            f"render returned {type(shown).__name__}; it has to return text, a PIL image, an image tensor or a mapping"
        )
    return _image(shown)


def as_image(tensor: Tensor) -> Image.Image:
    """An image tensor ``(h, w)`` or ``(1 or 3, h, w)``: bytes and numbers in [0, 1] as they are, others stretched."""
    values = tensor.detach().cpu()
    if values.dtype != torch.uint8:
        values = values.float().nan_to_num()
        low, high = float(values.min()), float(values.max())
        if low < 0 or high > 1:
            values = (values - low) / max(high - low, 1e-12)
        values = (values * 255).round().to(torch.uint8)
    if values.dim() == 3:
        values = values.permute(1, 2, 0) if values.shape[0] == 3 else values[0]
    return Image.fromarray(values.numpy())


def _content(sample: Any) -> Any:
    if isinstance(sample, Mapping):
        key = next((k for k in _INPUTS if not isinstance(sample.get(k), (int, float, type(None)))), None)
        return sample[key] if key is not None else {str(k): v for k, v in sample.items() if k not in _LABELS}
    return sample[0] if isinstance(sample, (tuple, list)) and not _numbers(sample) else sample


def _tensor(content: Any) -> Tensor | None:
    """Numbers of any container as a tensor; None where it holds something else."""
    if isinstance(content, Tensor):
        return content
    if isinstance(content, np.ndarray):
        return torch.from_numpy(content) if content.dtype.kind in "biuf" else None
    return torch.tensor(content) if _numbers(content) else None


def _numbers(content: Any) -> bool:
    return isinstance(content, (list, tuple)) and len(content) > 2 and all(isinstance(v, (int, float)) for v in content)


def _is_image(tensor: Tensor) -> bool:
    shape = tensor.shape
    return (len(shape) == 3 and shape[0] in (1, 3) and min(shape[1:]) > 3) or (len(shape) == 2 and min(shape) > 3)


def _table(values: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(str(name))}</th><td>{html.escape(_value(value))}</td></tr>"
        for name, value in list(values.items())[:_VALUES]
    )
    more = len(values) - _VALUES
    return f'<table class="features"><tbody>{rows}</tbody></table>' + (
        f'<p class="meta">and {more} more</p>' if more > 0 else ""
    )


def _value(value: Any) -> str:
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        value = value.item() if math.prod(value.shape) == 1 else f"shape {tuple(value.shape)}"
    return f"{value:.4g}" if isinstance(value, float) else _cut(str(value), 80)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[:length] + "…"


def _image(image: Image.Image) -> str:
    """Small ones exactly, larger ones as a thumbnail; inline in both cases."""
    crisp = max(image.size) <= _CRISP
    kind = "PNG" if crisp else "WEBP"
    if not crisp:
        image = image.convert("RGBA" if "A" in image.getbands() else "RGB")
        image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    image.save(buffer, kind)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" class="{"crisp" if crisp else "photo"}" src="data:image/{kind.lower()};base64,{data}">'
