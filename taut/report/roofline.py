"""The roofline as a drawing: what a machine can do at most, by FLOPs a byte, and every op under it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from taut.words import size

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 380, 66, 44, 12, 16


@dataclass(frozen=True)
class Point:
    """An op: FLOPs a byte, FLOP/s, and its share of the time. `open` ones belong to the second workload."""

    name: str
    intensity: float
    rate: float
    share: float
    open: bool = False


def roofline(peak: float, bandwidth: float, points: Sequence[Point], label: str) -> str:
    """An SVG with logarithmic axes; the size of a point is its share of the time, and large ones have their name."""
    points = [p for p in points if p.intensity > 0 and p.rate > 0]
    axes = _Axes(peak, bandwidth, points)
    bend = peak / bandwidth
    roof = [(axes.low, axes.low * bandwidth), (bend, peak), (axes.high, peak)]
    path = " ".join(f"{axes.x(i):.1f},{axes.y(r):.1f}" for i, r in roof)
    marks = "".join(_mark(axes, p) for p in sorted(points, key=lambda p: -p.share))
    names = "".join(_names(axes, points))
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f'{axes.grid()}<polyline class="roof" points="{path}"/>{marks}{names}</svg>'
    )


class _Axes:
    """FLOPs a byte along x, FLOP/s along y, both in decades."""

    def __init__(self, peak: float, bandwidth: float, points: Sequence[Point]) -> None:
        intensities = [p.intensity for p in points] + [peak / bandwidth]
        self.low = 10 ** math.floor(math.log10(min(intensities)))
        self.high = 10 ** math.ceil(math.log10(max(intensities)) + 0.3)
        self.bottom = 10 ** math.floor(math.log10(min([p.rate for p in points] + [self.low * bandwidth])))
        self.top = 10 ** math.ceil(math.log10(peak) + 0.05)

    def x(self, intensity: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * _part(intensity, self.low, self.high)

    def y(self, rate: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * _part(rate, self.bottom, self.top)

    def grid(self) -> str:
        lines, floor = [], HEIGHT - BOTTOM
        for value in _decades(self.low, self.high):
            x = self.x(value)
            lines.append(f'<line class="axis" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{floor}"/>')
            lines.append(f'<text x="{x:.1f}" y="{floor + 18}" text-anchor="middle">{value:g}</text>')
        for value in _decades(self.bottom, self.top):
            y = self.y(value)
            lines.append(f'<line class="axis" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
            lines.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{size(value, "")}</text>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        lines.append(f'<text x="{middle:.0f}" y="{HEIGHT - 4}" text-anchor="middle">FLOPs a byte</text>')
        lines.append(f'<text x="{LEFT + 6}" y="{TOP + 12}">FLOP/s</text>')
        return "".join(lines)


def _part(value: float, low: float, high: float) -> float:
    return math.log(value / low) / math.log(high / low)


def _decades(low: float, high: float) -> list[float]:
    powers = range(round(math.log10(low)), round(math.log10(high)) + 1)
    step = max(1, len(powers) // 6)
    return [10.0**p for p in powers[::step]]


def _radius(point: Point) -> float:
    return 3 + 13 * math.sqrt(point.share)


def _mark(axes: _Axes, point: Point) -> str:
    told = f"{point.name}: {point.intensity:.3g} FLOPs a byte, {size(point.rate, 'FLOP/s')}, {point.share:.1%} of time"
    place = f'cx="{axes.x(point.intensity):.1f}" cy="{axes.y(point.rate):.1f}" r="{_radius(point):.1f}"'
    return f'<circle class="{"op other" if point.open else "op"}" {place}><title>{escape(told)}</title></circle>'


def _names(axes: _Axes, points: Sequence[Point]) -> list[str]:
    """Names of the ops that take most of the time, where they do not run into each other."""
    written: list[tuple[float, float]] = []
    names = []
    for point in sorted(points, key=lambda p: (-p.share, p.open)):
        x, middle, away = axes.x(point.intensity), axes.y(point.rate), _radius(point)
        free = [y for y in (middle + away + 15, middle - away - 7) if _free(x, y, written)]
        if point.share >= 0.02 and free:
            written.append((x, free[0]))
            anchor, at = ("end", x + 6) if x + 8 * len(point.name) > WIDTH - RIGHT else ("start", x - 6)
            place = f'x="{at:.1f}" y="{free[0]:.1f}" text-anchor="{anchor}"'
            names.append(f'<text class="name" {place}>{escape(point.name)}</text>')
    return names


def _free(x: float, y: float, written: Sequence[tuple[float, float]]) -> bool:
    """Whether a name at a place is inside of the drawing and runs into no other."""
    return TOP + 12 < y < HEIGHT - BOTTOM and all(abs(y - v) > 16 or abs(x - u) > 110 for u, v in written)
