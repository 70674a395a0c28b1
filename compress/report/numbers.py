"""How figures are written, in tables on the terminal and on the page alike."""

from __future__ import annotations


def human_bytes(n: float) -> str:
    """ "7.88 MiB": three digits, units of 1024."""
    size, unit = float(n), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1000 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} B" if unit == "B" else f"{digits(size)} {unit}"


def digits(value: float) -> str:
    """Three digits: 0.123, 1.23, 12.3, 123."""
    magnitude = abs(value)
    return f"{value:.{2 if magnitude < 9.995 else 1 if magnitude < 99.95 else 0}f}"


def human_time(seconds: float) -> str:
    """ "0.28 s", "84 s", "12:05 min", "3:07:10 h"."""
    if seconds < 9.95:
        return f"{seconds:.2f} s" if seconds < 0.95 else f"{seconds:.1f} s"
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h"


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"


def share(value: float) -> str:
    """A share as a percentage of three digits: "93.3 %", "0.0312 %"."""
    shown = 100 * value
    return f"{digits(shown)} %" if abs(shown) >= 0.995 or shown == 0 else f"{shown:.3g} %"


def small(value: float) -> str:
    """Three digits of what may be very small: "0.00799", "7.98e-05"."""
    return f"{value:.3g}" if 0 < abs(value) < 1000 else f"{value:,.0f}"


def count(value: float) -> str:
    return f"{value:,.0f}"


def rate(value: float) -> str:
    """Tokens per second."""
    return f"{value:,.0f}" if value >= 100 else digits(value)
