"""A retrieval sheet as a picture: the cards of `reports.sheets` below one another in a PNG."""

import io
import textwrap
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

from reports.sheets import Card, Row

# Pixels.
TALLEST = 30_000  # viewers still open it
LEFT_WIDTH = 330  # of the query; the answers begin there
MARGIN = 6
GAP = 6  # between two images
LINE = 15  # of text
TEXT_GAP = 8  # between the reference and the text beside it
LABEL_GAP = 3  # between an image and its label
LABEL_HEIGHT = 22  # with the gaps around it
BOTTOM = 14  # of a strip, together with the margin above
OUTLINE = 3  # width of a target's outline
FONT_SIZE = 12
BAR_LEFT = 122  # from the beginning of the name
BAR_WIDTH = 80  # of a share of 1
BAR_TOP = 4  # from the top of the line
BAR_BOTTOM = 11

CAPTION_WIDTH = 32  # characters of a line
CAPTION_LINES = 6
GREEN = (26, 152, 80)
GREY = (110, 110, 110)
BLUE = (33, 102, 172)


def picture(
    cards: Sequence[Card], thumbnails: Mapping[str, bytes], side: int = 96
) -> tuple[bytes, int]:
    """A PNG of queries below one another, and how many of them it has room for.

    Args:
        side: pixels of a place for an image.
    """
    places = 0
    for card in cards:
        for row in card.rows.values():
            places = max(places, len(row.answers) + len(row.ranks))
    width = LEFT_WIDTH + places * (side + GAP)
    strips: list[Image.Image] = []
    height = 0
    for card in cards:
        strip = _strip(card, thumbnails, side=side, width=width)
        if strips and height + strip.height > TALLEST:
            break
        strips.append(strip)
        height += strip.height
    image = Image.new("RGB", (width, height), "white")
    top = 0
    for strip in strips:
        image.paste(strip, (0, top))
        top += strip.height
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue(), len(strips)


def _strip(card: Card, thumbnails: Mapping[str, bytes], *, side: int, width: int) -> Image.Image:
    """A card as a part of the picture: left the query and what the Combiner did, right a row for each ranking."""
    lines = [card.label, *textwrap.wrap(card.caption, CAPTION_WIDTH)[:CAPTION_LINES]]
    text_height = LINE * (len(lines) + len(card.bars))
    rows_height = len(card.rows) * (side + LABEL_HEIGHT)
    strip = Image.new("RGB", (width, max(rows_height, text_height, side) + BOTTOM), "white")
    _paste(strip, thumbnails[card.reference], (MARGIN, MARGIN), side=side)
    _draw_text(strip, lines, card.bars, left=MARGIN + side + TEXT_GAP)
    for number, row in enumerate(card.rows.values()):
        top = MARGIN + number * (side + LABEL_HEIGHT)
        _draw_row(strip, row, thumbnails, side=side, top=top)
    return strip


def _draw_text(
    strip: Image.Image, lines: Sequence[str], bars: Mapping[str, float], *, left: int
) -> None:
    """The query in words, and below them the bars of what the Combiner did."""
    pen = ImageDraw.Draw(strip)
    font = ImageFont.load_default(FONT_SIZE)
    top = MARGIN
    for line in lines:
        pen.text((left, top), line, "black", font)
        top += LINE
    for name, share in bars.items():
        pen.text((left, top), f"{name} {share:.2f}", GREY, font)
        bar = left + BAR_LEFT
        pen.rectangle(
            (bar, top + BAR_TOP, bar + round(BAR_WIDTH * share), top + BAR_BOTTOM), fill=BLUE
        )
        top += LINE


def _draw_row(
    strip: Image.Image,
    row: Row,
    thumbnails: Mapping[str, bytes],
    *,
    side: int,
    top: int,
) -> None:
    """A ranking from left to right, the targets outlined, and added at the end if they are not among the answers."""
    pen = ImageDraw.Draw(strip)
    font = ImageFont.load_default(FONT_SIZE)
    labels = {}
    for place, (name, similarity) in enumerate(row.answers, start=1):
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
        pen.text((left, top + side + LABEL_GAP), label, color, font)
        left += side + GAP


def _paste(
    strip: Image.Image, jpeg: bytes, corner: tuple[int, int], *, side: int
) -> tuple[int, int]:
    """Put an image at a place, at most `side` wide and high; returns its lower right corner."""
    image = ImageOps.contain(Image.open(io.BytesIO(jpeg)), (side, side))
    strip.paste(image, corner)
    left, top = corner
    return left + image.width, top + image.height
