"""Write numbers, intervals and labels as people read them, the same in every part of a report."""

from __future__ import annotations

UNDEFINED = "–"
_NAMES = {"Adam"}  # of methods: words that begin with a capital anywhere
NBSP = "\u00a0"  # keeps a number together with its sign, unit or partner


def number(value: float | None, places: int, *, signed: bool = False) -> str:
    """Write a number with fixed decimals and a true minus sign; a dash where it is undefined.

    Example:
        >>> number(-0.251, 2), number(0.251, 2, signed=True), number(-0.001, 2), number(None, 2)
        ('−0.25', '+0.25', '0.00', '–')
    """
    if value is None:
        return UNDEFINED
    rounded = round(value, places)
    if rounded == 0:
        return f"{0:.{places}f}"
    if abs(rounded) >= 1e6:
        return f"{value:.2e}".replace("-", "−")
    return f"{rounded:{'+' if signed else ''}.{places}f}".replace("-", "−")


def interval(low: float | None, high: float | None, places: int, *, signed: bool = False) -> str:
    """Write an interval in brackets; a dash where it is undefined."""
    if low is None or high is None:
        return UNDEFINED
    return f"[{number(low, places, signed=signed)},{NBSP}{number(high, places, signed=signed)}]"


def p_value(p: float | None, *, named: bool = False) -> str:
    """Write a p-value with three decimals; with `named`, as an equation."""
    if p is None:
        return "p undefined" if named else UNDEFINED
    small = p < 0.001
    written = "0.001" if small else f"{p:.3f}"
    sign = "<" if small else "="
    if named:
        return f"p{NBSP}{sign}{NBSP}{written}"
    return f"<{NBSP}{written}" if small else written


def plus_minus(mean: float | None, std: float | None, places: int) -> str:
    """Write mean ± standard deviation, the latter with one more decimal; without it, the mean alone."""
    if std is None:
        return number(mean, places)
    return f"{number(mean, places)}{NBSP}±{NBSP}{number(std, places + 1)}"


def plain(text: str) -> str:
    """Replace the spaces that must not break by ordinary ones, for terminals and files."""
    return text.replace(NBSP, " ")


def label(row: str) -> str:
    """Write a row label in a sentence: a bare number or ∞ is a number of standard deviations n.

    Example:
        >>> print(plain(label("3")), label("Huber"), sep="; ")
        n = 3; Huber
    """
    return f"n{NBSP}={NBSP}{row}" if row == "∞" or row.replace(".", "", 1).isdigit() else row


def lower_first(text: str) -> str:
    """Begin a title in lower case, for use within a sentence; an abbreviation or a name stays as it is.

    Example:
        >>> lower_first("Outer generator"), lower_first("RMS error"), lower_first("Adam at 0.002")
        ('outer generator', 'RMS error', 'Adam at 0.002')
    """
    keeps = text[1:2].isupper() or text.partition(" ")[0] in _NAMES
    return text if keeps else text[:1].lower() + text[1:]
