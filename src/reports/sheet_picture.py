"""A retrieval sheet as a PNG: queries with their results, the cards of `reports.sheets`, one below the other."""

import functools
import importlib.util
import io
import itertools
import logging
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from reports.sheets import Card, Row

logger = logging.getLogger(__name__)
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# Sizes in pixels.
TALLEST = 30_000  # largest height of the picture, which image viewers still open
LEFT_WIDTH = 330  # width of the query; its results start to the right of it
MARGIN = 6
GAP = 6  # between two images
LINE = 15  # height of a line of text
TEXT_GAP = 8  # between the reference and the text to its right
LABEL_GAP = 3  # between an image and its label
LABEL_HEIGHT = 22  # including the gaps above and below the label
BOTTOM = 14  # total margin above and below the content of a strip
OUTLINE = 3  # width of a target's outline
FONT_SIZE = 11
BAR_LEFT = 128  # from the left end of the name to the bar
BAR_WIDTH = 80  # width of the bar of a fraction of 1
BAR_TOP = 4  # from the top of the line to the bar
BAR_BOTTOM = 11

CAPTION_LINES = 6
# Lines are filled to this fraction of the available width, computed from the mean width of a character, since some
# characters are wider than the mean.
MEAN_LINE = 0.9
GREEN = (26, 152, 80)
GREY = (110, 110, 110)
BLUE = (33, 102, 172)


def picture(
    cards: Sequence[Card],
    thumbnails: Mapping[str, bytes],
    side: int = 96,
    *,
    head: Sequence[str] = (),
) -> tuple[bytes, int]:
    """Return a PNG of queries one below the other, and the number of queries that fit in it.

    Args:
        side: width and height in pixels within which each image is drawn.
        head: texts above the queries; each starts on a new line.
    """
    say_unknown([*head, *(card.caption + card.heading for card in cards)])
    rows = itertools.chain.from_iterable(card.rows.values() for card in cards)
    places = max((len(row.results) + len(row.ranks) for row in rows), default=0)
    width = LEFT_WIDTH + places * (side + GAP)
    lines = list(itertools.chain.from_iterable(wrapped(text, width - MARGIN) for text in head))
    top = Image.new("RGB", (width, MARGIN + LINE * len(lines)), "white")
    _write(top, lines, (MARGIN, MARGIN))
    strips = [top]
    height = top.height
    for card in cards:
        strip = _strip(card, thumbnails, side=side, width=width)
        if len(strips) > 1 and height + strip.height > TALLEST:
            break
        strips.append(strip)
        height += strip.height
    image = Image.new("RGB", (width, height), "white")
    below = 0
    for strip in strips:
        image.paste(strip, (0, below))
        below += strip.height
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue(), len(strips) - 1


def _strip(card: Card, thumbnails: Mapping[str, bytes], *, side: int, width: int) -> Image.Image:
    """Draw a card: on the left the query and the bars of the Combiner, on the right a row for each ranking."""
    left = MARGIN + side + TEXT_GAP
    room = LEFT_WIDTH - left - GAP
    lines = [*wrapped(card.heading, room), *wrapped(card.caption, room)[:CAPTION_LINES]]
    text_height = LINE * (len(lines) + len(card.bars))
    row_height = LINE + side + LABEL_HEIGHT
    rows_height = len(card.rows) * row_height
    strip = Image.new("RGB", (width, max(rows_height, text_height, side) + BOTTOM), "white")
    _paste(strip, thumbnails[card.reference], (MARGIN, MARGIN), side=side)
    below = _write(strip, lines, (left, MARGIN))
    _draw_bars(strip, card.bars, (left, below))
    for number, (title, row) in enumerate(card.rows.items()):
        top = MARGIN + number * row_height
        _write(strip, [row.heading(title)], (LEFT_WIDTH, top), GREY)
        _draw_row(strip, row, thumbnails, side=side, top=top + LINE)
    return strip


def _write(
    strip: Image.Image,
    lines: Sequence[str],
    corner: tuple[int, int],
    color: str | tuple[int, int, int] = "black",
) -> int:
    """Write lines one below the other, and return the y coordinate of the next line."""
    left, top = corner
    pen = ImageDraw.Draw(strip)
    for line in lines:
        pen.text((left, top), line, color, font_of(line))
        top += LINE
    return top


