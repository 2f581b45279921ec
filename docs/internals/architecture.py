"""Generate from the code: architecture.svg, the layers and imports of src/, and the tables of architecture.md.

python docs/internals/architecture.py    # or `make architecture`: after a change of files or imports
"""

import ast
import textwrap
from collections import Counter
from html import escape
from pathlib import Path

from layers import FILES, LAYER_OF, LAYERS, SRC, box_of, direct, imports, name, tree

# Left and right edge of each box, chosen so that each arrow can go straight down between boxes.
PLACES = {
    "scripts": (50, 980), "cli": (50, 840), "openmoji": (860, 980),
    "image_search": (50, 340), "evaluation": (360, 560), "training": (580, 840),
    "models": (50, 680), "settings": (360, 680), "benchmarks": (360, 680), "reports": (700, 840),
    "data_utils": (50, 190), "combiner": (200, 340), "runtime": (50, 840), "utils": (50, 980),
}  # fmt: skip
# In pixels: width of the picture, gap between layers, height of a text line, height of a table cell.
WIDTH, GAP, LINE, CELL = 1000, 38, 17, 26
TABLES = ("<!-- begin: written by `make architecture` -->\n", "<!-- end -->\n")
LEGEND = [
    "How often the files of a row import those",
    "of a column. Above, an arrow that a longer",
    "way down implies is left out.",
]
STYLE = """
text { font: 12px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #3b4252; }
.file { font: 12px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #24292f; }
.name { font-size: 15px; font-weight: 600; fill: #0b3d66; }
.layer { font-size: 18px; font-weight: 600; fill: #9aa5b1; }
.middle { text-anchor: middle; }
.end { text-anchor: end; }
"""


def summary(file: Path) -> str:
    """Return the first line of a module's docstring."""
    docstring = ast.get_docstring(tree(file))
    return docstring.splitlines()[0]


