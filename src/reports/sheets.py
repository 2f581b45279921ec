"""Retrieval sheets: queries with what was retrieved for them, as a self-contained page and as a picture."""

import base64
import io
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from reports import pages
from runtime.image_files import decoded
from utils import UserError, first_line

MOST_BYTES = 14_000_000  # of thumbnails in a page, which base64 makes a third longer
SIDES = (176, 144, 112, 88, 64)  # pixels of a thumbnail, the largest that fits
TALLEST = 30_000  # pixels of a picture, which viewers still open
LEFT, LINE = 330, 15  # pixels: where a picture's answers begin, and a line of its text
GREEN, GREY, BLUE = (26, 152, 80), (110, 110, 110), (33, 102, 172)

STYLE = """
.query { border-top: 1px solid var(--line); padding: 1rem 0; }
.query { display: grid; grid-template-columns: 190px 1fr; gap: 1rem; }
@media (max-width: 640px) { .query { grid-template-columns: 1fr; } }
.query > * { min-width: 0; }
.caption { font-weight: 600; margin: .3rem 0; overflow-wrap: anywhere; }
.rank, .about { color: #777; font-size: 13px; overflow-wrap: anywhere; }
.row { display: flex; flex-wrap: wrap; gap: .5rem; padding: 3px 3px .5rem; }
figure { margin: 0; flex: none; max-width: 180px; }
figure img { display: block; height: 110px; width: auto; object-fit: contain; border-radius: 4px; }
figure.target img { outline: 3px solid var(--mark); }
figcaption { font-size: 12px; color: #777; overflow-wrap: anywhere; }
figure.target figcaption { color: var(--mark); font-weight: 600; }
.bars { display: grid; grid-template-columns: auto 1fr auto; gap: 1px .4rem; font-size: 12px; align-items: center; }
.bars i { display: block; height: 8px; background: var(--link); border-radius: 2px; }
"""
SCRIPT = """
for (const image of document.querySelectorAll("img[data-name]"))
  image.src = "data:image/jpeg;base64," + pictures[image.dataset.name];
"""


@dataclass(frozen=True)
class Card:
    """One query as a sheet shows it.

    Attributes:
        label: what it is called, as "dress 12" or "pairid 12060".
        rank: of the target in the gallery, 0 is the first place.
        rows: title -> (image, similarity) of what was retrieved, the nearest first, and the target's rank in it.
        bars: name -> share: how much of the residual is text, and the weights of the experts.
    """

    label: str
    caption: str
    reference: str
    target: str
    rank: int
    rows: Mapping[str, tuple[Sequence[tuple[str, float]], int]]
    bars: Mapping[str, float]

    @property
    def images(self) -> set[str]:
        """All images that it shows."""
        return {self.reference, self.target, *(name for found, _ in self.rows.values() for name, _ in found)}


def make_card(label: str, query: dict[str, Any], protocol: str, *, k: int) -> Card:
    """A card from a record (see `records`).

    Args:
        k: images to show of the gallery's ranking.
    """
    found = query["protocols"][protocol]
    rows = {"gallery": (found["nearest"][:k], found["rank"])}
    if "in_group" in query:
        rows["subset"] = (query["in_group"]["nearest"], query["in_group"]["rank"])
    bars = shares(query.get("gate"), query.get("experts", []))
    return Card(label, query["caption"], query["reference"], query["target"], found["rank"], rows, bars)


def shares(gate: float | None, experts: Sequence[float]) -> dict[str, float]:
    """What the Combiner did with a query, by name: how much of the residual is text, and the weights of the experts."""
    named = {} if gate is None else {"text in the gate": gate}
    return named | {f"expert {number}": weight for number, weight in enumerate(experts)}


def load_thumbnails(paths: Mapping[str, Path]) -> dict[str, bytes]:
    """Image name -> a small JPEG, as large as all of them together may be.

    Raises:
        UserError: an image cannot be decoded.
    """
    images = {}
    for name, path in paths.items():
        try:
            images[name] = decoded(path).convert("RGB")
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"image {path} cannot be decoded ({first_line(error)}): see check_dataset.py") from None
        images[name].thumbnail((SIDES[0], SIDES[0]))
    for side in SIDES:
        small = {name: pages.jpeg(image, side) for name, image in images.items()}
        if sum(map(len, small.values())) <= MOST_BYTES:
            break
    return small


def sheet(title: str, about: str, sections: Mapping[str, Sequence[Card]], thumbnails: Mapping[str, bytes]) -> str:
    """A page of queries in sections; each picture is in it once."""
    keys = {name: str(number) for number, name in enumerate(thumbnails)}
    parts = [f'<p class="about">{pages.text(about)}</p>']
    for name, cards in sections.items():
        parts += [f"<h2>{pages.text(name)}</h2>", *(_query(card, keys) for card in cards)]
    return pages.page(title, parts, STYLE, _script(keys, thumbnails))


