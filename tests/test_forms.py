"""Forms as browsers and programs send them, and what is none."""

import contextlib
import urllib.parse
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.exceptions import HTTPException

from image_search.forms import LONGEST_FIELD, MOST_FIELDS, File, Form, read_form
from image_search.stores.base import QuestionError

KIND = "multipart/form-data; boundary=edge"
NAMES = st.text(st.characters(codec="utf-8", exclude_characters='"\\\r\n'), max_size=20)


def multipart(fields: list[tuple[str, str | File]], boundary: str) -> bytes:
    """As browsers write it."""
    parts = []
    for name, value in fields:
        about = f'name="{name}"'
        if isinstance(value, File):
            about += f'; filename="{value.name}"\r\nContent-Type: image/png'
        content = value.content if isinstance(value, File) else value.encode()
        head = f"--{boundary}\r\nContent-Disposition: form-data; {about}\r\n\r\n"
        parts.append(head.encode() + content + b"\r\n")
    return b"".join(parts) + f"--{boundary}--\r\n".encode()


@given(
    st.dictionaries(NAMES, st.text(max_size=50) | st.builds(File, NAMES, st.binary()), max_size=8)
)
def test_what_is_sent_is_read(fields):
    boundary = uuid.uuid4().hex
    form = Form()
    for name, value in fields.items():
        form.add(name, value)
    body = multipart(list(fields.items()), boundary)
    for kind in (
        f"multipart/form-data; boundary={boundary}",
        f'Multipart/Form-Data;boundary="{boundary}"; charset=UTF-8',
    ):
        assert read_form(kind, body) == form
        assert read_form(kind, b"a preamble\r\n" + body + b"and more") == form


@given(st.dictionaries(st.text(min_size=1), st.text(), min_size=1, max_size=8))
def test_pairs_are_read(fields):
    form = read_form("application/x-www-form-urlencoded", urllib.parse.urlencode(fields).encode())
    assert form == Form(fields={name: [value] for name, value in fields.items()})


@pytest.mark.parametrize("kind", [KIND, "application/x-www-form-urlencoded"])
@given(body=st.binary() | st.text('-edgform-data;"=\\\r\nname:&a%').map(str.encode))
def test_anything_else_is_refused_or_read(kind, body):
    with contextlib.suppress(QuestionError, HTTPException):
        read_form(kind, body)


HEADS = [
    'form-data; name="a"; filename="b',
    "form-data",
    "attachment; name=a",
    'form-data; name="a"; name="b"',
    "form-data name",
    'form-data; name="\xff"',
    "form-data; name=a; x",
    'form-data; name="a"\r\nContent-Disposition: form-data; name="b"',
    'form-data; name="a"\r\nContent-Type: text/plain; charset=punycode',
]


@pytest.mark.parametrize("head", HEADS)
def test_a_part_that_is_described_in_another_way_is_refused(head):
    body = b"--edge\r\nContent-Disposition: " + head.encode("latin-1") + b"\r\n\r\nx\r\n--edge--"
    with pytest.raises(QuestionError):
        read_form(KIND, body)


CHARSETS = [
    "punycode",
    "idna",
    "utf-7",
    "utf-16",
    "latin-1",
    "undefined",
    "base64",
    "rot13",
    "unicode_escape",
    "x",
    "",
]


@pytest.mark.parametrize("charset", CHARSETS)
@pytest.mark.parametrize("kind", [KIND, "application/x-www-form-urlencoded"])
def test_no_other_encoding_is_known(charset, kind):
    with pytest.raises(QuestionError, match="UTF-8"):
        read_form(f"{kind}; charset={charset}", b"")


def test_a_form_has_so_many_fields_and_so_long_ones():
    fields = [(f"f{number}", "x") for number in range(MOST_FIELDS)]
    assert len(read_form(KIND, multipart(fields, "edge")).fields) == MOST_FIELDS
    with pytest.raises(QuestionError, match="at most 16"):
        read_form(KIND, multipart([*fields, ("g", "x")], "edge"))
    again = read_form(KIND, multipart([*fields[:2], ("f0", "y")], "edge"))
    assert again.fields == {"f0": ["x", "y"], "f1": ["x"]}
    long = "x" * (LONGEST_FIELD + 1)
    with pytest.raises(QuestionError, match="maximum size of 64 KiB"):
        read_form(KIND, multipart([("text", long)], "edge"))
    with pytest.raises(HTTPException, match="maximum size of 64 KiB"):
        read_form("application/x-www-form-urlencoded", f"text={long}".encode())
    file = File("a.png", bytes(10 * LONGEST_FIELD))
    assert read_form(KIND, multipart([("image", file)], "edge")).files == {"image": [file]}


@pytest.mark.parametrize("boundary", ["", '""', "x" * 71, "é", '"a', "a; boundary=b"])
def test_a_boundary_is_short_and_there_once(boundary):
    with pytest.raises(QuestionError):
        read_form(f"multipart/form-data; boundary={boundary}", b"--a--")
