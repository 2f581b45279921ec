"""Images that visitors send: which are refused, why, and under which name."""

import io
import struct
import zlib

import pytest
from PIL import Image

from image_search.uploads import LONGEST_NAME, MOST_BYTES, checked_upload
from utils import UserError


def bomb(side: int) -> bytes:
    """A small PNG that says it has side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def bad_uploads(folder) -> dict[str, str]:
    """File name -> what must be said of it; the files are written."""
    (folder / "notes.txt").write_text("no image")
    (folder / "page.png").write_text("<html>404</html>")
    (folder / "bomb.png").write_bytes(bomb(60_000))
    (folder / "wide.png").write_bytes(bomb(7_000))
    Image.new("1", (20_000, 2)).save(folder / "long.png")
    (folder / "large.jpg").write_bytes(b"\xff\xd8" + b"\0" * MOST_BYTES)
    Image.new("RGB", (300, 300), "red").save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:700])
    return {
        "cut.jpg": "cannot be decoded",
        "notes.txt": "is not an image",
        "page.png": "is not an image",
        "bomb.png": "more than 40 million pixels",
        "wide.png": "more than 40 million pixels",
        "long.png": "a side of more than 18,000",
        "large.jpg": "larger than 10 MiB",
    }


@pytest.mark.parametrize("kind", ["EPS", "ICO", "PPM", "TGA", "JPEG2000"])
def test_an_upload_with_a_lying_name_meets_no_other_decoder(kind):
    content = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(content, kind)
    with pytest.raises(UserError, match="is not an image"):
        checked_upload("lie.png", content.getvalue())


@pytest.mark.parametrize(
    "name", ["/etc/passwd.png", "C:\\photos\\a.png", "../../a.png", "a" * 9000 + ".png"]
)
def test_a_name_is_a_name_and_no_path(name):
    upload = checked_upload(name, png())
    assert not {"/", "\\"} & set(upload.name)
    assert upload.name.endswith(".png")
    assert len(upload.name) <= LONGEST_NAME
    assert Image.open(upload).size == (9, 9)
    assert repr(upload) == upload.name


def png() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (9, 9), "red").save(content, "PNG")
    return content.getvalue()
