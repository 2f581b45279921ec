"""Tables as text, for the terminal."""

from collections.abc import Mapping

from utils import printable


def text_table(rows: Mapping[str, Mapping[str, str]]) -> str:
    """Rows by their names, with cells by their columns, which all rows share: names to the left, cells to the right."""
    columns = list(next(iter(rows.values())))
    lines = [["", *map(printable, columns)]]
    for name, cells in rows.items():
        lines.append([printable(name), *(printable(cells[column]) for column in columns)])
    widths = [max(map(len, of_column)) for of_column in zip(*lines, strict=True)]
    printed = []
    for line in lines:
        aligned = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        aligned[0] = line[0].ljust(widths[0])
        printed.append("  ".join(aligned))
    return "\n".join(printed)
