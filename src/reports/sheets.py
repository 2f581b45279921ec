"""Retrieval sheets: queries and their results on a self-contained HTML page."""

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from reports import pages
from runtime.choices import WHITE
from runtime.image_files import jpeg, read_photo, unreadable

MOST_THUMBNAIL_BYTES = 14_000_000  # largest total size of a page's thumbnails before base64
PLACE = (180, 110)  # largest width and height of an image on a page, in pixels
THUMBNAIL_SIDES = (176, 144, 112, 88, 64)  # in pixels; the largest side that fits is used

Nearest = Sequence[tuple[str, float]]  # (image, similarity), most similar first

# Largest number of images per line, by the width of the screen.
ROOM = {"wide": 11, "middle": 6, "narrow": 5}
SHEET_STYLE = """
body { max-width: 1600px; }
.query { border-top: 1px solid var(--line); padding: 1rem 0; }
.query { display: grid; grid-template-columns: 190px 1fr; gap: 1rem; }
@media (max-width: 640px) { .query { grid-template-columns: 1fr; } }
.query > * { min-width: 0; }
.caption { font-weight: 600; margin: .3rem 0; overflow-wrap: anywhere; }
.rank, .about { color: var(--quiet); font-size: 13px; overflow-wrap: anywhere; }
.row { display: grid; grid-template-columns: repeat(var(--wide), minmax(0, 180px)); }
.row { gap: .5rem; padding: 3px 3px .5rem; }
@media (max-width: 1100px) { .row { grid-template-columns: repeat(var(--middle), minmax(0, 180px)); } }
@media (max-width: 640px) { .row { grid-template-columns: repeat(var(--narrow), minmax(0, 180px)); } }
figure { margin: 0; min-width: 0; max-width: min(180px, 100%); } /* as in PLACE */
figure img { display: block; max-width: 100%; height: auto; border-radius: 4px; }
figure.target img { outline: 3px solid var(--mark); }
figcaption { font-size: 12px; color: var(--quiet); overflow-wrap: anywhere; }
figure.target figcaption { color: var(--mark); font-weight: 600; }
.bars { display: grid; grid-template-columns: auto 1fr auto; gap: 1px .4rem; font-size: 12px; align-items: center; }
.bars i { display: block; height: 8px; background: var(--link); border-radius: 2px; }
"""
# An image is decoded only when it is scrolled near the screen, since decoding a whole sheet would need much memory.
SHOW_WHEN_NEAR = """
const show = image => { image.src = "data:image/jpeg;base64," + pictures[image.dataset.name]; };
const near = new IntersectionObserver(entries => {
  for (const entry of entries.filter(entry => entry.isIntersecting)) {
    near.unobserve(entry.target);
    show(entry.target);
  }
}, { rootMargin: "1200px" });
const images = document.querySelectorAll("img[data-name]");
for (const image of images) near.observe(image);
addEventListener("beforeprint", () => images.forEach(show));
"""


@dataclass(frozen=True)
class Row:
    """One ranking of a query.

    Attributes:
        results: retrieved images with their similarities.
        ranks: target -> its rank, counted from 0; the annotated target, for which the query was written, comes first.
    """

    results: Nearest
    ranks: Mapping[str, int]

    @property
    def names(self) -> list[str]:
        """Return the names of the retrieved images."""
        return [name for name, _ in self.results]

    @property
    def not_shown(self) -> dict[str, int]:
        """Return the targets that are not among the retrieved images, with their ranks."""
        return {name: rank for name, rank in self.ranks.items() if name not in self.names}

    def heading(self, title: str) -> str:
        """Return the heading of a ranking: its title and the ranks of the targets."""
        if not self.ranks:
            return title
        told = "target at rank" if len(self.ranks) == 1 else "targets at ranks"
        return f"{title}: {told} {', '.join(str(rank + 1) for rank in self.ranks.values())}"


