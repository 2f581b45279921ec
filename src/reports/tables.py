"""Plain-text tables for the terminal."""

from collections.abc import Mapping

from utils import printable


def text_table(rows: Mapping[str, Mapping[str, str]]) -> str:
    """Format a table of row -> column -> cell as text, with names left-aligned and cells right-aligned.

    A cell that is missing from a row is left empty.
    """
    import pandas as pd

    table = pd.DataFrame(list(rows.values()), index=list(rows)).fillna("").map(printable)
    return table.rename(index=printable, columns=printable).to_string()
