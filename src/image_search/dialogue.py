"""A search in steps: a reference, what to change, the answers, one of which is the next reference."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, UnidentifiedImageError

from image_search.photos import FORMATS, KINDS, opened, small_image
from runtime.image_files import DECODING_ERRORS, LONGEST_SIDE
from utils import UserError, first_line

if TYPE_CHECKING:
    from torch import Tensor

    from image_search.searcher import Found, Searcher

# Of an uploaded image.
MOST_BYTES = 10 * 2**20
MOST_PIXELS = 40_000_000
MOST_STEPS = 50  # that are kept; each undo goes back by one
PICTURE_SIDE = 320  # pixels of what is kept of an uploaded image


@dataclass(frozen=True, eq=False)
class Upload:
    """What is needed of an uploaded image, whose file is gone.

    Attributes:
        picture: at most PICTURE_SIDE pixels wide and high.
        features: unnormalised, (1, D).
    """

    picture: Image.Image
    features: "Tensor"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a dialogue.

    Attributes:
        reference: the image to start from; of an uploaded one, the name alone.
        row: its row in the index, None for an uploaded one.
        upload: None for one of the index.
        text: what to change, "" until a search; it stays when the search is undone.
        found: the answers, None until a search.
    """

    reference: Path
    row: int | None
    upload: Upload | None = None
    text: str = ""
    found: "Found | None" = None

    def picture(self, side: int) -> Image.Image:
        """The reference, at most `side` pixels wide and high."""
        if self.upload is None:
            return small_image(self.reference, side)
        copy = self.upload.picture.copy()
        copy.thumbnail((side, side))
        return copy


@dataclass(frozen=True)
class Dialogue:
    """The steps of one user. A change makes a new dialogue, so that users share nothing."""

    steps: tuple[Step, ...] = ()

    @property
    def last(self) -> Step | None:
        """The step that the page shows."""
        return self.steps[-1] if self.steps else None

    def choose(self, searcher: "Searcher", row: int) -> "Dialogue":
        """Take an image of the index as the next reference."""
        image = searcher.image(row)
        if image is None:
            raise UserError("there is no such image: choose one that is shown")
        return self._next(Step(reference=image, row=row))

    def choose_answer(self, searcher: "Searcher", place: int) -> "Dialogue":
        """Take an answer of the last step as the next reference."""
        found = self.last.found if self.last else None
        if found is None or not 0 <= place < len(found.answers):
            raise UserError(
                "there is no such answer: search first, then choose one of what is shown"
            )
        return self.choose(searcher, found.rows[place])

    def upload(self, searcher: "Searcher", file: Path) -> "Dialogue":
        """Take a user's own image as the next reference. The file is not needed any more.

        Raises:
            UserError: it is too large, of another kind, or no image.
        """
        check_upload(file)
        upload = Upload(small_image(file, PICTURE_SIDE), searcher.reference_features(file))
        return self._next(Step(reference=Path(file.name), row=None, upload=upload))

    def ask(self, searcher: "Searcher", text: str, k: int) -> "Dialogue":
        """Search with the last reference and a text."""
        if self.last is None:
            raise UserError("there is no reference yet: choose an image or upload one")
        upload = self.last.upload
        features = upload.features if upload else searcher.reference_features(self.last.reference)
        found = searcher.search(features, text, k)
        return self._with_last(replace(self.last, text=text.strip(), found=found))

    def undo(self) -> "Dialogue":
        """Go back by a step: from answers to the question, from a reference to the answers it was chosen from."""
        if self.last is None:
            return self
        if self.last.found is not None:
            return self._with_last(replace(self.last, found=None))
        return Dialogue(self.steps[:-1])

    def _next(self, step: Step) -> "Dialogue":
        """Add a step. It replaces the last one if no search was made with that."""
        if self.last is None or self.last.found:
            return Dialogue((*self.steps, step)[-MOST_STEPS:])
        return self._with_last(step)

    def _with_last(self, step: Step) -> "Dialogue":
        """The same with another last step."""
        return Dialogue((*self.steps[:-1], step))


def check_upload(file: Path) -> None:
    """Refuse what is no image of a reasonable size. Pixels are counted before they are decoded."""
    if file.suffix.lower() not in KINDS:
        raise UserError(f"{file.name} is not an image: upload one of {' '.join(sorted(KINDS))}")
    if file.stat().st_size > MOST_BYTES:
        raise UserError(
            f"{file.name} is larger than {MOST_BYTES // 2**20} MiB: upload a smaller copy"
        )
    try:
        with Image.open(file, formats=FORMATS) as image:
            pixels = image.width * image.height
        if pixels <= MOST_PIXELS:
            opened(file)
            return
    except Image.DecompressionBombError:
        pass  # the limits are named at the end
    except DECODING_ERRORS as error:
        raise UserError(
            f"{file.name} cannot be decoded ({_reason(error)}): upload a whole image"
        ) from None
    limits = f"{MOST_PIXELS // 10**6} million pixels, or a side of more than {LONGEST_SIDE:,}"
    raise UserError(f"{file.name} has more than {limits}: upload a smaller copy")


def _reason(error: Exception) -> str:
    """Why a file cannot be decoded, without the path that Python and Pillow name."""
    if isinstance(error, UnidentifiedImageError):
        return f"none of {', '.join(FORMATS)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)
