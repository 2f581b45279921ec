"""Describe the experts of a mixture: a page with a heat map, words and typical captions, and a name for each expert."""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from reports import pages

# A word is typical of an expert only if at least so many of its queries contain it.
LEAST_OCCURRENCES = 3
MOST_LISTED = 8  # largest number of words, and of captions, that are listed for an expert
NAMED_BY = 3  # largest number of kinds or words in an expert's name

HEAT_STYLE = """
td.heat { text-align: center; font-variant-numeric: tabular-nums; padding: .35rem .8rem; }
.expert { border-top: 1px solid var(--line); padding: .5rem 0; }
"""

RoutedQuery = dict[str, Any]  # a query with the weights of its experts, see `rankings_file`


def expert_report(title: str, records: Mapping[str, Sequence[RoutedQuery]]) -> str:
    """Return the page as HTML.

    Args:
        records: name of a split -> its queries.
    """
    everything = list(itertools.chain.from_iterable(records.values()))
    experts = range(len(everything[0]["experts"]))
    parts = [
        "<p>Mean weight of each expert over the queries: one row per expert, one column per split.</p>",
        _heat_map({**records, "all": everything}, experts),
    ]
    parts += [_expert(expert, everything) for expert in experts]
    return pages.page(title, parts, style=HEAT_STYLE)


def _heat_map(columns: Mapping[str, Sequence[RoutedQuery]], experts: Iterable[int]) -> str:
    """Return an HTML table of the experts' mean weights, in which larger weights are darker."""
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
    """Return HTML about the queries in which an expert has the largest weight: number, typical words and captions."""
    experts_queries = _queries_of(expert, queries)
    heaviest = sorted(experts_queries, key=lambda query: -query["experts"][expert])[:MOST_LISTED]
    captions = []
    for query in heaviest:
        captions.append(f"<li>{query['experts'][expert]:.2f} {pages.text(query['caption'])}</li>")
    typical = typical_of(map(words_of, experts_queries), map(words_of, queries))
    words = ", ".join(f"{word} ({ratio:.1f} x)" for word, ratio in typical) or "none"
    number = len(experts_queries)
    return (
        f'<div class="expert"><h2>Expert {expert}</h2>'
        f"<p>has the largest weight in {number} of {len(queries)} queries</p>"
        f"<p>Words that are more frequent in these queries: {pages.text(words)}</p><ul>{''.join(captions)}</ul></div>"
    )


def expert_names(queries: Sequence[RoutedQuery]) -> list[dict[str, Any]]:
    """Name each expert by the kinds that are most over-represented in its queries, or by words if there are no kinds.

    `is_idle` is true for an expert to which no query is sent.
    """
    terms_of = kinds_of if any(map(kinds_of, queries)) else words_of
    names = []
    for expert in range(len(queries[0]["experts"])):
        typical = typical_of(map(terms_of, _queries_of(expert, queries)), map(terms_of, queries))
        is_idle = not any(query["experts"][expert] for query in queries)
        names.append({"takes": [term for term, _ in typical[:NAMED_BY]], "is_idle": is_idle})
    return names


def _queries_of(expert: int, queries: Sequence[RoutedQuery]) -> list[RoutedQuery]:
    """Return the queries in which an expert has the largest weight."""
    return [query for query in queries if query["experts"][expert] == max(query["experts"]) > 0]


def words_of(query: RoutedQuery) -> set[str]:
    """Return the words of a query's caption in lower case."""
    return set(re.findall(r"\w+", query["caption"].lower()))


def kinds_of(query: RoutedQuery) -> set[str]:
    """Return the kinds of a query; empty if its benchmark has none."""
    return set(query.get("kinds", []))


def typical_of(own: Iterable[set[str]], everywhere: Iterable[set[str]]) -> list[tuple[str, float]]:
    """Return the terms that are more frequent in an expert's queries than in all queries, with the ratio of both.

    Terms of equal ratio are in alphabetical order, as the order of a set changes from process to process.

    Args:
        own: terms of each query of the expert.
        everywhere: terms of each query of all experts.
    """
    own, everywhere = list(own), list(everywhere)
    counts = Counter(itertools.chain.from_iterable(everywhere))
    ratios = {}
    for term, count in Counter(itertools.chain.from_iterable(own)).items():
        ratio = (count / len(own)) / (counts[term] / len(everywhere))
        if count >= LEAST_OCCURRENCES and ratio > 1:
            ratios[term] = ratio
    return sorted(ratios.items(), key=lambda pair: (-pair[1], pair[0]))[:MOST_LISTED]