@dataclass(frozen=True, kw_only=True)
class Card:
    """Content of a sheet for one query.

    Attributes:
        label: name of the query, such as "dress:12" or "12060".
        kinds: kinds of the query; empty if its benchmark has none.
        extended: additional remarks of the annotators.
        rows: title -> ranking of the gallery or of the query's group.
        bars: name -> fraction: the gate (fraction of text in the residual) and the weights of the experts.
    """

    label: str
    caption: str
    reference: str
    rows: Mapping[str, Row]
    bars: Mapping[str, float]
    kinds: Sequence[str] = ()
    extended: Sequence[str] = ()

    @property
    def heading(self) -> str:
        """Return the heading of a query: its label and kinds."""
        return ", ".join([self.label, *self.kinds])

    @property
    def images(self) -> set[str]:
        """Return all images that the card shows."""
        names = {self.reference}
        for row in self.rows.values():
            names.update(row.names, row.ranks)
        return names


def make_card(label: str, query: dict[str, Any], protocol: str, *, k: int) -> Card:
    """Make a card from a record of a rankings file.

    Args:
        k: number of results to show from the ranking of the gallery.
    """
    found = query["protocols"][protocol]
    caption = found.get("caption", query["caption"])
    rows = {"gallery": Row(found["nearest"][:k], _target_ranks(query, found))}
    if "in_group" in query:
        rows["subset"] = Row(query["in_group"]["nearest"], _target_ranks(query, query["in_group"]))
    return Card(
        label=label,
        caption=caption,
        reference=query["reference"],
        rows=rows,
        bars=shares(query.get("gate"), query.get("experts", [])),
        kinds=query.get("kinds", []),
        extended=query.get("extended", []),
    )


def _target_ranks(query: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, int]:
    """Return the rank of each target, the annotated target first; empty for a test query."""
    if query["target"] is None:
        return {}
    others = dict(zip(query["other_targets"], found.get("other_ranks", []), strict=False))
    return {query["target"]: found["rank"], **others}


def shares(gate: float | None, experts: Sequence[float]) -> dict[str, float]:
    """Return the fractions that a query's bars show, by name: the Combiner's gate, and the weight of each expert."""
    named = {} if gate is None else {"text in the gate": gate}
    for number, weight in enumerate(experts):
        named[f"expert {number}"] = weight
    return named


def load_thumbnails(paths: Mapping[str, Path], background: str = WHITE) -> dict[str, bytes]:
    """Return a JPEG thumbnail of each image, with the largest side at which all of them fit in a page.

    Args:
        background: background of transparent images, see `read_photo`.

    Raises:
        UserError: an image cannot be decoded.
    """
    images = {}
    for name, path in paths.items():
        try:
            images[name] = read_photo(path, background, formats=None)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise unreadable(path, error) from None
        images[name].thumbnail((THUMBNAIL_SIDES[0], THUMBNAIL_SIDES[0]))
    for side in THUMBNAIL_SIDES:
        thumbnails = {name: jpeg(image, side) for name, image in images.items()}
        if sum(map(len, thumbnails.values())) <= MOST_THUMBNAIL_BYTES:
            break
    return thumbnails


def sheet(
    title: str,
    sections: Mapping[str, Sequence[Card]],
    thumbnails: Mapping[str, bytes],
    *,
    about: Sequence[str],
) -> str:
    """Return a page of queries in sections; an image that is shown several times is embedded only once."""
    pictures = _pictures(thumbnails)
    parts = [f'<p class="about">{pages.text(line)}</p>' for line in about]
    for name, cards in sections.items():
        parts.append(f"<h2>{pages.text(name)}</h2>")
        parts += [_query(card, pictures) for card in cards]
    return pages.page(title, parts, style=SHEET_STYLE, script=_script(pictures, thumbnails))


@dataclass(frozen=True)
class SheetImage:
    """Key and size of an image on a page.

    Attributes:
        key: short name that refers to the embedded image.
        width, height: size in pixels, with the aspect ratio of the image.
    """

    key: str
    width: int
    height: int


