"""Tables as text, for the terminal."""

from collections.abc import Mapping

from utils import printable


def text_table(rows: Mapping[str, Mapping[str, str]]) -> str:
    """Rows by their names, with cells by their columns, which all rows share: names to the left, cells to the right."""
    import pandas as pd

    columns = list(next(iter(rows.values())))
    cells = [[printable(row[column]) for column in columns] for row in rows.values()]
    names = map(printable, rows)
    return pd.DataFrame(cells, index=names, columns=map(printable, columns)).to_string()
