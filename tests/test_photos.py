"""A user's own image files: which are found, and how they are opened."""

import os
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from image_search import photos
from image_search.photos import AVIF_KINDS, HEIF_KINDS, find_images, opened, small_image
from runtime import image_files
from utils import UserError


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
    assert list(found.left_out.values()) == ["a link that leads nowhere"] * 2


def test_images_of_other_kinds_are_counted(folder):
    for name in ("1.jxl", "2.JXL", "3.svg"):
        (folder / name).write_bytes(b"x")
    assert find_images([folder]).skipped == {".jxl": 2, ".svg": 1}


@pytest.mark.parametrize(("kind", "known"), [("avif", AVIF_KINDS), ("heic", HEIF_KINDS)])
def test_what_phones_save_is_read_where_there_is_a_decoder(kind, known, folder):
    """HEIC needs pi-heif; without a decoder, files are counted with those that are left out."""
    file = folder / f"phone.{kind}"
    if known:
        if kind == "heic":  # red on the left, blue on the right; no package here can write one
            file.write_bytes((Path(__file__).parent / "phone.heic").read_bytes())
        else:
            picture = Image.new("RGB", (30, 20), "red")
            picture.paste("blue", (15, 0, 30, 20))
            picture.save(file)
        found = [path for path, _, _ in find_images([folder]).files]
        assert str(file.resolve()) in found
        image = opened(file).convert("RGB")
        assert image.size == (30, 20)
        for place, colour in (((3, 10), (255, 0, 0)), ((26, 10), (0, 0, 255))):
            assert np.abs(np.subtract(image.getpixel(place), colour)).max() < 10
    else:
        file.write_bytes(b"x")
        assert find_images([folder]).skipped == {f".{kind}": 1}


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
    assert np.array_equal(np.asarray(opened(tmp_path / "a.png")), np.asarray(upright))


@pytest.mark.parametrize(
    ("kind", "white"), [(np.uint16, 65_535), (np.int32, 65_535), (np.float32, 1)]
)
def test_more_than_8_bits_do_not_become_white(kind, white, tmp_path):
    values = (np.linspace(0, 1, 256).reshape(16, 16) * white).astype(kind)
    Image.fromarray(values).save(tmp_path / "a.tiff")
    found = np.asarray(opened(tmp_path / "a.tiff").convert("RGB"))[..., 0]
    assert np.abs(found.astype(int) - np.arange(256).reshape(16, 16)).max() <= 1


def test_a_part_of_16_bits_at_a_time_is_the_whole(tmp_path, monkeypatch):
    values = np.random.default_rng(0).integers(0, 60_000, (50, 7)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    whole = np.asarray(opened(tmp_path / "a.png"))
    monkeypatch.setattr(photos, "ROWS", 3)
    assert np.array_equal(np.asarray(opened(tmp_path / "a.png")), whole)
    assert np.array_equal(whole, (values * 255.0 / 65_535).round())


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
    for read in (opened, image_files.decoded):
        with pytest.raises(OSError, match="not a file"):
            read(file)
    assert small_image(file, 40).getcolors() == [(1600, (211, 211, 211))]
    found = find_images([folder])
    assert names(found) == ["a.JPG", "b.png"]
    assert list(found.left_out.values()) == ["a pipe, a device or a socket, not a file"]


def test_a_small_image_of_what_is_gone_or_damaged_is_grey(tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"<html>")
    for name in ("gone.jpg", "bad.jpg"):
        assert small_image(tmp_path / name, 40).getcolors() == [(1600, (211, 211, 211))]


def test_a_small_image_of_a_large_image(tmp_path):
    Image.new("RGB", (3000, 2000), "teal").save(tmp_path / "large.jpg")
    assert small_image(tmp_path / "large.jpg", 300).size == (300, 200)
