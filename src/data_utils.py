"""Image files to tensors: padding, preprocessing, decoding and batches, independent of any benchmark."""

import errno
import functools
import multiprocessing
import os
import re
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from runtime import interruption
from runtime.collate import Collate, batch_room
from runtime.image_files import decoded, unreadable
from runtime.prefetch import on_device
from utils import REMEDIES, WORKERS_REMEDY, UserError, first_line

# Errors of limits on open files, processes and memory, which are not fixed by more shared memory.
LIMITS = (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM)


# The results are bit-identical to torchvision's. Importing torchvision would take a second, since its models load
# torch's compiler.
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
Step = Callable[[Image.Image], Image.Image]


def pad(image: Image.Image, margins: tuple[int, ...]) -> Image.Image:
    """Add margins of value 0 to an image, without changing its mode.

    Args:
        margins: numbers of pixels, as (left and right, above and below) or as (left, above, right, below).
    """
    bands = len(image.getbands())
    padded = ImageOps.expand(image, margins, fill=(0,) * bands if bands > 1 else 0)
    if image.mode == "P":
        padded.putpalette(image.getpalette() or [])
    return padded


class Resize:
    """Resize an image so that its shorter side has `side` pixels; the longer side is rounded down."""

    def __init__(self, side: int, interpolation: str) -> None:
        self.side = side
        self.resampling = RESAMPLING[interpolation]

    def __call__(self, image: Image.Image) -> Image.Image:
        shortest = min(image.size)
        width, height = (
            self.side if pixels == shortest else int(self.side * pixels / shortest)
            for pixels in image.size
        )
        same = (width, height) == image.size
        return image if same else image.resize((width, height), self.resampling)


class Squash(Resize):
    """Resize an image to a square, without keeping its aspect ratio."""

    def __call__(self, image: Image.Image) -> Image.Image:
        size = (self.side, self.side)
        return image if image.size == size else image.resize(size, self.resampling)


class CenterCrop:
    """Crop the central square of `side` pixels from an image that is at least as large."""

    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        left, top = round((width - self.side) / 2), round((height - self.side) / 2)
        return image.crop((left, top, left + self.side, top + self.side))


class SquarePad:
    """Zero-pad an image to a square: a side of n pixels gets int((max(w, h) - n) / 2) pixels on both ends."""

    def margins(self, width: int, height: int) -> tuple[int, int]:
        """Return the numbers of pixels to add on the left and right, and above and below."""
        longest = max(width, height)
        return int((longest - width) / 2), int((longest - height) / 2)

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the padded image, in its original mode."""
        margins = self.margins(*image.size)
        return pad(image, margins) if any(margins) else image


class TargetPad(SquarePad):
    """Zero-pad an image with an aspect ratio of at least `ratio` to a ratio of about `ratio` (Baldrati et al. 2023)."""

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio

    def margins(self, width: int, height: int) -> tuple[int, int]:
        """Return the numbers of pixels to add on the left and right, and above and below."""
        longest = max(width, height)
        if longest / min(width, height) < self.ratio:
            return 0, 0
        wanted = longest / self.ratio
        return max(int((wanted - width) / 2), 0), max(int((wanted - height) / 2), 0)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB."""
    return image.convert("RGB")


class FitInside(Resize):
    """Resize an image so that its longer side is `side`, and zero-pad it to a square, as open_clip's `longest` does."""

    def __call__(self, image: Image.Image) -> Image.Image:
        longest = max(image.size)
        width, height = (round(pixels * self.side / longest) for pixels in image.size)
        same = (width, height) == image.size
        resized = image if same else image.resize((width, height), self.resampling)
        left = (self.side - width) // 2
        top = (self.side - height) // 2
        return pad(resized, (left, top, self.side - width - left, self.side - height - top))


