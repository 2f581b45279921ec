"""Image files to tensors: padding, preprocessing, decoding, batches. It knows no benchmark."""

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

# Of open files, processes and memory, which shared memory has nothing to do with.
LIMITS = (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM)


# torchvision does the same to the same bits; to import it takes a second, for its models bring torch's compiler.
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
Step = Callable[[Image.Image], Image.Image]


def pad(image: Image.Image, margins: tuple[int, ...]) -> Image.Image:
    """Add margins of value 0 in the image's own mode.

    Args:
        margins: pixels to the left and right, above and below; or left, above, right, below.
    """
    bands = len(image.getbands())
    padded = ImageOps.expand(image, margins, fill=(0,) * bands if bands > 1 else 0)
    if image.mode == "P":
        padded.putpalette(image.getpalette() or [])
    return padded


class Resize:
    """Resize an image so that its shorter side has `side` pixels, the longer one rounded down."""

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
    """Resize an image to a square, whatever its proportions."""

    def __call__(self, image: Image.Image) -> Image.Image:
        size = (self.side, self.side)
        return image if image.size == size else image.resize(size, self.resampling)


class CenterCrop:
    """Cut a square of `side` pixels out of the middle of an image that is no smaller."""

    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        left, top = round((width - self.side) / 2), round((height - self.side) / 2)
        return image.crop((left, top, left + self.side, top + self.side))


class SquarePad:
    """Zero-pad an image to a square: a side of n pixels gets int((max(w, h) - n) / 2) on both ends."""

    def margins(self, width: int, height: int) -> tuple[int, int]:
        """Pixels to the left and to the right, and above and below."""
        longest = max(width, height)
        return int((longest - width) / 2), int((longest - height) / 2)

    def __call__(self, image: Image.Image) -> Image.Image:
        """The padded image, in its own mode."""
        margins = self.margins(*image.size)
        return pad(image, margins) if any(margins) else image


class TargetPad(SquarePad):
    """Zero-pad an image whose sides' ratio is at least `ratio` until it is about `ratio` (Baldrati et al. 2023)."""

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio

    def margins(self, width: int, height: int) -> tuple[int, int]:
        """Pixels to the left and to the right, and above and below."""
        longest = max(width, height)
        if longest / min(width, height) < self.ratio:
            return 0, 0
        wanted = longest / self.ratio
        return max(int((wanted - width) / 2), 0), max(int((wanted - height) / 2), 0)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of PIL to RGB."""
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
    """PIL image to bytes (3, R, R), uint8, in steps."""

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
    """PIL image to bytes (3, resolution, resolution), uint8; `normalise` makes CLIP's input of them.

    An image is padded in the mode it was opened in. It becomes RGB after resizing, as in CLIP's pipeline.

    Args:
        transform: one of TRANSFORMS.
        target_ratio: longest to shortest side from which on targetpad pads.
        resolution: of the model's input, in pixels.
        interpolation: of the model's own evaluations.
        resize_mode: of the model's own evaluations, which `clip` alone follows: what is padded keeps its proportions.
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
    """A CLIP's input from bytes, (..., 3, R, R) uint8 -> float32. Bit-equal to ToTensor and Normalize."""
    means = _on(pixels.device, mean)
    return pixels.float().div_(255).sub_(means).div_(_on(pixels.device, std))


@functools.lru_cache
def _on(device: torch.device, colour: Colour) -> Tensor:
    """A colour as (3, 1, 1). It is sent to a device once, since sending waits for it."""
    return torch.tensor(colour, device=device).view(3, 1, 1)


Reader = Callable[[Path], Tensor]  # image file -> preprocessed bytes (3, R, R)


def load_image(
    path: Path | BinaryIO,
    preprocess: Preprocess,
    opened: Callable[[Any], Image.Image] = decoded,
) -> Tensor:
    """Open and preprocess one image, (3, R, R) uint8.

    Raises:
        UserError: it cannot be decoded, or is too large; its file is named.
    """
    try:
        return preprocess(opened(path))
    except (OSError, ValueError, MemoryError, Image.DecompressionBombError) as error:
        raise unreadable(path, error) from None


def read_or_explain(path: Path, read: Reader, resolution: int) -> tuple[Tensor, str]:
    """A preprocessed image and "", or a black one and why the file cannot be read."""
    try:
        return read(path), ""
    except UserError as error:
        return torch.zeros(3, resolution, resolution, dtype=torch.uint8), str(error)


class ImageDataset(Dataset):
    """Dataset of image files: the item of a path is the value that `read` returns."""

    def __init__(self, read: Callable[[Path], Any]) -> None:
        self.read = read

    def __getitem__(self, path: Path) -> Any:
        return self.read(path)


def _start_worker(number: int) -> None:
    interruption.heed_parent_alone()
    # Errors of reading go to the parent. What is printed beside them is of threads that the parent's end surprises.
    sys.excepthook = lambda *about: None


def _try_socket() -> None:
    """Raise OSError where a worker could make no socket to hand a batch over by, such as for too long a TMPDIR."""
    if not hasattr(socket, "AF_UNIX"):  # Windows
        return
    with tempfile.TemporaryDirectory(prefix="pymp-") as own, socket.socket(socket.AF_UNIX) as tried:
        place = Path(interruption.socket_folder() or own, f"listener-{os.getpid():08}")
        tried.bind(str(place))  # of the length that Python's own have
        place.unlink()


class ImageLoader:
    """Load images in batches onto a device, decoded by processes that are kept from one pass to the next.

    The first pass starts the processes. They end when nothing refers to the loader any more. They hand batches over in
    shared memory, or in files if it is too small.

    Args:
        read: makes what is stacked of an image file: a tensor, or a tensor and a text.
        workers: processes that decode; with 0, this process does.
    """

    def __init__(self, read: Callable[[Any], Any], workers: int, device: torch.device) -> None:
        self.read = read
        self.workers = workers
        self.device = device
        self._files: list[list[Path]] = []  # of the pass that the processes are at
        self._kept = self._loader(self._files) if workers else None
        self._in_a_pass = False

    def batches(self, files: list[list[Path]]) -> Iterator[Any]:
        """Load, in one pass, what is read from each list of files, stacked, on the device.

        Raises:
            UserError: an image cannot be decoded, or the processes cannot start.
            RuntimeError: a process died, or a pass has begun inside another, whose processes cannot serve both.
        """
        if self._in_a_pass:
            raise RuntimeError("a pass over images has begun inside another")
        self._in_a_pass = self.workers > 0  # without processes, threads may read at once
        try:
            yield from on_device(self._begin(files), self.device)
        except UserError as error:
            # A worker process sends its error as a traceback in text, which ends with the message.
            message = re.split(r"\bUserError: ", str(error))[-1].strip()
            raise UserError(message) from None
        finally:
            self._in_a_pass = False

    def _begin(self, files: list[list[Path]]) -> Iterator[Any]:
        """Begin a pass over the batches on the CPU."""
        if self._kept is None:
            return iter(self._loader(files))
        self._files[:] = files
        # What a process needs is tried here first, because PyTorch would wait for ever if a socket's path is too long
        # (TMPDIR), and print a traceback if there is no room for a lock (/dev/shm).
        # A folder of this process's own for sockets would be the workers' too, and stay if all of them are killed.
        _try_socket()
        before = sys.unraisablehook
        sys.unraisablehook = lambda _: (
            None
        )  # of a loader that is half made, which torch cannot undo
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
        # A loader draws a seed when it starts. With torch's own generator, dropout would depend on
        # how much was decoded before.
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
