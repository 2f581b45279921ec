"""Write the page of the experts: a heat map over the splits, words and captions that are typical of each expert."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from reports import pages

LEAST_OCCURRENCES = 3  # of a word that is called typical of an expert
MOST_LISTED = 8  # words and captions of an expert

HEAT_STYLE = """
td.heat { text-align: center; font-variant-numeric: tabular-nums; padding: .35rem .8rem; }
.expert { border-top: 1px solid var(--line); padding: .5rem 0; }
"""

RoutedQuery = dict[str, Any]  # of a query of a mixture, see `evaluation.rankings_file`


def expert_report(title: str, records: Mapping[str, Sequence[RoutedQuery]]) -> str:
    """The page, from split's name -> its queries."""
    everything: list[RoutedQuery] = []
    for queries in records.values():
        everything += queries
    experts = range(len(everything[0]["experts"]))
    parts = [
        "<p>Mean weight of each expert over the queries: one row per expert, one column per split.</p>",
        _heat_map({**records, "all": everything}, experts),
    ]
    parts += [_expert(expert, everything) for expert in experts]
    return pages.page(title, parts, style=HEAT_STYLE)


def _heat_map(columns: Mapping[str, Sequence[RoutedQuery]], experts: Iterable[int]) -> str:
    """Mean weights as a table, the heavier the darker."""
    head = "".join(f"<th>{pages.text(name)}</th>" for name in columns)
    rows = []
    for expert in experts:
        cells = []
        for queries in columns.values():
            mean = sum(query["experts"][expert] for query in queries) / len(queries)
            background = f"background:rgba(33,102,172,{mean:.2f})"
            cells.append(f'<td class="heat" style="{background}">{mean:.2f}</td>')
        rows.append(f"<tr><th>expert {expert}</th>{''.join(cells)}</tr>")
    return f'<div class="wide"><table><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'


def _expert(expert: int, queries: Sequence[RoutedQuery]) -> str:
    """The queries in which one expert weighs most: their number, typical words and captions."""
    experts_queries = []
    for query in queries:
        if query["experts"][expert] == max(query["experts"]) > 0:
            experts_queries.append(query)
    heaviest = sorted(experts_queries, key=lambda query: -query["experts"][expert])[:MOST_LISTED]
    captions = []
    for query in heaviest:
        captions.append(f"<li>{query['experts'][expert]:.2f} {pages.text(query['caption'])}</li>")
    typical = typical_words(experts_queries, queries)
    words = ", ".join(f"{word} ({ratio:.1f} x)" for word, ratio in typical) or "none"
    number = len(experts_queries)
    return (
        f'<div class="expert"><h2>Expert {expert}</h2>'
        f"<p>has the largest weight in {number} of {len(queries)} queries</p>"
        f"<p>Words that are more frequent in these queries: {pages.text(words)}</p><ul>{''.join(captions)}</ul></div>"
    )


def typical_words(
    experts_queries: Sequence[RoutedQuery], queries: Sequence[RoutedQuery]
) -> list[tuple[str, float]]:
    """Words that are more frequent in an expert's captions than in all, and how many times so."""
    everywhere = _captions_with(queries)
    ratios = {}
    for word, count in _captions_with(experts_queries).items():
        ratio = (count / len(experts_queries)) / (everywhere[word] / len(queries))
        if count >= LEAST_OCCURRENCES and ratio > 1:
            ratios[word] = ratio
    return sorted(ratios.items(), key=lambda pair: -pair[1])[:MOST_LISTED]


def _captions_with(queries: Sequence[RoutedQuery]) -> Counter[str]:
    """Word -> how many captions have it."""
    counts: Counter[str] = Counter()
    for query in queries:
        counts.update(set(re.findall(r"\w+", query["caption"].lower())))
    return counts
