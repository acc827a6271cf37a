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