def _draw_bars(strip: Image.Image, bars: Mapping[str, float], corner: tuple[int, int]) -> None:
    """Draw the gate and the experts' weights of the Combiner, one bar per line."""
    left, top = corner
    pen = ImageDraw.Draw(strip)
    for name, share in bars.items():
        _write(strip, [f"{name} {share:.2f}"], (left, top), GREY)
        bar = left + BAR_LEFT
        pen.rectangle(
            (bar, top + BAR_TOP, bar + round(BAR_WIDTH * share), top + BAR_BOTTOM), fill=BLUE
        )
        top += LINE


def wrapped(text: str, room: int) -> list[str]:
    """Break a text into lines of at most about `room` pixels."""
    each = font_of(text).getlength(text) / max(len(text), 1)
    return textwrap.wrap(text, max(int(MEAN_LINE * room / each), 1)) if each else []


def font_of(text: str) -> Font:
    """Return a font for a text: DejaVu Sans, which comes with matplotlib, or the font that lacks the fewest characters.

    Without matplotlib, return Pillow's default font, which has only Western European characters.
    """
    file = _font_file(frozenset(text))
    return ImageFont.load_default(FONT_SIZE) if file is None else _opened(file)


@functools.cache
def _opened(file: str) -> Font:
    return ImageFont.truetype(file, FONT_SIZE)


@functools.cache
def _font_file(characters: frozenset[str]) -> str | None:
    matplotlib = importlib.util.find_spec("matplotlib")
    if matplotlib is None or matplotlib.origin is None:
        return None
    first = str(Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf")
    if not _unknown(characters, first):
        return first
    from matplotlib.font_manager import findSystemFonts

    files = [first, *sorted(findSystemFonts())]
    return min(files, key=lambda file: len(_unknown(characters, file)))


def _unknown(characters: frozenset[str], file: str | None) -> set[str]:
    """Return the characters that a font lacks; None is Pillow's default font, which has Latin-1."""
    return {
        char for char in characters if not char.isspace() and ord(char) not in _characters(file)
    }


@functools.cache
def _characters(file: str | None) -> frozenset[int]:
    if file is None:
        return frozenset(range(256))
    from matplotlib.ft2font import FT2Font

    try:
        face = FT2Font(file)
    except (OSError, RuntimeError):  # the font file is damaged
        return frozenset()
    return frozenset(face.get_charmap() if face.scalable else ())


def say_unknown(texts: Sequence[str]) -> None:
    """Log a warning about characters that the fonts chosen for these texts lack."""
    unknown: set[str] = set()
    for text in texts:
        characters = frozenset(text)
        unknown |= _unknown(characters, _font_file(characters))
    if unknown:
        logger.warning(
            "note: the picture of the sheet shows boxes instead of %s: install a font with these characters, such as "
            "Noto",
            "".join(sorted(unknown)),
        )


def _draw_row(
    strip: Image.Image,
    row: Row,
    thumbnails: Mapping[str, bytes],
    *,
    side: int,
    top: int,
) -> None:
    """Draw a ranking from left to right with outlined targets; targets that were not retrieved are added at the end."""
    pen = ImageDraw.Draw(strip)
    labels = {}
    for place, (name, similarity) in enumerate(row.results, start=1):
        labels[name] = f"{place}. {similarity:.3f}"
    for name, rank in row.not_shown.items():
        labels[name] = f"{rank + 1}."
    left = LEFT_WIDTH
    for name, label in labels.items():
        right, bottom = _paste(strip, thumbnails[name], (left, top), side=side)
        color = GREY
        if name in row.ranks:
            color = GREEN
            outline = (left - OUTLINE, top - OUTLINE, right + OUTLINE - 1, bottom + OUTLINE - 1)
            pen.rectangle(outline, outline=GREEN, width=OUTLINE)
        _write(strip, [label], (left, top + side + LABEL_GAP), color)
        left += side + GAP


def _paste(
    strip: Image.Image, jpeg: bytes, corner: tuple[int, int], *, side: int
) -> tuple[int, int]:
    """Paste an image, scaled to at most `side` pixels in width and height, and return its lower right corner."""
    image = ImageOps.contain(Image.open(io.BytesIO(jpeg)), (side, side))
    strip.paste(image, corner)
    left, top = corner
    return left + image.width, top + image.height
