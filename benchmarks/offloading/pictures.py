"""Figures as SVG: no more than lines, boxes and text, readable on a light and on a dark page."""

from collections.abc import Mapping, Sequence
from html import escape

from offloading.overlap import Line

_WIDTH, _LEFT, _RIGHT, _TOP = 760, 86, 20, 58
_COLOURS = ("#2f6fb0", "#c2571a", "#3c8a4e", "#8a4fa3", "#7a6a1c")
_INK, _FAINT = "#333333", "#d9d9d9"


class Picture:
    """With a title; things are placed in pixels."""

    def __init__(self, title: str, height: int) -> None:
        self._title, self._height = title, height
        self._parts: list[str] = []
        self.text(14, 24, title, size=15, weight="bold")

    def line(
        self, points: Sequence[tuple[float, float]], colour: str = _FAINT, dash: str = ""
    ) -> None:
        """Through all points."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        more = f' stroke-dasharray="{dash}"' if dash else ""
        width = 1 if colour in (_FAINT, _INK) else 2
        self._parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" '
            f'stroke-width="{width}"{more}/>'
        )

    def box(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        """Filled."""
        self._parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{height:.1f}" '
            f'fill="{colour}" stroke="#ffffff" stroke-width="0.7"/>'
        )

    def dot(self, x: float, y: float, colour: str) -> None:
        """On a line."""
        self._parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>')

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        anchor: str = "start",
        size: int = 12,
        colour: str = _INK,
        weight: str = "normal",
    ) -> None:
        """`anchor`: start, middle or end."""
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
            f'fill="{colour}" font-weight="{weight}">{escape(text)}</text>'
        )

    def svg(self) -> str:
        """The file's text."""
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {self._height}" '
                f'width="{_WIDTH}" height="{self._height}" role="img" '
                'font-family="system-ui, sans-serif">',
                f"<title>{escape(self._title)}</title>",
                f'<rect width="{_WIDTH}" height="{self._height}" fill="#ffffff"/>',
                *self._parts,
                "</svg>\n",
            ]
        )


def timeline_picture(lines: Sequence[Line], title: str) -> str:
    """One row for each slot with what is read into it, and one with what is computed."""
    num_slots = 1 + max(line.slot for line in lines)
    row, begin_s = 34, min(0.0, *(line.read.begin_s for line in lines))
    end_s = max(line.compute.end_s for line in lines)
    bottom = _TOP + row * (num_slots + 1) + 8
    picture = Picture(title, bottom + 48)

    def x(at_s: float) -> float:
        return _LEFT + (at_s - begin_s) / (end_s - begin_s) * (_WIDTH - _LEFT - _RIGHT)

    for tick_s in _ticks(begin_s, end_s):
        picture.line([(x(tick_s), _TOP - 8), (x(tick_s), bottom)])
        picture.text(x(tick_s), bottom + 16, f"{tick_s * 1000:.0f}", anchor="middle")
    picture.text(_WIDTH - _RIGHT, bottom + 36, "milliseconds since the pass began", anchor="end")
    names = [*(f"slot {slot}" for slot in range(num_slots)), "computing"]
    for number, name in enumerate(names):
        picture.text(_LEFT - 10, _TOP + row * number + 18, name, anchor="end")
    for line in lines:
        colour = _COLOURS[line.slot % len(_COLOURS)]
        for span, number in ((line.read, line.slot), (line.compute, num_slots)):
            top = _TOP + row * number
            width = x(span.end_s) - x(span.begin_s)
            picture.box(x(span.begin_s), top, width, row - 8, colour)
            if width > 14:
                middle = x((span.begin_s + span.end_s) / 2)
                text = str(line.item)
                picture.text(middle, top + 17, text, anchor="middle", colour="#ffffff")
    return picture.svg()


def curves_picture(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    title: str,
    across: str,
    *,
    top: float,
    levels: Mapping[str, float] | None = None,
) -> str:
    """Points (x, y) joined to a curve each; those below 0 or above `top` are drawn there. `levels`
    are lines at a height."""
    bottom, height = 300, 300 - _TOP
    picture = Picture(title, bottom + 48)
    places = sorted({x for curve in curves.values() for x, _ in curve})
    width = _WIDTH - _LEFT - _RIGHT - 150

    def at(x: float, y: float) -> tuple[float, float]:
        share = places.index(x) / max(1, len(places) - 1)
        return _LEFT + 20 + share * (width - 40), bottom - min(max(0.0, y), top) / top * height

    for tick in _ticks(0, top):
        _, y = at(places[0], tick)
        picture.line([(_LEFT, y), (_LEFT + width, y)])
        picture.text(_LEFT - 8, y + 4, f"{tick:g}", anchor="end")
    for x in places:
        picture.text(at(x, 0)[0], bottom + 18, f"{x:g}", anchor="middle")
    picture.text(_LEFT + width, bottom + 38, across, anchor="end")
    for name, level in (levels or {}).items():
        _, y = at(places[0], level)
        picture.line([(_LEFT, y), (_LEFT + width, y)], _INK, dash="5 4")
        picture.text(_LEFT + width + 8, y + 4, name)
    for number, (name, curve) in enumerate(curves.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        dash = "7 5" if number % 2 else ""  # curves that lie one on another can be told apart
        picture.line([at(*point) for point in curve], colour, dash)
        for point in curve:
            picture.dot(*at(*point), colour)
        y = _TOP + 60 + 20 * number
        picture.line([(_LEFT + width + 8, y), (_LEFT + width + 34, y)], colour, dash)
        picture.text(_LEFT + width + 42, y + 4, name)
    return picture.svg()


def _ticks(begin: float, end: float) -> list[float]:
    """About six round values."""
    rough = (end - begin) / 6
    unit = 10.0 ** (len(f"{rough:.0f}") - 1) if rough >= 1 else 1.0
    while unit > rough:
        unit /= 10
    step = next(step * unit for step in (1, 2, 5, 10) if step * unit >= rough)
    first = int(begin // step)
    return [i * step for i in range(first, int(end // step) + 1) if begin <= i * step <= end + 1e-9]
