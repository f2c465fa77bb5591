"""What a number format can hold: the binary floating-point formats of IEEE 754, and bfloat16.

A number is ±m·2^e with a significand m of `digits` binary digits.  Sources: Goldberg 1991; Higham
2002, chapter 2; for bfloat16, Kalamkar et al. 2019.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Format:
    """A binary floating-point format.

    Attributes:
        name: as the frameworks spell it.
        digits: binary digits of the significand p, the leading one included.
        exponent: the largest exponent e_max; the smallest of a normal number is 1 - e_max.
    """

    name: str
    digits: int
    exponent: int

    @property
    def largest(self) -> float:
        """The largest finite number, (2 - 2^(1-p))·2^e_max."""
        return (2 - 2.0 ** (1 - self.digits)) * 2.0**self.exponent

    @property
    def overflow(self) -> float:
        """The first number that rounds to inf, half a spacing above the largest.

        It is inf for float64, where it does not fit into a Python float.
        """
        return float(np.float64(2 - 2.0**-self.digits) * np.float64(2) ** self.exponent)

    @property
    def smallest_normal(self) -> float:
        """The smallest number that has all its digits, 2^(1 - e_max)."""
        return 2.0 ** (1 - self.exponent)

    @property
    def smallest(self) -> float:
        """The smallest number above 0 (subnormal); half of it, and less, rounds to 0."""
        return 2.0 ** (2 - self.exponent - self.digits)

    @property
    def epsilon(self) -> float:
        """Distance from 1 to the next larger number, 2^(1-p)."""
        return 2.0 ** (1 - self.digits)

    def spacing(self, x: np.ndarray) -> np.ndarray:
        """Distance of neighbouring numbers of the format around x, any shape; float64."""
        exponent = np.frexp(np.abs(np.asarray(x, float)))[1] - 1
        return np.ldexp(1.0, np.maximum(exponent, 1 - self.exponent) + 1 - self.digits)

    def round(self, x: np.ndarray) -> np.ndarray:
        """The nearest number of the format, ties to the even one, as hardware rounds.

        Args:
            x: finite numbers, inf or NaN, any shape.

        Returns:
            The same shape, float64; ±inf from `overflow` on.

        Example:
            >>> FORMATS["float16"].round([65519.9, 65520, 2.0**-25]).tolist()
            [65504.0, inf, 0.0]
        """
        x = np.asarray(x, float)
        spacing = self.spacing(x)
        with np.errstate(invalid="ignore"):
            rounded = np.where(np.isfinite(x), np.rint(x / spacing) * spacing, x)
        return np.where(np.abs(rounded) > self.largest, np.copysign(np.inf, x), rounded)


FORMATS = {
    f.name: f
    for f in (
        Format("float64", 53, 1023),
        Format("float32", 24, 127),
        Format("bfloat16", 8, 127),
        Format("float16", 11, 15),
    )
}
"""The four formats of the book, by name."""
