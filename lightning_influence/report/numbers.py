"""Numbers in print."""

from __future__ import annotations

from typing import Any


def signed(value: float, digits: int = 3) -> str:
    """A number with its sign, in print rather than in code: ``−1.2×10⁻⁵``."""
    mantissa, _, exponent = f"{value:+#.{digits}g}".replace("-", "−").partition("e")
    mantissa = mantissa.removesuffix(".")
    if not exponent:
        return mantissa
    power = str(int(exponent.replace("−", "-"))).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{mantissa}×10{power}"


def percent(fraction: float) -> str:
    """A fraction as a percentage, or as a power of ten where it is small."""
    if 0 < abs(fraction) < 0.0005:
        return signed(fraction, 2)[1:]
    return f"{100 * fraction:.3g} %"


def short(value: Any) -> str:
    """Any value, numbers with three digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def in_bytes(size: int) -> str:
    """A size of files.

    Example:
        >>> in_bytes(14_300_000), in_bytes(2_150), in_bytes(18_400_000_000)
        ('14 MB', '2.2 kB', '18 GB')
    """
    unit, name = next(
        (u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes")) if size >= u or u == 1.0
    )
    return f"{size / unit:.{0 if size / unit >= 10 or unit == 1 else 1}f} {name}"
