"""A user's own image files: which are found, and that each is read as it is shown, wherever it is read."""

import functools
import io
import json
import os
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from benchmarks.image_check import inspect
from data_utils import load_image, make_preprocess
from image_search.photos import find_images
from image_search.searcher import SearchQuery, load_searcher
from image_search.uploads import checked_upload
from reports.sheets import load_thumbnails
from runtime import image_files
from runtime.image_files import AVIF_KINDS, HEIF_KINDS, read_photo, thumbnail
from settings.groups import PairChoice
from utils import UserError

HEIC = (
    Path(__file__).parent / "phone.heic"
)  # red on the left, blue on the right; nothing here can write one
TURNED = 6  # the first row lies on the right
WHITE_OF_16 = np.uint16(65_535)


@pytest.fixture
def folder(tmp_path):
    """A folder with images of two kinds, one of them below."""
    (tmp_path / "photos" / "below").mkdir(parents=True)
    Image.new("RGB", (30, 20), "red").save(tmp_path / "photos" / "a.JPG", "JPEG")
    Image.new("RGB", (30, 20), "red").save(tmp_path / "photos" / "below" / "b.png")
    return tmp_path / "photos"


def names(found) -> list[str]:
    return [Path(path).name for path, _, _ in found.files]


def test_endings_in_any_case_and_hidden_folders(folder):
    (folder / ".thumbnails").mkdir()
    (folder / ".thumbnails" / "a.png").write_bytes(b"")
    (folder / "notes.txt").write_text("")
    assert names(find_images([folder])) == ["a.JPG", "b.png"]


def test_links_are_followed_once(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "elsewhere" / "c.png")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "below" / "up").symlink_to(folder)
    (folder / "nowhere.png").symlink_to(tmp_path / "gone.png")
    (folder / "itself.png").symlink_to(folder / "itself.png")
    found = find_images([folder])
    assert names(found) == ["c.png", "a.JPG", "b.png"]
    assert list(found.left_out.values()) == ["a broken symlink"] * 2


def test_images_of_other_kinds_are_counted(folder):
    for name in ("1.jxl", "2.JXL", "3.svg"):
        (folder / name).write_bytes(b"x")
    assert find_images([folder]).skipped == {".jxl": 2, ".svg": 1}


@pytest.mark.parametrize(("kind", "known"), [("avif", AVIF_KINDS), ("heic", HEIF_KINDS)])
def test_what_no_decoder_reads_is_counted(kind, known, folder):
    (folder / f"phone.{kind}").write_bytes(HEIC.read_bytes())
    found = find_images([folder])
    assert found.skipped == ({} if known else {f".{kind}": 1})
    assert len(found.files) == 2 + bool(known)


def test_images_without_a_known_ending_are_told_by_their_bytes(folder):
    """And what ends otherwise is not opened."""
    content = (folder / "a.JPG").read_bytes()
    for name in ("blob", "x.jpg?w=3", "image.", "a.jpe", "b.mpo", "notes.txt", ".hidden"):
        (folder / name).write_bytes(content)
    (folder / "README").write_text("no image")
    wanted = {"a.JPG", "b.png", "blob", "x.jpg?w=3", "image.", "a.jpe", "b.mpo"}
    assert set(names(find_images([folder]))) == wanted


@pytest.mark.parametrize("name", ["blob", "image", "-", "x.jpg?w=3", "a.txt"])
def test_an_upload_is_told_by_its_bytes(name, folder):
    content = (folder / "a.JPG").read_bytes()
    assert checked_upload(name, content).getvalue() == content


def test_a_name_that_is_not_utf_8_is_left_out(folder):
    (folder / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"x")
    found = find_images([folder])
    assert len(found.files) == 2
    ((name, reason),) = found.left_out.items()
    name.encode()
    assert reason == "its name is not UTF-8: rename it"


