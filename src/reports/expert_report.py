"""Describe the experts: a page with a heat map over the splits, words and typical captions; and in short."""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from reports import pages

LEAST_OCCURRENCES = 3  # of a word that is called typical of an expert
MOST_LISTED = 8  # words and captions of an expert
NAMED_BY = 3  # kinds or words

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
    """Name each expert by the kinds of queries, or without kinds by the words, that set its queries apart most.

    `is_idle` says that no query goes to it.
    """
    terms_of = kinds_of if any(map(kinds_of, queries)) else words_of
    names = []
    for expert in range(len(queries[0]["experts"])):
        typical = typical_of(map(terms_of, _queries_of(expert, queries)), map(terms_of, queries))
        is_idle = not any(query["experts"][expert] for query in queries)
        names.append({"takes": [term for term, _ in typical[:NAMED_BY]], "is_idle": is_idle})
    return names


def _queries_of(expert: int, queries: Sequence[RoutedQuery]) -> list[RoutedQuery]:
    """The queries in which an expert weighs most."""
    return [query for query in queries if query["experts"][expert] == max(query["experts"]) > 0]


def words_of(query: RoutedQuery) -> set[str]:
    """The words of a query's caption."""
    return set(re.findall(r"\w+", query["caption"].lower()))


def kinds_of(query: RoutedQuery) -> set[str]:
    """The kinds of a query, where its benchmark has any."""
    return set(query.get("kinds", []))


def typical_of(own: Iterable[set[str]], everywhere: Iterable[set[str]]) -> list[tuple[str, float]]:
    """Terms that more of an expert's queries have than of all, and how many times so, of the terms of each query."""
    own, everywhere = list(own), list(everywhere)
    counts = Counter(itertools.chain.from_iterable(everywhere))
    ratios = {}
    for term, count in Counter(itertools.chain.from_iterable(own)).items():
        ratio = (count / len(own)) / (counts[term] / len(everywhere))
        if count >= LEAST_OCCURRENCES and ratio > 1:
            ratios[term] = ratio
    return sorted(ratios.items(), key=lambda pair: -pair[1])[:MOST_LISTED]
