"""What each expert takes: a heat map over the splits, its words, its typical captions, as a page."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from reports import pages

FEWEST = 3  # times that a word must occur to be called an expert's
SHOWN = 8  # words and captions of an expert

STYLE = """
td.heat { text-align: center; font-variant-numeric: tabular-nums; padding: .35rem .8rem; }
.expert { border-top: 1px solid var(--line); padding: .5rem 0; }
"""

Records = Mapping[str, Sequence[dict[str, Any]]]


def expert_report(title: str, records: Records) -> str:
    """The page, from records of a mixture (see `records`)."""
    experts = range(len(next(iter(records.values()))[0]["experts"]))
    everything = [query for queries in records.values() for query in queries]
    columns = {**records, "all": everything}
    parts = ["<p>Mean weight of each expert over the queries: a row is an expert, a column a split.</p>"]
    head = "".join(f"<th>{pages.text(name)}</th>" for name in columns)
    rows = []
    for expert in experts:
        means = [sum(q["experts"][expert] for q in queries) / len(queries) for queries in columns.values()]
        cells = "".join(f'<td class="heat" style="background:rgba(33,102,172,{m:.2f})">{m:.2f}</td>' for m in means)
        rows.append(f"<tr><th>expert {expert}</th>{cells}</tr>")
    parts.append(f'<div class="wide"><table><tr><th></th>{head}</tr>{"".join(rows)}</table></div>')
    parts += [_expert(expert, everything) for expert in experts]
    return pages.page(title, parts, STYLE)


def _expert(expert: int, queries: Sequence[dict[str, Any]]) -> str:
    """What one expert weighs most in."""
    own = [query for query in queries if query["experts"][expert] == max(query["experts"]) > 0]
    typical = sorted(own, key=lambda query: -query["experts"][expert])[:SHOWN]
    captions = "".join(f"<li>{q['experts'][expert]:.2f} {pages.text(q['caption'])}</li>" for q in typical)
    words = ", ".join(f"{word} ({ratio:.1f} x)" for word, ratio in typical_words(own, queries))
    return (
        f'<div class="expert"><h2>Expert {expert}</h2><p>weighs most in {len(own)} of {len(queries)} queries</p>'
        f"<p>Words that are more frequent there: {pages.text(words) or 'none'}</p><ul>{captions}</ul></div>"
    )


def typical_words(own: Sequence[dict[str, Any]], queries: Sequence[dict[str, Any]]) -> list[tuple[str, float]]:
    """Words of an expert's captions, and how many times more of them have it than of all captions."""
    here, everywhere = (_captions_with(some) for some in (own, queries))
    ratios = {w: (n / len(own)) / (everywhere[w] / len(queries)) for w, n in here.items() if n >= FEWEST}
    frequent = {word: ratio for word, ratio in ratios.items() if ratio > 1}
    return sorted(frequent.items(), key=lambda pair: -pair[1])[:SHOWN]


def _captions_with(queries: Sequence[dict[str, Any]]) -> Counter[str]:
    """Word -> how many captions have it."""
    return Counter(word for query in queries for word in set(re.findall(r"\w+", query["caption"].lower())))
