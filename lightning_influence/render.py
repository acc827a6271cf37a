"""A training sample as a person would recognise it: an image, a text, or a few numbers."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor

Render: TypeAlias = "Callable[[Any], str | Image.Image | Tensor]"
"""``render(sample) -> text | image | image tensor``."""

_CHARACTERS = 600  # of a text that is shown
_NUMBERS = 12  # of a row of features that are shown


def default_render(tokenizer: Any = None) -> Render:
    """Images from image-like tensors, text from token ids where a tokenizer is given, otherwise the first numbers.

    A sample may be a tensor, a tuple whose first entry is the input and whose second is the label, or a mapping.
    """

    def render(sample: Any) -> str | Image.Image | Tensor:
        content = _content(sample)
        if not isinstance(content, Tensor):
            return str(content)
        if _is_image(content):
            return content
        if tokenizer is not None and content.dim() == 1 and not content.is_floating_point():
            return str(tokenizer.decode(content.tolist()))
        shown = ", ".join(f"{v:.4g}" for v in content.flatten()[:_NUMBERS].tolist())
        return shown + (", …" if content.numel() > _NUMBERS else "")

    return render


def label_of(sample: Any) -> str:
    """The label that comes with a sample, or nothing."""
    label = sample[1] if isinstance(sample, (tuple, list)) and len(sample) > 1 else None
    if isinstance(sample, Mapping):
        label = next((sample[k] for k in ("label", "labels", "target") if k in sample), None)
    if isinstance(label, Tensor):
        return str(label.item()) if label.numel() == 1 else ""
    return "" if label is None else str(label)


def as_html(shown: str | Image.Image | Tensor) -> str:
    """What `Render` gave, as a piece of a page that needs no other file.

    Raises:
        TypeError: it gave something else.
    """
    if isinstance(shown, str):
        text = shown if len(shown) <= _CHARACTERS else shown[:_CHARACTERS] + "…"
        return f"<pre>{html.escape(text)}</pre>"
    if isinstance(shown, Tensor):
        shown = _picture(shown)
    if not isinstance(shown, Image.Image):
        raise TypeError(
            f"render returned {type(shown).__name__}; it has to return text, a PIL image or an image tensor"
        )
    buffer = io.BytesIO()
    shown.save(buffer, "PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _content(sample: Any) -> Any:
    if isinstance(sample, Mapping):
        key = next((k for k in ("input_ids", "image", "pixel_values", "text", "x") if k in sample), next(iter(sample)))
        return sample[key]
    return sample[0] if isinstance(sample, (tuple, list)) else sample


def _is_image(tensor: Tensor) -> bool:
    shape = tensor.shape
    return (len(shape) == 3 and shape[0] in (1, 3) and min(shape[1:]) > 3) or (len(shape) == 2 and min(shape) > 3)


def _picture(tensor: Tensor) -> Image.Image:
    """An image tensor ``(h, w)`` or ``(1 or 3, h, w)`` of any range."""
    values = tensor.detach().float().cpu()
    low, high = float(values.min()), float(values.max())
    scaled = ((values - low) / max(high - low, 1e-12) * 255).to(torch.uint8)
    if scaled.dim() == 3:
        scaled = scaled.permute(1, 2, 0) if scaled.shape[0] == 3 else scaled[0]
    return Image.fromarray(scaled.numpy())
