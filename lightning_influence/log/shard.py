"""A file of tensors that says their checksums: a shard of a store, or a file on its own.

In a store the index holds the checksum of a shard's header. A file on its own holds it in the header itself, reckoned
with zeros in its place; it is then *sealed*. Either way every byte is covered: the header by its checksum, the rest by
those of the tensors, which the header holds.
"""

from __future__ import annotations

import json
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_influence.errors import InfluenceError

MAX_HEADER = 2**27
UNDECODABLE = (  # what JSON, safetensors and torch say of content that a writer never wrote
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    SafetensorError,
    TypeError,
    ValueError,
)

_META, _SUMS, _SEAL = "meta", "crc32", "header"
_SEALED = re.compile(rb'(?<="%s":")[0-9a-f]{8}(?=")' % _SEAL.encode())  # quotes inside of a text are escaped
_OPEN = b"0" * 8
_ALIGNED = 8  # bytes, of the tensors in a file
_DTYPES = {  # as safetensors calls them
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def serialise(tensors: Mapping[str, Tensor], meta: dict[str, Any], **more: str) -> list[bytes | memoryview]:
    """A file of tensors with their checksums, and what is told of them: its header, and the tensors where they lie.

    Args:
        more: further entries of the file's own metadata.

    Raises:
        TypeError: JSON cannot hold `meta`, or safetensors a tensor's type.
    """
    # the widest come first, so that each begins at a multiple of its size
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    parts = {name: bytes_of(tensor) for name, tensor in ordered}
    sums = {name: zlib.crc32(parts[name]) for name in tensors}  # in the order given, in which names are read back
    header: dict[str, Any] = {"__metadata__": {_META: json.dumps(meta), _SUMS: json.dumps(sums), **more}}
    start = 0
    for name, tensor in ordered:
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name} is {tensor.dtype}, which is no type of a safetensors file")
        stop = start + len(parts[name])
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    return [struct.pack("<Q", len(text)) + text, *parts.values()]


def sealed(tensors: Mapping[str, Tensor], meta: dict[str, Any], **more: str) -> bytes:
    """`serialise` for a file on its own, in one piece: its header holds the header's checksum."""
    header, *parts = serialise(tensors, meta, **more, **{_SEAL: _OPEN.decode()})
    return b"".join([_SEALED.sub(b"%08x" % zlib.crc32(header), header, count=1), *parts])


def is_sealed(header: bytes) -> bool:
    """Whether a header is one that `sealed` wrote."""
    seals = _SEALED.findall(header)
    return len(seals) == 1 and seals[0] == b"%08x" % zlib.crc32(_SEALED.sub(_OPEN, header))


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, as they lie in memory."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def header_size(data: bytes) -> int:
    """Bytes of a file's header, its own length included."""
    (length,) = struct.unpack("<Q", data[:8])
    return 8 + int(length)


class Shard:
    """A file of tensors, read one at a time, each compared with its checksum.

    Args:
        fault: says of the header's bytes and the file's size why they are not those that were written, or None.
        corrupted: makes an error of such a reason; also raised by `tensor`.

    Attributes:
        metadata: the file's own, all texts.
        meta: what was told of the tensors.
        sums: the checksum of each.

    Raises:
        OSError: the file is not there or cannot be read.
    """

    def __init__(
        self, path: Path, fault: Callable[[bytes, int], str | None], corrupted: Callable[[str], InfluenceError]
    ) -> None:
        self._corrupted = corrupted
        header, size = self._read(path)
        if reason := fault(header, size):
            raise corrupted(reason)
        with self._decoding():
            self.metadata: dict[str, str] = json.loads(header[8:])["__metadata__"]
            self.meta: Any = json.loads(self.metadata[_META])
            self.sums: dict[str, int] = json.loads(self.metadata[_SUMS])
            self._file = safe_open(path, framework="pt")
        if not isinstance(self.meta, dict) or not isinstance(self.sums, dict):
            raise corrupted("its header does not say what it should of the tensors")

    def _read(self, path: Path) -> tuple[bytes, int]:
        """The header's bytes and the file's size."""
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = header_size(start) if len(start) == 8 else 0
            if not 8 < length <= min(MAX_HEADER, size):
                raise self._corrupted("its header has an impossible length")
            return start + file.read(length - 8), size

    def tensor(self, name: str) -> Tensor:
        """One tensor, verified."""
        with self._decoding():
            tensor: Tensor = self._file.get_tensor(name)
            agrees = zlib.crc32(bytes_of(tensor)) == self.sums[name]
        if not agrees:
            raise self._corrupted(f"the checksum of {name!r} does not agree")
        return tensor

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        try:
            yield
        except UNDECODABLE as error:
            raise self._corrupted(f"its content makes {error!r:.200}") from error
