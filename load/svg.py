"""Line charts as SVG text: panels above each other over one axis. Knows nothing of what is drawn."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

WIDTH = 860
LEFT, RIGHT = 70, 90
PANEL_HEIGHT, GAP = 190, 46
TOP = 82
BOTTOM = 46

COLORS = ("#0b62a4", "#c2570c", "#7a3e9d")
"""Told apart by those who see no red or green too, and each line carries its name."""

LABEL_PX = 14
"""What a name needs to stand clear of the next."""


class Line(NamedTuple):
    """A name and its points."""

    name: str
    points: Sequence[tuple[float, float]]


class Panel(NamedTuple):
    """One vertical axis."""

    title: str
    lines: Sequence[Line]
    logarithmic: bool


class Scale(NamedTuple):
    """Values to pixels."""

    low: float
    high: float
    from_px: float
    to_px: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        low, high, value = map(math.log10, (self.low, self.high, value)) if self.logarithmic else (*self[:2], value)
        return self.from_px + (value - low) / ((high - low) or 1) * (self.to_px - self.from_px)

    def ticks(self) -> list[float]:
        if self.logarithmic:
            decades = range(round(math.log10(self.low)), round(math.log10(self.high)) + 1)
            return [10.0**decade for decade in decades]
        step = nice((self.high - self.low) / 5)
        return [self.low + step * number for number in range(int((self.high - self.low) / step + 1e-9) + 1)]


def nice(step: float) -> float:
    """The next of 1, 2, 5, 10, … that is not under it, or hardly."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step * 0.95)


def picture(title: str, subtitle: str, x_title: str, panels: Sequence[Panel], *, logarithmic_x: bool = False) -> str:
    """A whole SVG file."""
    height = TOP + len(panels) * (PANEL_HEIGHT + GAP) - GAP + BOTTOM
    places = [point[0] for panel in panels for line in panel.lines for point in line.points]
    across = Scale(min(places) if logarithmic_x else 0, max(places), LEFT, WIDTH - RIGHT, logarithmic_x)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="12" fill="#333">',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        text(LEFT, 24, title, size=16, weight="bold"),
        text(LEFT, 42, subtitle, color="#666"),
    ]
    for number, panel in enumerate(panels):
        parts += drawn_panel(panel, across, TOP + number * (PANEL_HEIGHT + GAP))
    foot = height - BOTTOM
    for tick in across.ticks():
        shown = f"{tick:,.0f}" if logarithmic_x else f"{tick:g}"
        parts.append(text(across.at(tick), foot + 18, shown, anchor="middle"))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, foot + 36, x_title, anchor="middle"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def drawn_panel(panel: Panel, across: Scale, top: float) -> Iterator[str]:
    values = [value for line in panel.lines for _, value in line.points]
    scale = vertical(values, panel.logarithmic, top)
    yield text(LEFT, top - 8, panel.title, weight="bold")
    for tick in scale.ticks():
        y = scale.at(tick)
        yield f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
        yield text(LEFT - 8, y + 4, f"{tick:,g}", anchor="end")
    for line, color in zip(panel.lines, COLORS, strict=False):
        points = " ".join(f"{across.at(at):.1f},{scale.at(value):.1f}" for at, value in line.points)
        yield f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.6"/>'
    yield from names(panel.lines, scale)


def vertical(values: Sequence[float], logarithmic: bool, top: float) -> Scale:
    if logarithmic:
        low, high = (10.0**edge for edge in (math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))))
    else:
        step = nice(max(values) / 4 or 1)
        low, high = 0.0, step * max(1, math.ceil(max(values) / step))
    return Scale(low, high, top + PANEL_HEIGHT, top, logarithmic)


def names(lines: Sequence[Line], scale: Scale) -> Iterator[str]:
    """At the end of each line, moved apart where they would cover one another."""
    taken = -math.inf
    ends = sorted((scale.at(line.points[-1][1]), line.name, color) for line, color in zip(lines, COLORS, strict=False))
    for y, name, color in ends:
        taken = max(y, taken + LABEL_PX)
        yield text(WIDTH - RIGHT + 8, taken + 4, name, color=color, weight="bold")


def text(
    x: float, y: float, what: str, *, anchor: str = "start", size: int = 12, weight: str = "normal", color: str = "#333"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" '
        f'fill="{color}">{escape(what)}</text>'
    )
