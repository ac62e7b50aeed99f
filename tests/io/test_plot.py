"""Charts: where values are drawn, round ticks, gaps, and text that fits."""

from __future__ import annotations

import math

import av
import numpy as np
import pytest
from PIL import ImageFont

from hiar_model.io.captions import CaptionedGrid, font, shortened, typeset
from hiar_model.io.plot import (
    BOTTOM,
    COLOURS,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Bar,
    Bars,
    Lines,
    Series,
    draw,
    linear_ticks,
    log_ticks,
    save_plot,
)  # fmt: skip

pytestmark = pytest.mark.cpu

BLACK = (0, 0, 0)


def coloured(image, colour=BLACK):
    """(rows, columns) of the pixels of a colour."""
    return (np.abs(image.astype(int) - colour).sum(2) < 24).nonzero()


def line(*ys, **options):
    return Lines("", [Series("", range(len(ys)), ys, BLACK)], **options)


def test_a_line_runs_where_its_values_are():
    rows, columns = coloured(draw([line(0, 10, y_range=(0, 10))]))
    assert abs(columns.min() - LEFT) <= 1 and abs(columns.max() - (WIDTH - RIGHT)) <= 1
    assert abs(rows.min() - TOP) <= 1 and abs(rows.max() - (HEIGHT - BOTTOM)) <= 1
    assert rows[columns == columns.min()].mean() > rows[columns == columns.max()].mean()


def test_a_logarithmic_axis_spaces_powers_evenly():
    image = draw([line(1, 10, 100, log_y=True)])
    rows, columns = coloured(image)
    middle = rows[np.abs(columns - (LEFT + WIDTH - RIGHT) / 2) < 1].mean()
    assert middle == pytest.approx((TOP + HEIGHT - BOTTOM) / 2, abs=1.5)
    assert len(coloured(draw([line(0, -1, log_y=True)]))[0]) == 0  # nothing that it can show


