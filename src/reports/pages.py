"""Self-contained HTML pages with one style, in which all text is escaped and all pictures are embedded."""

import html
from collections.abc import Iterable, Mapping, Sequence

STYLE = """
:root { color-scheme: light dark; --line: #8884; --mark: #1a9850; --soft: #8881; --link: #2166ac; --quiet: #595f66; }
@media (prefers-color-scheme: dark) { :root { --link: #92c5de; --mark: #66bd63; --quiet: #adb3ba; } }
* { box-sizing: border-box; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 1280px; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin-top: 2rem; }
a { color: var(--link); }
img { max-width: 100%; height: auto; }
pre, code { font: 13px/1.5 ui-monospace, monospace; overflow-wrap: anywhere; }
pre { background: var(--soft); padding: .6rem .8rem; overflow-x: auto; border-radius: 6px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { text-align: left; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td.value { overflow-wrap: anywhere; }
.command { display: flex; gap: .5rem; align-items: start; }
.command pre { flex: 1; min-width: 0; margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
button { font: inherit; padding: .35rem .8rem; border: 1px solid var(--line); border-radius: 6px; cursor: pointer; }
"""
# Script of the copy buttons. If the clipboard cannot be accessed, the command stays selected, to be copied by hand.
COPYING = """
for (const button of document.querySelectorAll(".command button"))
  button.addEventListener("click", async () => {
    getSelection().selectAllChildren(button.previousElementSibling);
    const done = () => { button.textContent = "Copied"; };
    const refused = () => { button.textContent = "Press Ctrl+C"; };
    await navigator.clipboard.writeText(getSelection().toString()).then(done, refused);
  });
"""


def page(title: str, parts: Iterable[str], *, style: str = "", script: str = "") -> str:
    """Return a complete page.

    Args:
        title: plain text, which is escaped here.
        parts: HTML.
    """
    body = "\n".join(parts)
    code = f"<script>{script}</script>\n" if script else ""
    # The empty icon keeps browsers from requesting one.
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{text(title)}</title>
<style>{STYLE}{style}</style>
</head>
<body>
<h1>{text(title)}</h1>
{body}
{code}</body>
</html>
"""


def text(content: object) -> str:
    """Escape any content for HTML, quotes included."""
    return html.escape(str(content))


def table(rows: Mapping[str, object]) -> str:
    """Return an HTML table with a row for each name and its value."""
    lines = []
    for name, value in rows.items():
        lines.append(f'<tr><th>{text(name)}</th><td class="value">{text(value)}</td></tr>')
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def matrix(columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """Return an HTML table of numbers with a header row and a header column."""
    head = "".join(f'<th class="number">{text(name)}</th>' for name in columns)
    lines = []
    for name, values in rows.items():
        cells = "".join(f'<td class="number">{text(value)}</td>' for value in values)
        lines.append(f"<tr><th>{text(name)}</th>{cells}</tr>")
    return f'<div class="wide"><table><tr><th></th>{head}</tr>{"".join(lines)}</table></div>'


def bars(shares: Mapping[str, float]) -> str:
    """Return HTML that shows fractions from 0 to 1 as named bars; the page's style must define `.bars`."""
    rows = []
    for name, share in shares.items():
        bar = f'<i style="width:{100 * share:.0f}%"></i>'
        rows.append(f"<span>{text(name)}</span>{bar}<span>{share:.2f}</span>")
    return f'<div class="bars">{"".join(rows)}</div>'


def command(line: str) -> str:
    """Return HTML of a command with a button that copies it; the page needs the script `COPYING`."""
    return f'<div class="command"><pre>{text(line)}</pre><button type="button">Copy</button></div>'
