"""Curves as text: braille dots, or letters where those cannot be shown or several runs have no colours."""

from collections.abc import Sequence

from fabricfn.plots.logs import Curve
from fabricfn.plots.scales import Scale, scale_of

DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""The bit of each of the 4 x 2 dots of a braille character."""
COLOURS = (36, 33, 35, 32, 34, 31)
LETTERS = "abcdefghijklmnopqrstuvwxyz"

Cells = dict[tuple[int, int], str]


def drawn(curves: Sequence[Curve], *, width: int, height: int, log: bool, braille: bool, colours: bool) -> str:
    """One name's curves as lines of text.

    Args:
        curves: one a run.
        width: columns of the whole.
        height: lines of the plot itself.
        log: the vertical axis is logarithmic; numbers that are not positive are left out.
        braille: dots are allowed; else letters, one a run.
        colours: escape sequences are allowed.
    """
    braille = braille and (colours or len(curves) == 1)
    marks = [f"{LETTERS[number % 26]}: " if not braille else "" for number in range(len(curves))]
    lines = [curves[0].name]
    x, y = scale_of([curve.steps for curve in curves]), scale_of([curve.values for curve in curves], log)
    if x is None or y is None:
        return "\n".join([*lines, "  no number that can be drawn"])
    labels = [f"{y.at(1.0):.4g}", f"{y.at(0.0):.4g}"]
    margin = max(map(len, labels))
    columns = max(8, width - margin - 2)
    cells: Cells = {}
    for number, curve in enumerate(curves):
        found = _dots(curve, x, y, columns, height) if braille else _letters(curve, x, y, columns, height, number)
        cells |= {at: _coloured(mark, number, colours) for at, mark in found.items()}
    for row in range(height):
        label = labels[0] if row == 0 else labels[1] if row == height - 1 else ""
        line = "".join(cells.get((row, column), " ") for column in range(columns))
        lines.append(f"{label:>{margin}} {'┤' if braille else '|'}{line}".rstrip())
    first, last = f"{x.at(0.0):g}", f"{x.at(1.0):g}"
    lines.append(f"{'':{margin}}  {first}{last:>{max(len(last) + 1, columns - len(first))}}")
    for number, (curve, mark) in enumerate(zip(curves, marks, strict=True)):
        lines.append("  " + _coloured(f"{mark}{_legend(curve)}", number, colours and len(curves) > 1))
    return "\n".join(lines)


def _legend(curve: Curve) -> str:
    strange = f", {curve.num_strange} not finite" if curve.num_strange else ""
    if not curve.steps:
        return f"{curve.run}: nothing{strange}"
    low = min(range(len(curve.steps)), key=curve.values.__getitem__)
    return (
        f"{curve.run}: last {curve.values[-1]:.4g} at {curve.steps[-1]}, least {curve.values[low]:.4g} at"
        f" {curve.steps[low]}{strange}"
    )


def _coloured(text: str, number: int, colours: bool) -> str:
    return f"\x1b[{COLOURS[number % len(COLOURS)]}m{text}\x1b[0m" if colours else text


def _points(curve: Curve, x: Scale, y: Scale, columns: int, rows: int) -> dict[int, tuple[int, int]]:
    """Column -> the lowest and highest row that the curve has there, the rows from the top; gaps are filled."""
    found: dict[int, tuple[int, int]] = {}
    before: tuple[int, int] | None = None
    for step, value in zip(curve.steps, curve.values, strict=True):
        across, up = x.of(step), y.of(value)
        if across is None or up is None:
            continue
        here = round(across * (columns - 1)), round((1 - up) * (rows - 1))
        for column, row in _line(before or here, here):
            low, high = found.get(column, (row, row))
            found[column] = min(low, row), max(high, row)
        before = here
    return found


def _line(begin: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    """The cells from one to another."""
    count = max(abs(end[0] - begin[0]), abs(end[1] - begin[1]), 1)
    return [
        (begin[0] + round((end[0] - begin[0]) * i / count), begin[1] + round((end[1] - begin[1]) * i / count))
        for i in range(count + 1)
    ]


def _dots(curve: Curve, x: Scale, y: Scale, columns: int, height: int) -> Cells:
    bits: dict[tuple[int, int], int] = {}
    for column, (low, high) in _points(curve, x, y, columns * 2, height * 4).items():
        for row in range(low, high + 1):
            at = row // 4, column // 2
            bits[at] = bits.get(at, 0) | DOTS[row % 4][column % 2]
    return {at: chr(0x2800 + found) for at, found in bits.items()}


def _letters(curve: Curve, x: Scale, y: Scale, columns: int, height: int, number: int) -> Cells:
    points = _points(curve, x, y, columns, height).items()
    return {(row, column): LETTERS[number % 26] for column, (low, high) in points for row in range(low, high + 1)}