def text(x: float, y: float, content: object, kind: str = "") -> str:
    """Return a line of text; its CSS class, `kind`, decides whether it begins, is centred or ends at x."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(str(content))}</text>'


def box(title: str, top: float) -> tuple[float, list[str]]:
    """Return height and shapes of a box, with its name, its docstring, and its files in columns."""
    left, right = PLACES[title]
    is_package = (SRC / title).is_dir()
    lines = []
    if is_package:
        lines = textwrap.wrap(summary(SRC / title / "__init__.py"), (right - left - 24) * 10 // 64)
    paths = [
        f
        for f in FILES
        if box_of(name(f)) == title and f.stem != "__init__" and (is_package or title == "scripts")
    ]
    files = [path.name for path in paths]
    shapes = [
        text(
            left + 12,
            top + 22,
            f"{title}/" if is_package else title if files else f"{title}.py",
            "name",
        )
    ]
    shapes += [text(left + 12, top + 40 + LINE * row, line) for row, line in enumerate(lines)]
    first = top + 44 + LINE * len(lines)
    columns = max(1, (right - left - 12) // (max(map(len, files), default=1) * 7.3 + 16))
    rows = -(-len(files) // int(columns))
    for place, file in enumerate(files):
        x = left + 12 + place // rows * (right - left - 12) / columns
        shapes.append(text(x, first + LINE * (place % rows), file, "file"))
    height = 34 + LINE * (len(lines) + rows) + (10 if files else 0)
    return height, shapes


def clear_x(upper: str, lower: str, taken: list[float]) -> float:
    """Return an x at which an arrow can go straight down from box to box, clear of other boxes and arrows."""
    edges = [PLACES[upper], PLACES[lower]]
    between = [
        PLACES[b] for b, layer in LAYER_OF.items() if LAYER_OF[lower] < layer < LAYER_OF[upper]
    ]
    ways = range(max(left for left, _ in edges) + 20, min(right for _, right in edges) - 19, 5)
    clear = [x for x in ways if not any(left - 8 < x < right + 8 for left, right in between)]
    apart = [x for x in clear if all(abs(x - other) > 24 for other in taken)]
    if not apart:
        raise SystemExit(
            f"{upper} imports {lower}, and no arrow goes straight down: move a box in PLACES"
        )
    return apart[len(apart) // 2]


def layers(counts: Counter[tuple[str, str]]) -> tuple[float, list[str]]:
    """Return height and shapes of the layers, with the direct imports as arrows."""
    top, shapes, tops, bottoms = 20.0, [], {}, {}
    for number in range(len(LAYERS) - 1, -1, -1):
        drawn = {title: box(title, top) for title in PLACES if LAYER_OF[title] == number}
        height = max(own for own, _ in drawn.values())
        shapes.append(text(24, top + 23, number + 1, "layer middle"))
        for title, (_, content) in drawn.items():
            left, right = PLACES[title]
            look = 'rx="6" fill="#eef4fa" stroke="#8fb0cc"'
            shapes += [
                f'<rect x="{left}" y="{top:g}" width="{right - left}" height="{height:g}" {look}/>',
                *content,
            ]
            tops[title], bottoms[title] = top, top + height
        top += height + GAP
    taken: list[float] = []
    for upper, lower in sorted(
        direct(counts), key=lambda pair: PLACES[pair[1]][1] - PLACES[pair[1]][0]
    ):
        x, end = clear_x(upper, lower, taken), tops[lower]
        taken.append(x)
        line = f'<path d="M{x} {bottoms[upper]:g}V{end - 8:g}" stroke-width="{1 + counts[upper, lower] / 4:g}"'
        head = f'<path d="M{x - 7} {end - 11:g}h14l-7 10z" fill="#c2571a"/>'
        shapes += [f'{line} stroke="#c2571a"/>', head, text(x + 11, end - 15, counts[upper, lower])]
    return top - GAP, shapes


def table(counts: Counter[tuple[str, str]], top: float) -> tuple[float, list[str]]:
    """Return bottom and shapes of the table of imports: a row imports a column."""
    titles = sorted(PLACES, key=lambda title: (-LAYER_OF[title], PLACES[title]))
    left = 408
    shapes = [text(50, top + 20, "All imports", "name")]
    shapes += [text(50, top + 40 + LINE * row, line) for row, line in enumerate(LEGEND)]
    for column, title in enumerate(titles[1:]):
        x = left + (column + 0.5) * 2 * CELL
        shapes.append(
            f'<g transform="rotate(-35 {x:g} {top + 68})">{text(x - 6, top + 68, title)}</g>'
        )
    for row, upper in enumerate(titles[:-1]):
        y = top + 78 + row * CELL
        shapes.append(text(left - 12, y + 17, upper, "end"))
        for column, lower in enumerate(titles[1:]):
            count = counts[upper, lower]
            look = (
                f'fill="#c2571a" fill-opacity="{0.12 + count / 40:g}"'
                if count
                else 'fill="#f1f3f5"'
            )
            x = left + column * 2 * CELL
            shapes.append(
                f'<rect x="{x}" y="{y:g}" width="{2 * CELL - 2}" height="{CELL - 2}" rx="3" {look}/>'
            )
            if count:
                shapes.append(text(x + CELL - 1, y + 17, count, "middle"))
    return top + 78 + (len(titles) - 1) * CELL, shapes


def picture() -> str:
    """Return the picture as SVG, with its own background, for light and dark pages."""
    counts = imports()
    middle, boxes = layers(counts)
    bottom, cells = table(counts, middle + 30)
    size = f'width="{WIDTH}" height="{bottom + 20:g}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 20:g}" {size}>'
    background = f'<rect {size} rx="10" fill="#ffffff"/>'
    return "\n".join([head, f"<style>{STYLE}</style>", background, *boxes, *cells, "</svg>"]) + "\n"


def tables() -> str:
    """Return the tables of architecture.md: a row for each file, with the first line of its docstring."""
    parts = []
    for folder in sorted({file.parent for file in FILES}, key=layer_and_name):
        parts.append(f"\n### `{folder.relative_to(SRC.parent)}/`\n\n")
        if folder != SRC:
            parts.append(f"{summary(folder / '__init__.py')}\n\n")
        parts.append("| file | contents |\n|---|---|\n")
        files = [file for file in FILES if file.parent == folder and file.stem != "__init__"]
        parts += [f"| `{file.name}` | {summary(file)} |\n" for file in files]
    return "".join([*parts, "\n"])


def layer_and_name(folder: Path) -> tuple[int, Path]:
    """Return a key that sorts folders from the top layer down; a nested folder follows its parent."""
    outer = folder.relative_to(SRC).parts[:1]
    return -LAYER_OF[outer[0] if outer else "scripts"], folder


def document(page: str) -> str:
    """Return the text of architecture.md with updated tables."""
    before, rest = page.split(TABLES[0])
    after = rest.split(TABLES[1])[1]
    return "".join([before, TABLES[0], tables(), TABLES[1], after])


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(picture(), encoding="utf-8")
    file = Path(__file__).with_suffix(".md")
    file.write_text(document(file.read_text(encoding="utf-8")), encoding="utf-8")
