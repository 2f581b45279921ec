"""Read tables that spreadsheets and pandas save: the rows of .csv, .tsv and .xlsx files, and the values of a cell."""

import ast
import contextlib
import csv
import io
import logging
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import BadZipFile

from runtime.files import missing_file
from utils import UserError, first_line

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

WORKBOOK = ".xlsx"
TABLES = (".csv", ".tsv", WORKBOOK)
SEPARATORS = ",;\t"  # spreadsheets use one of these, depending on the country
SPARE = 100  # number of cells that a row may have in addition to those of the first row before pandas fails
# Texts that pandas and spreadsheets write for missing values, and for values that could not be computed.
NOTHING = {"nan", "none", "nat", "<na>", "null", "#n/a", "#ref!", "#name?", "#value!"}
_STRING = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_LIST = re.compile(rf"\[\s*(?:{_STRING}(?:\s*,\s*{_STRING})*\s*,?\s*)?\]", re.DOTALL)
# Exceptions of openpyxl and zipfile for a damaged workbook.
WORKBOOK_ERRORS = (
    BadZipFile, KeyError, NotImplementedError, OSError, SyntaxError, TypeError, ValueError, zlib.error,
)  # fmt: skip


def table_rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a table that are not blank: their numbers, as in spreadsheets, and their cells as text.

    Raises:
        UserError: the file is missing or not a table; for an unclosed quotation mark, the message contains the row.
    """
    is_workbook = file.suffix.lower() == WORKBOOK
    table = _first_sheet(file) if is_workbook else _separated(file)
    for number, row in enumerate(table.itertuples(index=False), start=1):
        # Cells that a row lacks are not texts, but NaN.
        cells = [cell for cell in row if isinstance(cell, str)]
        if any(map(str.strip, cells)):
            yield number, cells


def _first_sheet(file: Path) -> "pd.DataFrame":
    import pandas as pd

    if not file.exists():
        raise missing_file(file)
    try:
        sheets = pd.read_excel(
            file, sheet_name=None, header=None, dtype=str, na_filter=False, engine="openpyxl"
        )
    except ImportError:
        raise UserError(
            f"{file}: workbooks need openpyxl: pip install openpyxl, or save it as CSV"
        ) from None
    except WORKBOOK_ERRORS as error:
        raise UserError(f"{file} is not a workbook ({first_line(error)}): save it again") from None
    name, table = next(iter(sheets.items()))
    if len(sheets) > 1:
        logger.warning(
            "note: %s: only the first of its %d sheets is read, %s", file, len(sheets), name
        )
    return table


def _separated(file: Path) -> "pd.DataFrame":
    """Read a table in a text file. Its first line may be Excel's `sep=;`, which sets the separator."""
    import pandas as pd

    text = unmarked_text(file)
    header, _, rest = text.partition("\n")
    told = re.fullmatch(r'"?sep=(.)"?\s*', header, re.IGNORECASE)
    if told:
        text = rest
    separator = told[1] if told else max(SEPARATORS, key=header.count)
    most = header.count(separator) + SPARE
    try:
        return pd.read_csv(
            io.StringIO(text),
            sep=separator,
            header=None,
            names=range(most),
            dtype=str,
            na_filter=False,
            skip_blank_lines=False,
            engine="python",  # only this engine rejects text after a closing quotation mark
        )
    except pd.errors.EmptyDataError:
        return pd.DataFrame()
    except (pd.errors.ParserError, ValueError) as error:
        row = _broken_row(text, separator, most)
        raise UserError(
            f"{file} is not a table: row {row} ({first_line(error)}): check its quotation marks; inside a cell, each "
            "must be doubled"
        ) from None


def _broken_row(text: str, separator: str, most: int) -> int:
    """Return the number of the first row that cannot be read or has too many cells, which pandas does not report."""
    number = 1
    with contextlib.suppress(csv.Error):
        for cells in csv.reader(io.StringIO(text), delimiter=separator, strict=True):
            if len(cells) > most:
                break
            number += 1
    return number


def unmarked_text(file: Path) -> str:
    """Return the text of a file, without the byte order mark of spreadsheets."""
    try:
        return file.read_text(encoding="utf-8").removeprefix("\ufeff")
    except FileNotFoundError:
        raise missing_file(file) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({first_line(error)}): save it as UTF-8") from None


def cell_values(cell: str, separator: str) -> list[str]:
    """Return the values of a cell: one, several with a separator between them, or a list as pandas writes it.

    Args:
        separator: a regular expression.

    Raises:
        ValueError: the cell contains a missing-value marker, or a list that cannot be read.
    """
    cell = cell.strip()
    if cell.lower() in NOTHING:
        raise ValueError(
            f"{cell!r}, which stands for a missing value: fill the cell, or leave it empty"
        )
    if _LIST.fullmatch(cell):
        values: list[str] = ast.literal_eval(cell)
    elif re.match(r"""\[\s*['"]""", cell):
        raise ValueError(f"{cell!r}, which is not a list: separate several values by ' | '")
    else:
        values = re.split(separator, cell)
    return [value.strip() for value in values]
