"""The form that asks a question: its fields and its file, found in a time that grows with its bytes and no faster.

Fields are few and their heads are short, so everything but the search for the boundary is bounded. UTF-8 is the only
encoding that is known: others decode in a time that grows with the square of a text.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import parse_qsl

from starlette.exceptions import HTTPException

from image_search.stores.base import QuestionError

MOST_FIELDS = 16
LONGEST_FIELD = 2**16  # bytes, and of a form that holds no file
LONGEST_PART_HEAD = 2**12  # bytes of what describes a part, and of the form's own kind
LONGEST_BOUNDARY = 70  # RFC 2046, section 5.1.1
OPTION = re.compile(r';\s*([^\s=;"]+)=(?:"((?:[^"\\]|\\.)*)"|([^\s;"]*))\s*')
ESCAPED = re.compile(r'\\(["\\])')
ENCODINGS = ("utf-8", "utf8", "us-ascii", "ascii")  # the last ones are a part of it
OTHER_ENCODING = "the form has another encoding: send it in UTF-8"
MALFORMED = "the form is damaged: send it again"


@dataclass(frozen=True)
class File:
    """A file as it was sent."""

    name: str
    content: bytes


@dataclass
class Form:
    """Content of a form: the values of each field, in the order in which they came."""

    fields: dict[str, list[str]] = field(default_factory=dict)
    files: dict[str, list[File]] = field(default_factory=dict)

    def add(self, name: str, value: str | File) -> None:
        """Add a value to a field."""
        if isinstance(value, File):
            self.files.setdefault(name, []).append(value)
        else:
            self.fields.setdefault(name, []).append(value)


def read_form(kind: str, body: bytes) -> Form:
    """The fields of a body.

    Args:
        kind: its Content-Type.

    Raises:
        HTTPException: it is of another kind, or too large for one without a file.
        QuestionError: it is damaged, in another encoding than UTF-8, or has too many fields.
    """
    if len(kind) > LONGEST_PART_HEAD:
        raise QuestionError(MALFORMED)
    name, options = described(kind)
    _check_encoding(options)
    if name == "multipart/form-data":
        return _of_parts(body, options.get("boundary", ""))
    if name == "application/x-www-form-urlencoded":
        return _of_pairs(body)
    raise HTTPException(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send the question as a form")


def described(header: str) -> tuple[str, dict[str, str]]:
    """The value of a header in small letters, and its options: `form-data; name="a"` -> "form-data", {"name": "a"}."""
    value, semicolon, rest = header.partition(";")
    options: dict[str, str] = {}
    place = 0
    rest = semicolon + rest.rstrip()
    while place < len(rest):
        option = OPTION.match(rest, place)
        if option is None or option[1].lower() in options:
            raise QuestionError(MALFORMED)
        quoted = option[2]
        options[option[1].lower()] = option[3] if quoted is None else ESCAPED.sub(r"\1", quoted)
        place = option.end()
    return value.strip().lower(), options


def _of_pairs(body: bytes) -> Form:
    """`name=value&name=value`."""
    if len(body) > LONGEST_FIELD:
        raise HTTPException(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"a form without a file has a maximum size of {LONGEST_FIELD // 2**10} KiB: send less",
        )
    form = Form()
    try:
        pairs = parse_qsl(
            body.decode(),
            keep_blank_values=True,
            strict_parsing=bool(body),
            errors="strict",
            max_num_fields=MOST_FIELDS,
        )
    except ValueError:
        raise QuestionError(MALFORMED) from None
    for name, value in pairs:
        form.add(name, value)
    return form


def _of_parts(body: bytes, boundary: str) -> Form:
    """Parts between lines of `--boundary`, each described by a head, RFC 7578."""
    if not (0 < len(boundary) <= LONGEST_BOUNDARY and boundary.isascii()):
        raise QuestionError(MALFORMED)
    form = Form()
    for head, content in _parts(body, b"\r\n--" + boundary.encode()):
        name, file_name = _named(head)
        if file_name is not None:
            form.add(name, File(file_name, content))
            continue
        if len(content) > LONGEST_FIELD:
            raise QuestionError(
                f"a field has a maximum size of {LONGEST_FIELD // 2**10} KiB: send less"
            )
        form.add(name, _text(content))
    return form


def _parts(body: bytes, delimiter: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The head and the content of each part."""
    pieces = (b"\r\n" + body).split(delimiter, MOST_FIELDS + 1)
    if not pieces[-1].startswith(b"--"):  # which closes a form
        raise QuestionError(
            f"{MALFORMED}, with at most {MOST_FIELDS} fields" if len(pieces) > 2 else MALFORMED
        )
    for piece in pieces[1:-1]:
        head, gap, _ = piece[:LONGEST_PART_HEAD].partition(b"\r\n\r\n")
        blank, _, lines = head.partition(b"\r\n")
        if not gap or blank.strip():
            raise QuestionError(MALFORMED)
        yield lines, piece[len(head) + len(gap) :]


def _named(head: bytes) -> tuple[str, str | None]:
    """The name of the field that a part's head describes, and that of its file, None where it is none."""
    names: dict[str, str] = {}
    for line in _text(head).split("\r\n"):
        header, _, value = line.partition(":")
        name = header.strip().lower()
        if name == "content-disposition":
            kind, options = described(value)
            if names or kind != "form-data":
                raise QuestionError(MALFORMED)
            names = options
        elif name == "content-type":
            _check_encoding(described(value)[1])
    if "name" not in names:
        raise QuestionError(MALFORMED)
    return names["name"], names.get("filename")


def _check_encoding(options: dict[str, str]) -> None:
    if options.get("charset", "utf-8").lower() not in ENCODINGS:
        raise QuestionError(OTHER_ENCODING)


def _text(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise QuestionError(OTHER_ENCODING) from None