@pytest.mark.parametrize("gap", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_a_gap(gap):
    _, columns = coloured(draw([line(5, 5, gap, 5, 5, y_range=(0, 10))]))
    width = WIDTH - RIGHT - LEFT
    inside = (columns > LEFT + 0.3 * width) & (columns < LEFT + 0.7 * width)
    assert len(columns) and not inside.any()


def test_panels_stand_in_reading_order():
    image = draw([line(0, 1), line(0, 1), Bars("", [Bar("a", 2.0)])], columns=2)
    assert image.shape == (2 * HEIGHT, 2 * WIDTH, 3)
    boxes = [image[:HEIGHT, :WIDTH], image[:HEIGHT, WIDTH:], image[HEIGHT:, :WIDTH]]
    assert [len(coloured(box)[0]) > 100 for box in boxes] == [True, True, False]
    assert len(coloured(boxes[2], COLOURS[1])[0]) > 100 and (image[HEIGHT:, WIDTH:] == 255).all()


def test_bars_are_as_long_as_their_values_with_a_mark_at_the_limit():
    image = draw([Bars("", [Bar("long", 8.0, 2.0), Bar("short", 4.0)])])
    rows, columns = coloured(image, COLOURS[1])
    lengths = [np.ptp(columns[half]) for half in (rows < rows.mean(), rows > rows.mean())]
    assert lengths[0] == pytest.approx(2 * lengths[1], abs=3)
    marks = coloured(image[: HEIGHT // 2], COLOURS[0])[1]
    assert marks.mean() - columns.min() == pytest.approx(lengths[0] / 4, abs=3)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (-0.3, 0.31, [-0.4, -0.2, 0, 0.2, 0.4]),
        (0, 0.0023, [0, 0.0005, 0.001, 0.0015, 0.002, 0.0025]),
        (1000, 1003, [1000, 1000.5, 1001, 1001.5, 1002, 1002.5, 1003]),
    ],
)
def test_ticks_are_round_and_around_the_values(low, high, ticks):
    assert linear_ticks(low, high) == pytest.approx(ticks)


def test_logarithmic_ticks():
    assert log_ticks(2, 200) == [2, 5, 10, 20, 50, 100, 200]
    assert log_ticks(0.03, 0.32) == pytest.approx([0.02, 0.05, 0.1, 0.2, 0.5])
    assert log_ticks(0.32, 0.44) == pytest.approx([0.32, 0.34, 0.36, 0.38, 0.4, 0.42, 0.44])
    assert log_ticks(0.001, 900) == [
        0.001, 0.01, 0.1, 1, 10, 100, 1000
    ]  # fmt: skip


def test_equal_values_and_no_values_can_be_drawn():
    assert len(coloured(draw([line(3, 3, 3)]))[0]) and draw([Lines("", [])]).shape == (HEIGHT, WIDTH, 3)
    assert draw([Bars("", [])]).shape == (HEIGHT, WIDTH, 3)
    with pytest.raises(ValueError, match="at least one panel"):
        draw([])


def test_a_plot_is_a_png_and_nothing_is_left_of_one_that_fails(tmp_path):
    save_plot([line(0, 1)], tmp_path / "a.png")
    with av.open(str(tmp_path / "a.png")) as picture:
        (frame,) = picture.decode(video=0)
    np.testing.assert_array_equal(frame.to_ndarray(format="rgb24"), draw([line(0, 1)]))
    with pytest.raises(OSError, match="cannot write .*none"):
        save_plot([line(0, 1)], tmp_path / "none" / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_long_text_is_cut_to_its_width():
    text = "a very long prompt " * 20
    cut = shortened(text, 15, 200)
    assert cut.endswith("...") and font(15).getlength(cut) <= 200 < font(15).getlength(cut[:-3] + text[len(cut) - 3 :])
    assert shortened("short\n text", 15, 200) == "short text" and shortened(text, 15, 1) == "..."


class Face:
    """A font whose letters all look different but those that it lacks."""

    def __init__(self, letters):
        self.letters = letters

    def getmask(self, letter):
        return np.full((2, 2), ord(letter) % 251 if letter in self.letters else 255, np.uint8)


@pytest.fixture
def of_the_system(monkeypatch):
    """Fonts by their names, as if they were installed; any other is missing."""
    there = {"DejaVuSans.ttf": Face("красный "), "msyh.ttc": Face("红色 right")}

    real = ImageFont.truetype

    def find(name, pixels, **options):
        if not isinstance(name, str):  # Pillow's own
            return real(name, pixels, **options)
        if name not in there:
            raise OSError("cannot open resource")
        return there[name]

    monkeypatch.setattr("PIL.ImageFont.truetype", find)
    typeset.cache_clear()
    yield there
    typeset.cache_clear()


def test_a_caption_takes_a_font_that_has_its_letters(of_the_system):
    """Pillow's own is Latin: other prompts were boxes."""
    assert typeset("red", 12) == ("red", font(12), "")
    assert typeset("красный", 12) == ("красный", of_the_system["DejaVuSans.ttf"], "")
    assert typeset("红 right", 12) == ("红 right", of_the_system["msyh.ttc"], "")
    assert typeset("кот 红 right", 12) == ("??? 红 right", of_the_system["msyh.ttc"], "кот")
    of_the_system.clear()
    typeset.cache_clear()
    assert typeset("红e\u0301", 12) == ("?e\u0301", font(12), "红")
    assert CaptionedGrid("红色", [("a",)], (40, 60)).missing == "红色"


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 3), (9, 3)])
def test_videos_stand_side_by_side_in_rows(count, columns):
    grid = CaptionedGrid("", [("a", "b")] * count, (40, 60))
    tops, lefts = zip(*grid.corners, strict=True)
    assert len(set(lefts)) == columns and len(set(tops)) == -(-count // columns)
    images = [np.full((40, 60, 3), 30 + i, np.uint8) for i in range(count)]
    frame = grid.compose(images, "footer")
    for i, (top, left) in enumerate(grid.corners):
        assert (frame[top : top + 40, left : left + 60] == 30 + i).all()