def _query(card: Card, keys: Mapping[str, str]) -> str:
    """A card in HTML."""
    rows = []
    for title, (found, rank) in card.rows.items():
        figures = [_figure(keys, name, f"{n}. {s:.3f}", name == card.target) for n, (name, s) in enumerate(found, 1)]
        if card.target not in [name for name, _ in found]:
            figures.append(_figure(keys, card.target, f"{rank + 1}. the target", True))
        head = f'<div class="rank">{pages.text(title)}: target at place {rank + 1}</div>'
        rows.append(f'{head}<div class="row">{"".join(figures)}</div>')
    return (
        f'<div class="query"><div>{_figure(keys, card.reference, card.label, False)}'
        f'<p class="caption">{pages.text(card.caption)}</p>{pages.bars(card.bars)}</div>'
        f"<div>{''.join(rows)}</div></div>"
    )


def _figure(keys: Mapping[str, str], name: str, label: str, is_target: bool) -> str:
    kind = ' class="target"' if is_target else ""
    return (
        f'<figure{kind} title="{pages.text(name)}"><img data-name="{keys[name]}" alt="{pages.text(name)}">'
        f"<figcaption>{pages.text(label)}</figcaption></figure>"
    )


def results_page(
    title: str, reference: str, found: Sequence[tuple[str, float]], *, about: str, thumbnails: Mapping[str, bytes]
) -> str:
    """A page of what was retrieved for one query.

    Args:
        found: (image, similarity), the nearest first.
        thumbnails: image -> its thumbnail, the reference's too.
    """
    keys = {name: str(number) for number, name in enumerate(thumbnails)}
    figures = [_figure(keys, name, f"{n}. {s:.3f} {Path(name).name}", False) for n, (name, s) in enumerate(found, 1)]
    parts = [f'<p class="about">{pages.text(about)}</p>', _figure(keys, reference, "reference", False)]
    parts.append(f'<div class="row">{"".join(figures)}</div>')
    return pages.page(title, parts, STYLE, _script(keys, thumbnails))


def _script(keys: Mapping[str, str], small: Mapping[str, bytes]) -> str:
    """What puts each picture, of which there is one, in its places."""
    content = {keys[name]: base64.b64encode(thumbnail).decode() for name, thumbnail in small.items()}
    return f"const pictures = {json.dumps(content)};{SCRIPT}"


def picture(cards: Sequence[Card], thumbnails: Mapping[str, bytes], side: int = 96) -> tuple[bytes, int]:
    """A PNG of queries below one another, and how many of them it has room for.

    Args:
        side: pixels of a place for an image.
    """
    places = max(len(found) for card in cards for found, _ in card.rows.values()) + 1
    width = LEFT + places * (side + 6)
    strips: list[Image.Image] = []
    height = 0
    for card in cards:
        strip = _strip(card, thumbnails, side, width)
        if strips and height + strip.height > TALLEST:
            break
        strips.append(strip)
        height += strip.height
    sheet, top = Image.new("RGB", (width, height), "white"), 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue(), len(strips)


def _strip(card: Card, thumbnails: Mapping[str, bytes], side: int, width: int) -> Image.Image:
    """A card as a part of the picture: left the query and what the Combiner did, right a row for each ranking."""
    words = [card.label, *textwrap.wrap(card.caption, 32)[:6]]
    height = max(len(card.rows) * (side + 22), LINE * (len(words) + len(card.bars)), side) + 14
    strip = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(strip), ImageFont.load_default(12)
    _paste(strip, thumbnails[card.reference], (6, 6), side)
    x, y = side + 14, 6
    for word in words:
        pen.text((x, y), word, "black", font)
        y += LINE
    for name, share in card.bars.items():
        pen.text((x, y), f"{name} {share:.2f}", GREY, font)
        pen.rectangle((x + 122, y + 4, x + 122 + round(80 * share), y + 11), fill=BLUE)
        y += LINE
    for number, (found, rank) in enumerate(card.rows.values()):
        labels = {name: f"{n}. {s:.3f}" for n, (name, s) in enumerate(found, 1)}
        labels.setdefault(card.target, f"{rank + 1}.")
        for column, (name, label) in enumerate(labels.items()):
            x, y = LEFT + column * (side + 6), 6 + number * (side + 22)
            right, bottom = _paste(strip, thumbnails[name], (x, y), side)
            if name == card.target:
                pen.rectangle((x - 3, y - 3, right + 2, bottom + 2), outline=GREEN, width=3)
            pen.text((x, y + side + 3), label, GREEN if name == card.target else GREY, font)
    return strip


def _paste(strip: Image.Image, small: bytes, corner: tuple[int, int], side: int) -> tuple[int, int]:
    """Put a thumbnail at a place, at most `side` wide and high; returns its lower right corner."""
    image = ImageOps.contain(Image.open(io.BytesIO(small)), (side, side))
    strip.paste(image, corner)
    return corner[0] + image.width, corner[1] + image.height
