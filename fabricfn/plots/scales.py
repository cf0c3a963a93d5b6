"""From numbers to places on an axis, and back."""

import dataclasses
import math
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """An axis."""

    low: float
    high: float
    """As logarithms where `log`."""
    log: bool

    def of(self, value: float) -> float | None:
        """0 at the lower end, 1 at the upper; None for what a logarithmic axis has no place for."""
        if self.log and value <= 0:
            return None
        value = math.log10(value) if self.log else value
        # halves, since the whole range of floats would overflow
        return (value / 2 - self.low / 2) / (self.high / 2 - self.low / 2) if self.high > self.low else 0.5

    def at(self, place: float) -> float:
        """The number at a place from 0 to 1."""
        value = self.low * (1 - place) + self.high * place
        return 10**value if self.log else value


def scale_of(rows: Sequence[Sequence[float]], log: bool = False) -> Scale | None:
    """The axis from the smallest to the largest number; None when there is none to show."""
    values = [value for row in rows for value in row if not log or value > 0]
    if not values:
        return None
    low, high = min(values), max(values)
    return Scale(low=math.log10(low), high=math.log10(high), log=True) if log else Scale(low=low, high=high, log=False)