def test_a_folder_that_cannot_be_read_is_no_empty_one(folder, monkeypatch):
    real = os.scandir

    def refusing(path):
        if str(path).endswith("below"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match="below cannot be read"):
        find_images([folder])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_exif_data_says(orientation, tmp_path):
    upright = Image.new("L", (16, 32))
    upright.paste(255, (0, 0, 16, 8))  # white above
    turned = {
        1: [], 2: ["FLIP_LEFT_RIGHT"], 3: ["ROTATE_180"], 4: ["FLIP_TOP_BOTTOM"],
        5: ["TRANSPOSE"], 6: ["ROTATE_90"], 7: ["TRANSVERSE"], 8: ["ROTATE_270"],
    }[orientation]  # fmt: skip
    stored = upright
    for name in turned:
        stored = stored.transpose(Image.Transpose[name])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    found = read_photo(tmp_path / "a.png").convert("L")
    assert np.array_equal(np.asarray(found), np.asarray(upright))


def test_a_part_of_16_bits_at_a_time_is_the_whole(tmp_path, monkeypatch):
    values = np.random.default_rng(0).integers(0, 60_000, (50, 7)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    whole = np.asarray(read_photo(tmp_path / "a.png"))
    monkeypatch.setattr(image_files, "ROWS", 3)
    assert np.array_equal(np.asarray(read_photo(tmp_path / "a.png")), whole)
    assert np.array_equal(whole[..., 0], (values * 255.0 / 65_535).round())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes")
@pytest.mark.parametrize("kind", ["pipe", "device", "socket", "link"])
def test_what_is_no_file_is_never_opened(kind, folder):
    """A pipe would wait for ever for somebody who writes to it."""
    file = folder / "a.png"
    pipe = folder / "pipe"
    os.mkfifo(pipe)
    if kind == "pipe":
        pipe.rename(file)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as there:
            there.bind(str(folder / "s"))
            (folder / "s").rename(file)
    else:
        file.symlink_to("/dev/zero" if kind == "device" else pipe)
    for read in (read_photo, image_files.decoded):
        with pytest.raises(OSError, match="not a file"):
            read(file)
    assert is_grey(thumbnail(file, 40))
    found = find_images([folder])
    assert names(found) == ["a.JPG", "b.png"]
    assert list(found.left_out.values()) == ["a pipe, a device or a socket, not a file"]


def is_grey(content: bytes) -> bool:
    """Whether a JPEG is what stands for an image that is not there."""
    return Image.open(io.BytesIO(content)).getcolors() == [(1600, (211, 211, 211))]


def test_a_thumbnail_of_what_is_gone_or_damaged_is_grey(tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"<html>")
    for name in ("gone.jpg", "bad.jpg"):
        assert is_grey(thumbnail(tmp_path / name, 40))


def test_a_thumbnail_of_a_large_image(tmp_path):
    Image.new("RGB", (3000, 2000), "teal").save(tmp_path / "large.jpg")
    content = thumbnail(tmp_path / "large.jpg", 300)
    assert Image.open(io.BytesIO(content)).size == (300, 200)


# What a photo is, and how it is shown


def motif(number: int) -> Image.Image:
    """A picture that is like no other, wider than high."""
    cells = np.random.default_rng(number).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((75, 45), Image.Resampling.NEAREST)


def with_holes(picture: Image.Image, mode: str = "RGBA") -> Image.Image:
    """Its left third is transparent, and hides a colour."""
    picture = picture.convert("RGBA")
    picture.paste((0, 255, 0, 0), (0, 0, 25, 45))
    return picture.convert(mode)


def on_white(picture: Image.Image) -> Image.Image:
    """A picture whose left third is white."""
    picture = picture.convert("RGB")
    picture.paste("white", (0, 0, 25, 45))
    return picture


def chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    """A part of a PNG."""
    crc = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def with_chunk(picture: Image.Image, file: Path, part: bytes) -> None:
    """A PNG with one more part."""
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    content = stream.getvalue()
    file.write_bytes(content[:33] + part + content[33:])


def exif(orientation: int) -> Image.Exif:
    about = Image.Exif()
    about[0x0112] = orientation
    return about


def swapped_profile() -> bytes:
    """A profile whose red is sRGB's blue."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = (profile.index(name, 128) for name in (b"rXYZ", b"bXYZ"))
    profile[red : red + 4], profile[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(profile)


def save_grey(picture: Image.Image, file: Path, white: np.generic = WHITE_OF_16) -> None:
    """In numbers of the type of white, up to which they go."""
    values = np.asarray(picture.convert("L")) / 255 * float(white)
    Image.fromarray(values.round(3).astype(white.dtype)).save(file)


def save_indexed(picture: Image.Image, file: Path, **more) -> None:
    """With few colours, of which the last is transparent and green, and the first is no black to pad with."""
    few = picture.quantize(15)
    few.putpalette([*few.getpalette()[:45], 0, 255, 0])
    few.paste(15, (0, 0, 25, 45))
    few.save(file, transparency=15, **more)


LARGE = zlib.compress(b" " * 2_000_000)
# Kind -> its ending; how a picture is written as such; and how it is shown.
Kind = tuple[str, Callable[[Image.Image, Path], None], Callable[[Image.Image], Image.Image]]
KINDS: dict[str, Kind] = {
    "RGBA": ("png", lambda p, file: with_holes(p).save(file), on_white),
    "WebP": (
        "webp",
        lambda p, file: with_holes(p).save(file, lossless=True, exact=True),
        on_white,
    ),
    "grey and transparent": (
        "png",
        lambda p, file: with_holes(p, "LA").save(file),
        lambda p: on_white(p.convert("L")),
    ),
    "a transparent colour": (
        "png",
        lambda p, file: with_holes(p, "RGB").save(file, transparency=(0, 255, 0)),
        on_white,
    ),
    "GIF": ("gif", save_indexed, lambda p: on_white(p.quantize(15))),
    "animation": (
        "gif",
        lambda p, file: save_indexed(p, file, save_all=True, append_images=[motif(99)]),
        lambda p: on_white(p.quantize(15)),
    ),
    "1 bit": ("png", lambda p, file: p.convert("1").save(file), lambda p: p.convert("1")),
    "16 bits": ("png", save_grey, lambda p: p.convert("L")),
    "32 bits": (
        "tif",
        functools.partial(save_grey, white=np.int32(65_535)),
        lambda p: p.convert("L"),
    ),
    "fractions": (
        "tif",
        functools.partial(save_grey, white=np.float32(1)),
        lambda p: p.convert("L"),
    ),
    "CMYK": ("tif", lambda p, file: p.convert("CMYK").save(file), lambda p: p),
    "turned": (
        "png",
        lambda p, file: p.transpose(Image.Transpose.ROTATE_90).save(file, exif=exif(TURNED)),
        lambda p: p,
    ),
    "other colours": (
        "png",
        lambda p, file: Image.merge("RGB", p.split()[::-1]).save(
            file, icc_profile=swapped_profile()
        ),
        lambda p: p,
    ),
    "damaged profile": ("png", lambda p, file: p.save(file, icc_profile=b"none"), lambda p: p),
    "large profile": (
        "png",
        lambda p, file: with_chunk(p, file, chunk(b"iCCP", b"x\0\0" + LARGE)),
        lambda p: p,
    ),
    "large text": (
        "png",
        lambda p, file: with_chunk(p, file, chunk(b"zTXt", b"x\0\0" + LARGE)),
        lambda p: p,
    ),
    "damaged EXIF": (
        "png",
        lambda p, file: with_chunk(p, file, chunk(b"eXIf", b"MM\0*\0\0\0\x08\xff\xff")),
        lambda p: p,
    ),
    "EXIF without its digest": (
        "png",
        lambda p, file: with_chunk(p, file, chunk(b"eXIf", b"MM", crc=0)),
        lambda p: p,
    ),
}
if AVIF_KINDS:
    best = {"quality": 100, "subsampling": "4:4:4"}
    KINDS["AVIF"] = ("avif", lambda p, file: with_holes(p).save(file, **best), on_white)


def saved(kind: str, folder: Path, number: int = 0) -> tuple[Path, Path]:
    """A picture of a kind, and a plain copy of how it is shown."""
    ending, write, shown = KINDS[kind]
    folder.mkdir(exist_ok=True)
    file = folder / f"{number}.{ending}"
    write(motif(number), file)
    copy = folder / f"{number}-plain.png"
    shown(motif(number)).convert("RGB").save(copy)
    return file, copy


@pytest.mark.parametrize("transform", ["clip", "squarepad"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_photo_is_read_as_it_is_shown(kind, transform, tmp_path):
    """Like a plain copy, before and after it is padded and resized."""
    file, copy = saved(kind, tmp_path)
    preprocess = make_preprocess(transform, 1.25, 32)
    found, plain = (load_image(path, preprocess, read_photo).int() for path in (file, copy))
    most = 6 if kind in ("AVIF", "other colours", "CMYK") else 0
    assert (found - plain).abs().max() <= most
    assert inspect(file).problem == ""


@pytest.mark.parametrize(
    ("background", "colour"), [("white", 255), ("black", 0), ("grey", 128), ("original", 255)]
)
def test_a_thumbnail_shows_no_hidden_colour(background, colour, tmp_path):
    """Nor does a sheet."""
    file, _ = saved("RGBA", tmp_path)
    for content in (
        thumbnail(file, 75, background),
        load_thumbnails({"a": file}, background)["a"],
    ):
        hole = np.asarray(Image.open(io.BytesIO(content)))[5:40, 3:14].astype(int)
        assert np.abs(hole - colour).max() <= 8


@pytest.fixture
def pictures(tmp_path) -> list[tuple[Path, Path]]:
    """24 photos of all kinds, each with a plain copy."""
    kinds = [*KINDS, *KINDS]
    found = [saved(kinds[number], tmp_path / "pictures", number) for number in range(23)]
    if HEIF_KINDS:
        file = tmp_path / "pictures" / "phone.heic"
        file.write_bytes(HEIC.read_bytes())
        copy = Image.new("RGB", (30, 20), "red")
        copy.paste("blue", (15, 0, 30, 20))
        copy.save(tmp_path / "pictures" / "phone.png")
        found.append((file, tmp_path / "pictures" / "phone.png"))
    return found


def test_the_search_finds_the_plain_copy_first(pictures, index, tmp_path):
    (tmp_path / "copies").mkdir()
    for _, copy in pictures:
        copy.rename(tmp_path / "copies" / copy.name)
    index(tmp_path / "copies")
    choice = PairChoice(combining_function="image", clip_path=None, combiner_path=None)
    searcher = load_searcher(tmp_path / "index", choice, torch.device("cpu"))
    for file, copy in pictures:
        (found,) = searcher.search([SearchQuery(references=[file], text="", k=1)])
        assert found.results[0].path.name == copy.name, file


def test_own_triplets_find_the_plain_copy_first(pictures, drawn, run, tmp_path):
    folder = tmp_path / "triplets_dataset"
    folder.mkdir()
    (tmp_path / "pictures").rename(folder / "images")
    lines = []
    for file, copy in pictures:
        lines.append({"reference": file.name, "caption": "x", "target": copy.name})
    (folder / "val.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run("validate", tmp_path, "--dataset", "Triplets", "--combining-function", "image",
        "--clip-model-name", drawn / "tiny_clip_vit.pt", "--protocol", "original-removed",
        "--metrics-json", tmp_path / "r.json")  # fmt: skip
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["metrics"]["recall_at1"] == 100
    assert result["preprocessing"]["background"] == "white"
