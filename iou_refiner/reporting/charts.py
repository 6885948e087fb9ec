"""From numbers to places on paper: what the templates draw as SVG. Words and colours are theirs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from iou_refiner.evaluation.ap import points
from iou_refiner.reporting.errors import Errors
from iou_refiner.reporting.facts import THRESHOLDS, Facts
from iou_refiner.reporting.fit import CELLS, Calibration, Fit

# Of a drawing, in units that become CSS pixels on a small phone: text stays legible there.
WIDTH, HEIGHT = 340, 236
_LEFT, _RIGHT, _TOP, _BOTTOM = 38, 12, 10, 38


@dataclass(frozen=True)
class Tick:
    """A mark on an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Line:
    """A curve, in units of the drawing.

    Args:
        kind: CSS class.
        paths: ``d`` of each unbroken stretch.
        dots: ``(x, y, what it says)`` of each point.
    """

    kind: str
    paths: tuple[str, ...]
    dots: tuple[tuple[float, float, str], ...]


@dataclass(frozen=True)
class Plot:
    """A plot with two axes.

    Args:
        x_ticks, y_ticks: marks, in units of the drawing.
        lines: curves.
        cells: ``(x, y, width, height, opacity)`` of a heat map.
        diagonal: whether the line of equality is drawn.
    """

    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    cells: tuple[tuple[float, float, float, float, float], ...] = ()
    diagonal: bool = False
    left: float = _LEFT
    right: float = WIDTH - _RIGHT
    top: float = _TOP
    bottom: float = HEIGHT - _BOTTOM


@dataclass(frozen=True)
class Bar:
    """A bar from the left, ``label`` at its end."""

    kind: str
    y: float
    width: float
    label: str


@dataclass(frozen=True)
class Bars:
    """Two bars a row: ``(name, y of its text, bars)``, and the height of the whole."""

    rows: tuple[tuple[str, float, tuple[Bar, Bar]], ...]
    left: float
    height: float


@dataclass(frozen=True)
class Whisker:
    """A difference with its interval on a small strip of 120 by 16, in its units; ``low`` None where there is none."""

    zero: float
    at: float
    low: float | None
    high: float | None


def _x(share: float) -> float:
    return round(_LEFT + share * (WIDTH - _LEFT - _RIGHT), 1)


def _y(share: float) -> float:
    return round(HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM), 1)


def line(kind: str, values: Sequence[tuple[float, float, str]]) -> Line:
    """A curve through ``(x, y, what it says)``, shares of the axes; broken where y is NaN."""
    placed = [None if y != y else (_x(x), _y(y), label) for x, y, label in values]
    stretches = [list(part) for there, part in groupby(placed, lambda point: point is not None) if there]
    paths = ("M" + "L".join(f"{point[0]} {point[1]}" for point in part if point) for part in stretches)
    return Line(kind, tuple(paths), tuple(point for point in placed if point))


def curve_plot(facts: Facts) -> Plot:
    """AP against the IoU threshold, before and after."""
    sides = {"before": facts.before.ap_at, "after": facts.after.ap_at}
    top = nice_ceiling(max((v for side in sides.values() for v in side.tolist() if v == v), default=0.0))
    lines = tuple(
        line(
            kind,
            [
                ((t - 0.5) / 0.45, value / top, f"{kind}: AP {points(value)} at IoU {t:.2f}")
                for t, value in zip(THRESHOLDS, values.tolist(), strict=True)
            ],
        )
        for kind, values in sides.items()
    )
    x_ticks = tuple(Tick(_x((t - 0.5) / 0.45), f"{t:.1f}") for t in THRESHOLDS[::2])
    y_ticks = tuple(Tick(_y(share), f"{100 * top * share:g}") for share in (0, 0.25, 0.5, 0.75, 1))
    return Plot(x_ticks, y_ticks, lines)


def nice_ceiling(value: float) -> float:
    """The smallest of .04, .08, .2, .4, .6, .8 and 1 that is not below a fraction: quarters of it are round."""
    return next((step for step in (0.04, 0.08, 0.2, 0.4, 0.6, 0.8) if value <= step), 1.0)


def _unit_ticks() -> tuple[tuple[Tick, ...], tuple[Tick, ...]]:
    shares = (0, 0.25, 0.5, 0.75, 1)
    return tuple(Tick(_x(s), f"{s:g}") for s in shares), tuple(Tick(_y(s), f"{s:g}") for s in shares)


def fit_plot(fit: Fit) -> Plot:
    """A heat map of true IoU by a number, and the mean true IoU by bins of it."""
    most = math.log1p(max(int(fit.cells.max(initial=0)), 1))
    width, height = _x(1 / CELLS) - _x(0), _y(0) - _y(1 / CELLS)
    cells = tuple(
        (
            _x(column / CELLS),
            _y((row + 1) / CELLS),
            round(width, 1),
            round(height, 1),
            round(0.9 * math.log1p(n) / most, 2),
        )
        for row, counts in enumerate(fit.cells.tolist())
        for column, n in enumerate(counts)
        if n
    )
    mean = line(
        "mean",
        [
            (entry.value, entry.mean, f"mean true IoU {entry.mean:.2f} of {entry.count:,} boxes from {entry.low:g} on")
            for entry in fit.bins
        ],
    )
    return Plot(*_unit_ticks(), (mean,), cells, diagonal=True)


def calibration_plot(before: Calibration, after: Calibration) -> Plot:
    """Share of hits by bins of the score."""
    lines = tuple(
        line(
            kind,
            [
                (entry.value, entry.mean, f"{kind}: {entry.mean:.0%} of {entry.count:,} boxes scored {entry.value:.2f}")
                for entry in side.bins
                if entry.count
            ],
        )
        for kind, side in (("before", before), ("after", after))
    )
    return Plot(*_unit_ticks(), lines, diagonal=True)


def error_bars(before: Errors, after: Errors) -> Bars:
    """AP50 that each kind of error costs, before and after."""
    left, row, room = 92.0, 42, WIDTH - 92 - 44
    costs = [max(entry.cost, 0) for side in (before, after) for entry in side.kinds if entry.cost == entry.cost]
    most = max([*costs, 1e-9])

    def bar(kind: str, y: float, cost: float) -> Bar:
        length = 0.0 if cost != cost else max(cost, 0) / most * room
        return Bar(kind, y, round(length, 1), points(cost))

    rows = tuple(
        (
            old.name,
            index * row + 18,
            (bar("before", index * row + 2, old.cost), bar("after", index * row + 18, new.cost)),
        )
        for index, (old, new) in enumerate(zip(before.kinds, after.kinds, strict=True))
    )
    return Bars(rows, left, len(rows) * row)


def whiskers(rows: Sequence[tuple[float, tuple[float, float]]]) -> list[Whisker | None]:
    """Differences with their intervals, all on one scale; None where there is no difference."""
    ends = [abs(v) for difference, (low, high) in rows for v in (difference, low, high) if v == v]
    reach = max([*ends, 1e-9])

    def at(value: float) -> float:
        return round(60 + 56 * value / reach, 1)

    return [
        None
        if difference != difference
        else Whisker(60, at(difference), None if low != low else at(low), None if high != high else at(high))
        for difference, (low, high) in rows
    ]