def _pictures(thumbnails: Mapping[str, bytes]) -> dict[str, SheetImage]:
    """Return the key of each image and its size on a page."""
    pictures = {}
    for number, (name, thumbnail) in enumerate(thumbnails.items()):
        with Image.open(io.BytesIO(thumbnail)) as image:
            scale = min(PLACE[0] / image.width, PLACE[1] / image.height)
            size = [max(round(side * scale), 1) for side in image.size]
        pictures[name] = SheetImage(str(number), *size)
    return pictures


def _query(card: Card, pictures: Mapping[str, SheetImage]) -> str:
    rows = []
    for title, row in card.rows.items():
        figures = []
        for place, (name, similarity) in enumerate(row.results, start=1):
            label = f"{place}. {similarity:.3f}"
            figures.append(_figure(pictures, name, label, is_target=name in row.ranks))
        for name, rank in row.not_shown.items():
            label = f"{rank + 1}. {'the' if name == next(iter(row.ranks)) else 'another'} target"
            figures.append(_figure(pictures, name, label, is_target=True))
        rows.append(f'<div class="rank">{pages.text(row.heading(title))}</div>{_in_lines(figures)}')
    extended = "".join(f'<p class="about">{pages.text(said)}</p>' for said in card.extended)
    return (
        f'<div class="query"><div>{_figure(pictures, card.reference, card.heading)}'
        f'<p class="caption">{pages.text(card.caption)}</p>{extended}{pages.bars(card.bars)}</div>'
        f"<div>{''.join(rows)}</div></div>"
    )


def _in_lines(figures: Sequence[str]) -> str:
    """Return HTML of figures in as few lines as the screen allows, all lines of about the same length."""
    columns = []
    for screen, room in ROOM.items():
        lines = math.ceil(len(figures) / room)
        columns.append(f"--{screen}:{math.ceil(len(figures) / max(lines, 1))}")
    return f'<div class="row" style="{";".join(columns)}">{"".join(figures)}</div>'


def _figure(
    pictures: Mapping[str, SheetImage], name: str, label: str, *, is_target: bool = False
) -> str:
    kind = ' class="target"' if is_target else ""
    escaped = pages.text(name)
    shown = pictures[name]
    size = f'width="{shown.width}" height="{shown.height}"'
    return (
        f'<figure{kind} title="{escaped}"><img data-name="{shown.key}" {size} alt="{escaped}">'
        f"<figcaption>{pages.text(label)}</figcaption></figure>"
    )


def results_page(
    title: str,
    reference: str | None,
    results: Nearest,
    *,
    about: str,
    thumbnails: Mapping[str, bytes],
    marks: Mapping[str, str],
) -> str:
    """Return a page with the results of one query.

    Args:
        reference: image of the query; None for a query that consists only of text.
        marks: image -> text that is shown after its name.
        thumbnails: image -> thumbnail, for all results and the reference.
    """
    pictures = _pictures(thumbnails)
    figures = []
    for place, (name, similarity) in enumerate(results, start=1):
        label = f"{place}. {similarity:.3f} {Path(name).name}{marks.get(name, '')}"
        figures.append(_figure(pictures, name, label))
    parts = [
        f'<p class="about">{pages.text(about)}</p>',
        "" if reference is None else _figure(pictures, reference, "reference"),
        _in_lines(figures),
    ]
    return pages.page(title, parts, style=SHEET_STYLE, script=_script(pictures, thumbnails))


def _script(pictures: Mapping[str, SheetImage], thumbnails: Mapping[str, bytes]) -> str:
    """Return JavaScript that contains each image once and shows it wherever it occurs on the page."""
    content = {pictures[name].key: base64.b64encode(of).decode() for name, of in thumbnails.items()}
    return f"const pictures = {json.dumps(content)};{SHOW_WHEN_NEAR}"
