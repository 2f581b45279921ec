"""Tables as text, for the terminal."""

from collections.abc import Mapping

from utils import printable


def text_table(rows: Mapping[str, Mapping[str, str]]) -> str:
    """Format rows by their names, with cells by their columns: names to the left, cells to the right.

    A cell that a row lacks is left empty.
    """
    import pandas as pd

    table = pd.DataFrame(list(rows.values()), index=list(rows)).fillna("").map(printable)
    return table.rename(index=printable, columns=printable).to_string()