@dataclass(frozen=True)
class Preprocess:
    """Convert a PIL image to uint8 (3, R, R) in steps."""

    steps: tuple[Step, ...]

    def __call__(self, image: Image.Image) -> Tensor:
        for step in self.steps:
            image = step(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def make_preprocess(
    transform: str,
    target_ratio: float,
    resolution: int,
    *,
    interpolation: str = "bicubic",
    resize_mode: str = "shortest",
) -> Preprocess:
    """Return the preprocessing of PIL images to uint8 (3, resolution, resolution), the input of `normalise`.

    An image is padded in its original mode, and converted to RGB after resizing, as in CLIP's pipeline.

    Args:
        transform: one of TRANSFORMS.
        target_ratio: ratio of the longer to the shorter side from which targetpad pads.
        resolution: side of the model's input in pixels.
        interpolation: resampling of the model's own preprocessing.
        resize_mode: resizing of the model's own preprocessing; used only by `clip`, since padding keeps aspect ratios.
    """
    steps: list[Step] = [Resize(resolution, interpolation), CenterCrop(resolution)]
    if transform == "squarepad":
        steps.insert(0, SquarePad())
    elif transform == "targetpad":
        steps.insert(0, TargetPad(target_ratio))
    elif resize_mode == "squash":
        steps = [Squash(resolution, interpolation)]
    elif resize_mode == "longest":
        steps = [FitInside(resolution, interpolation)]
    return Preprocess((*steps, to_rgb))


Colour = tuple[float, float, float]  # red, green, blue, in 0 to 1


def normalise(pixels: Tensor, mean: Colour, std: Colour) -> Tensor:
    """Convert pixels to a CLIP's input, uint8 (..., 3, R, R) -> float32, bit-identical to ToTensor and Normalize."""
    means = _on(pixels.device, mean)
    return pixels.float().div_(255).sub_(means).div_(_on(pixels.device, std))


@functools.lru_cache
def _on(device: torch.device, colour: Colour) -> Tensor:
    """Return a colour as (3, 1, 1); it is cached, since each transfer to a device blocks until it is complete."""
    return torch.tensor(colour, device=device).view(3, 1, 1)


Reader = Callable[[Path], Tensor]  # image file -> preprocessed uint8 (3, R, R)


def load_image(
    path: Path | BinaryIO,
    preprocess: Preprocess,
    opened: Callable[[Any], Image.Image] = decoded,
) -> Tensor:
    """Open and preprocess one image to uint8 (3, R, R).

    Raises:
        UserError: the image cannot be decoded, or is too large; the message names its file.
    """
    try:
        return preprocess(opened(path))
    except (OSError, ValueError, MemoryError, Image.DecompressionBombError) as error:
        raise unreadable(path, error) from None


def read_or_explain(path: Path, read: Reader, resolution: int) -> tuple[Tensor, str]:
    """Return a preprocessed image and "", or a black image and the reason why the file cannot be read."""
    try:
        return read(path), ""
    except UserError as error:
        return torch.zeros(3, resolution, resolution, dtype=torch.uint8), str(error)


class ImageDataset(Dataset):
    """Dataset of image files, whose item for a path is `read(path)`."""

    def __init__(self, read: Callable[[Path], Any]) -> None:
        self.read = read

    def __getitem__(self, path: Path) -> Any:
        return self.read(path)


def _start_worker(number: int) -> None:
    interruption.heed_parent_alone()


def _try_socket() -> None:
    """Raise OSError if a worker could not create the socket for its batches, for example because TMPDIR is too long."""
    if not hasattr(socket, "AF_UNIX"):  # Windows
        return
    with tempfile.TemporaryDirectory(prefix="pymp-") as own, socket.socket(socket.AF_UNIX) as tried:
        place = Path(interruption.socket_folder() or own, f"listener-{os.getpid():08}")
        tried.bind(str(place))  # its name is as long as the names that Python uses
        place.unlink()


class ImageLoader:
    """Load images in batches onto a device, with data-loader workers that are kept from one pass to the next.

    The first pass starts the workers, which end when nothing refers to the loader any more. They pass batches to this
    process in shared memory, or in files if shared memory is too small.

    Args:
        read: function from an image file to a tensor, or to a tensor and a text; its results are stacked.
        workers: number of data-loader workers; with 0, this process decodes the images.
    """

    def __init__(self, read: Callable[[Any], Any], workers: int, device: torch.device) -> None:
        self.read = read
        self.workers = workers
        self.device = device
        self._files: list[list[Path]] = []  # batches of the current pass
        self._kept = self._loader(self._files) if workers else None
        self._in_a_pass = False

    def batches(self, files: list[list[Path]]) -> Iterator[Any]:
        """Yield the stacked results of `read` for each list of files, on the device, in one pass.

        Raises:
            UserError: an image cannot be decoded, or the workers cannot start.
            RuntimeError: a worker died, or a pass began during another pass, and the workers cannot serve both.
        """
        if self._in_a_pass:
            raise RuntimeError("a pass over images has begun inside another")
        # Without workers, several threads may read at the same time.
        self._in_a_pass = self.workers > 0
        try:
            yield from on_device(self._begin(files), self.device)
        except UserError as error:
            # An error of a worker arrives as a message that contains its traceback and ends with its own message.
            message = re.split(r"\bUserError: ", str(error))[-1].strip()
            raise UserError(message) from None
        finally:
            self._in_a_pass = False

    def _begin(self, files: list[list[Path]]) -> Iterator[Any]:
        """Begin a pass, and return its batches on the CPU."""
        if self._kept is None:
            return iter(self._loader(files))
        self._files[:] = files
        # Sockets and locks are tried here first, because PyTorch would wait for ever if a socket's path is too long
        # (TMPDIR), and print a traceback if there is no room for a lock (/dev/shm). The folder of the socket is deleted
        # at once: workers would inherit Python's own folder for sockets, and leave it behind if all were killed.
        _try_socket()
        before = sys.unraisablehook
        # If the loader cannot be constructed, torch would print an error while deleting the unfinished object.
        sys.unraisablehook = lambda _: None
        try:
            multiprocessing.get_context(interruption.START_METHOD).Lock()
            with interruption.deferred():
                return iter(self._kept)
        except OSError as error:
            reason = first_line(error)
            remedy = REMEDIES[error.errno] if error.errno in LIMITS else WORKERS_REMEDY
        finally:
            sys.unraisablehook = before
        raise UserError(f"the data-loader processes cannot start ({reason}): {remedy}")

    def _loader(self, files: list[list[Path]]) -> DataLoader:
        # A loader draws a seed from its generator when a pass begins. With torch's global generator, dropout would
        # depend on the number of earlier passes.
        generator = torch.Generator()
        return DataLoader(
            ImageDataset(self.read),
            batch_sampler=files,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            collate_fn=Collate(batch_room(self.workers)),
            pin_memory=self.device.type == "cuda",
            generator=generator,
            worker_init_fn=_start_worker,
            multiprocessing_context=interruption.START_METHOD if self.workers else None,
        )
