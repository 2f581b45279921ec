"""A search in steps: references, answers, undo, uploads that are refused, users who share nothing."""

import shutil
import struct
import zlib

import pytest
import torch
from PIL import Image

import search
from demo_app import history, shown
from image_search.dialogue import MOST_BYTES, MOST_STEPS, Dialogue, check_upload
from image_search.searcher import load_searcher
from reports import pages
from reports.sheets import shares
from runtime.choices import PairChoice
from test_search import images
from utils import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def searcher(drawn, tmp_path_factory):
    """An index of twelve images, asked with the sum."""
    folder = tmp_path_factory.mktemp("dialogue")
    images(folder / "photos", 12)
    words = [
        "index",
        "--images",
        folder / "photos",
        "--output",
        folder / "index",
        "--num-workers",
        "0",
    ]
    search.main(
        list(map(str, [*words, "--clip-model-name", drawn / "tiny_clip_vit.pt", "--device", "cpu"]))
    )
    return load_searcher(
        folder / "index",
        PairChoice(combining_function=None, clip_path=None, combiner_path=None),
        CPU,
    )


def names(dialogue: Dialogue) -> list[str]:
    return [step.reference.name for step in dialogue.steps]


def test_a_dialogue_goes_on_from_an_answer_and_back(searcher):
    chosen = Dialogue().choose(searcher, 3)
    asked = chosen.ask(searcher, " is red ", 5)
    assert len(asked.last.found.answers) == 5
    assert asked.last.text == "is red"
    second = asked.choose_answer(searcher, 2)
    assert second.last.reference == asked.last.found.answers[2][0]
    assert second.last.found is None
    again = second.ask(searcher, "is blue", 5)
    assert [step.text for step in again.steps] == ["is red", "is blue"]
    assert (again.undo().last.reference, again.undo().last.found) == (second.last.reference, None)
    assert again.undo().last.text == "is blue"  # what was typed stays
    assert again.undo().undo() == asked
    assert names(again.undo().undo().undo()) == names(chosen)
    assert again.undo().undo().undo().undo() == Dialogue()
    assert Dialogue().undo() == Dialogue()


def test_a_dialogue_keeps_its_last_steps(searcher):
    dialogue = Dialogue()
    for number in range(MOST_STEPS + 3):
        dialogue = dialogue.choose(searcher, number % 12).ask(searcher, f"step {number}", 1)
    assert len(dialogue.steps) == MOST_STEPS
    assert dialogue.last.text == f"step {MOST_STEPS + 2}"


def test_a_reference_that_was_not_asked_with_gives_way(searcher):
    dialogue = Dialogue().choose(searcher, 1).choose(searcher, 2)
    assert names(dialogue) == [searcher.index.paths[2].name]


def test_two_users_share_nothing(searcher):
    start = Dialogue()
    first, second = start.choose(searcher, 0), start.choose(searcher, 1)
    first = first.ask(searcher, "is red", 3)
    assert names(first) != names(second)
    assert second.last.found is None
    assert start.steps == ()


def test_what_cannot_be_done_is_said(searcher):
    with pytest.raises(UserError, match="no reference yet"):
        Dialogue().ask(searcher, "is red", 3)
    with pytest.raises(UserError, match="text is empty"):
        Dialogue().choose(searcher, 0).ask(searcher, "  ", 3)
    with pytest.raises(UserError, match=r"2,001 characters: say it in 2,000 at most"):
        Dialogue().choose(searcher, 0).ask(searcher, "a" * 2001, 3)
    for row in (12, -1):
        with pytest.raises(UserError, match="no such image"):
            Dialogue().choose(searcher, row)
    for dialogue in (Dialogue(), Dialogue().choose(searcher, 0)):
        with pytest.raises(UserError, match="no such answer"):
            dialogue.choose_answer(searcher, 0)


def test_an_answer_equals_the_searchers(searcher):
    path = searcher.index.paths[4]
    asked = Dialogue().choose(searcher, 4).ask(searcher, "is red", 12)
    assert asked.last.found == searcher.search(searcher.reference_features(path), "is red", 12)


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
        "notes.txt": "is not an image",
        "page.png": "cannot be decoded",
        "bomb.png": "more than 40 million pixels",
        "wide.png": "more than 40 million pixels",
        "long.png": "a side of more than 18,000",
        "large.jpg": "larger than 10 MiB",
        "cut.jpg": "cannot be decoded",
    }


@pytest.mark.parametrize("kind", ["EPS", "ICO", "PPM", "TGA", "JPEG2000"])
def test_an_upload_with_a_lying_name_meets_no_other_decoder(kind, tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "lie.png", kind)
    with pytest.raises(UserError, match="cannot be decoded"):
        check_upload(tmp_path / "lie.png")


def test_images_that_vanished_leave_the_dialogue_usable(searcher, tmp_path):
    """They are grey on the page, and those of the index can still be asked with."""
    asked = Dialogue().choose(searcher, 4).ask(searcher, "is red", 3)
    before = [similarity for _, similarity in asked.last.found.answers]
    moved = [(path, tmp_path / str(number)) for number, path in enumerate(searcher.index.paths)]
    for path, place in moved:
        shutil.move(path, place)
    try:
        again = Dialogue().choose(searcher, 4).ask(searcher, "is red", 3)
        assert [similarity for _, similarity in again.last.found.answers] == before
        _, reference, _, answers, *_ = shown(again, "")
        assert reference.getpixel((0, 0)) == answers[0][0].getpixel((0, 0)) == (211, 211, 211)
        assert again.choose_answer(searcher, 1).undo() == again
    finally:
        for path, place in moved:
            shutil.move(place, path)


def test_uploads_that_are_refused(tmp_path):
    for name, message in bad_uploads(tmp_path).items():
        with pytest.raises(UserError, match=message) as error:
            check_upload(tmp_path / name)
        assert name in str(error.value)
        assert str(tmp_path) not in str(error.value)


def test_an_upload_is_asked_with(searcher, tmp_path):
    Image.new("RGB", (50, 40), "red").save(tmp_path / "mine.png")
    uploaded = Dialogue().upload(searcher, tmp_path / "mine.png")
    whole = searcher.reference_features(tmp_path / "mine.png")
    (tmp_path / "mine.png").unlink()  # its file is not needed any more
    asked = uploaded.ask(searcher, "is blue", 4)
    assert asked.last.row is None
    assert asked.last.found == searcher.search(whole, "is blue", 4)
    assert shown(asked, "")[1].size == (50, 40)
    assert asked.last.picture(10).size == (10, 8)
    assert "mine.png" in history(asked)


def test_what_the_page_shows(searcher):
    dialogue, reference, text, answers, shares, note, steps = shown(Dialogue(), "")
    assert (reference, text, answers, shares, note) == (None, "", [], "", "")
    assert "Choose an image" in steps
    asked = Dialogue().choose(searcher, 0).ask(searcher, "<b>red</b> " * 60, 3)
    dialogue, reference, text, answers, shares, note, steps = shown(asked, "")
    assert dialogue is asked
    assert reference.size == Image.open(searcher.index.paths[0]).size
    assert [label.split()[0] for _, label in answers] == ["1.", "2.", "3."]
    assert "more than 77 tokens" in note
    assert "<b>" not in steps
    assert "data:image/jpeg" in history(asked)


def test_bars_of_the_experts():
    found = pages.bars(shares(0.25, [0.7, 0.0, 0.3]))
    assert found.count("<i ") == 4
    assert 'width:25%"></i><span>0.25' in found
    assert 'expert 2</span><i style="width:30%' in found
    assert "<i" not in pages.bars(shares(None, []))
