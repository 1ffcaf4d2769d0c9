"""Figures as SVG: well-formed, and everything within the picture."""

import sys
from xml.etree import ElementTree

from tests.daemon_process import ROOT

sys.path.append(str(ROOT / "benchmarks"))

from offloading.overlap import Line
from offloading.pictures import curves_picture, timeline_picture
from offloading.schedule import Span, critical_path

SVG = "{http://www.w3.org/2000/svg}"


def test_a_timeline_shows_every_read_in_its_slot_and_every_computation() -> None:
    steps = critical_path([1.0] * 6, [2.0] * 6, 2)
    lines = [Line(item, item % 3, step.read, step.compute) for item, step in enumerate(steps)]
    picture = ElementTree.fromstring(timeline_picture(lines, "reads < computations & slots"))
    title = picture.find(f"{SVG}title")
    assert title is not None
    assert title.text == "reads < computations & slots"
    boxes = [box for box in picture.iter(f"{SVG}rect") if box.get("x") is not None]
    assert len(boxes) == 12
    assert len({box.get("y") for box in boxes}) == 4  # three slots and the processor
    assert all(0 < float(box.get("x", 0)) < float(picture.get("width", 0)) for box in boxes)
    texts = [one.text for one in picture.iter(f"{SVG}text")]
    assert {"slot 0", "slot 1", "slot 2", "computing"} <= set(texts)


def test_a_read_that_takes_no_time_is_still_seen() -> None:
    line = Line(0, 0, Span(0.0, 0.0), Span(0.0, 1.0))
    picture = ElementTree.fromstring(timeline_picture([line], "one"))
    widths = [float(box.get("width", 0)) for box in picture.iter(f"{SVG}rect")]
    assert min(widths) > 0


def test_curves_stay_within_the_picture() -> None:
    curves = {"a": [(0.5, -3.0), (1.0, 0.5)], "b": [(0.5, 9.0), (2.0, 1.0)]}
    text = curves_picture(curves, "title", "across", top=1.2, levels={"all": 1.0})
    picture = ElementTree.fromstring(text)
    dots = [(float(d.get("cx", 0)), float(d.get("cy", 0))) for d in picture.iter(f"{SVG}circle")]
    assert len(dots) == 4
    heights = {y for _, y in dots}
    assert min(heights) > 40
    assert max(heights) < float(picture.get("height", 0)) - 40
    assert len({x for x, _ in dots}) == 3
