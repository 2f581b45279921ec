"""Image files to tensors: padding, preprocessing, decoding, batches. It knows no benchmark."""

import functools
import gc
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize
from torchvision.transforms import functional as F

from runtime import interruption
from runtime.image_files import decoded
from utils import WORKERS_REMEDY, UserError, first_line

logger = logging.getLogger(__name__)

# What PyTorch says where processes die or cannot hand over what they read.
SIGNS_OF_PROCESSES = (
    "killed by signal", "exited unexpectedly", "shared memory", "</torch_", "received 0 items of ancdata",
    "can't start new thread", "Too many open files", "annot allocate memory",
)  # fmt: skip


MOST_PADDED = 60_000_000  # pixels up to which a padded image is made at once, in 180 MB
STRIP = 4_000_000  # pixels of a part of a larger one
PREMULTIPLIED = {"LA": "La", "RGBA": "RGBa"}  # in which Pillow scales


class SquarePad:
    """Zero-pad an image to a square: a side of n pixels gets int((max(w, h) - n) / 2) on both ends."""

    def margins(self, width: int, height: int) -> tuple[int, int]:
        """Pixels to the left and to the right, and above and below."""
        longest = max(width, height)
        return int((longest - width) / 2), int((longest - height) / 2)

    def __call__(self, image: Image.Image) -> Image.Image:
        """The padded image, in its own mode."""
        margins = self.margins(*image.size)
        return F.pad(image, list(margins), 0, padding_mode="constant") if any(margins) else image


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


class PadAndResize:
    """Pad an image, then scale its shorter side to a resolution.

    The padding of a long image can have a thousand times its pixels. It is then never made as a whole, and the result
    is the same to the last bit: Pillow scales every row by itself, which leaves rows of zeros alone, and then columns.
    """

    def __init__(self, pad: SquarePad, resolution: int, interpolation: InterpolationMode) -> None:
        self.pad = pad
        self.resize = Resize(resolution, interpolation=interpolation)
        self.sampling = Image.Resampling[interpolation.name]
        self.resolution = resolution

    def __call__(self, image: Image.Image) -> Image.Image:
        """The image in its own mode, its shorter side `resolution` pixels long."""
        across, down = self.pad.margins(*image.size)
        width = image.width + 2 * across
        height = image.height + 2 * down
        if width * height <= MOST_PADDED or image.size == (width, height):
            return self.resize(self.pad(image))
        if image.mode in PREMULTIPLIED:
            return self(image.convert(PREMULTIPLIED[image.mode])).convert(image.mode)
        short = min(width, height)
        size = (int(self.resolution * width / short), int(self.resolution * height / short))
        narrow = Image.new(image.mode, (size[0], height))
        rows = max(STRIP // width, 1)
        for top in range(0, image.height, rows):
            strip = image.crop((0, top, image.width, min(top + rows, image.height)))
            padded = F.pad(strip, [across, 0], 0, padding_mode="constant")
            narrow.paste(padded.resize((size[0], strip.height), self.sampling), (0, down + top))
        if padded.palette:
            narrow.putpalette(padded.getpalette())
        return narrow.resize(size, self.sampling)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of PIL to RGB."""
    return image.convert("RGB")


class FitInside:
    """Resize an image so that its longer side is `side`, and zero-pad it to a square, as open_clip's `longest` does."""

    def __init__(self, side: int, interpolation: InterpolationMode) -> None:
        self.side = side
        self.interpolation = interpolation

    def __call__(self, image: Image.Image) -> Image.Image:
        longest = max(image.size)
        width, height = (round(pixels * self.side / longest) for pixels in image.size)
        resized = F.resize(image, [height, width], self.interpolation)
        left = (self.side - width) // 2
        top = (self.side - height) // 2
        margins = [left, top, self.side - width - left, self.side - height - top]
        return F.pad(resized, margins, 0, padding_mode="constant")


def make_preprocess(
    transform: str,
    target_ratio: float,
    resolution: int,
    *,
    interpolation: str = "bicubic",
    resize_mode: str = "shortest",
) -> Compose:
    """PIL image to bytes (3, resolution, resolution), uint8; `normalise` makes CLIP's input of them.

    An image is padded in the mode it was opened in. It becomes RGB after resizing, as in CLIP's pipeline.

    Args:
        transform: one of TRANSFORMS.
        target_ratio: longest to shortest side from which on targetpad pads.
        resolution: of the model's input, in pixels.
        interpolation: of the model's own evaluations.
        resize_mode: of the model's own evaluations, which `clip` alone follows: what is padded keeps its proportions.
    """
    how = InterpolationMode(interpolation)
    steps: list[Callable[[Any], Any]] = [
        Resize(resolution, interpolation=how),
        CenterCrop(resolution),
    ]
    if transform == "squarepad":
        steps[0] = PadAndResize(SquarePad(), resolution, how)
    elif transform == "targetpad":
        steps[0] = PadAndResize(TargetPad(target_ratio), resolution, how)
    elif resize_mode == "squash":
        steps = [Resize((resolution, resolution), interpolation=how)]
    elif resize_mode == "longest":
        steps = [FitInside(resolution, how)]
    return Compose([*steps, to_rgb, PILToTensor()])


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
Item = TypeVar("Item")


def load_image(
    path: Path | BinaryIO,
    preprocess: Compose,
    opened: Callable[[Any], Image.Image] = decoded,
) -> Tensor:
    """Open and preprocess one image, (3, R, R) uint8.

    Raises:
        UserError: it cannot be decoded; its file is named.
    """
    try:
        return preprocess(opened(path))
    except (OSError, ValueError, MemoryError, Image.DecompressionBombError) as error:
        reason = first_line(error)
    raise UserError(
        f"image {path} cannot be decoded ({reason}): replace the file with a whole copy of the image"
    )


def read_or_explain(path: Path, read: Reader, resolution: int) -> tuple[Tensor, str]:
    """A preprocessed image and "", or a black one and why the file cannot be read."""
    try:
        return read(path), ""
    except UserError as error:
        return torch.zeros(3, resolution, resolution, dtype=torch.uint8), str(error)


class ImageDataset(Dataset):
    """What is read from image files: the item of a path is what `read` makes of it."""

    def __init__(self, read: Callable[[Path], Any]) -> None:
        self.read = read

    def __getitem__(self, path: Path) -> Any:
        return self.read(path)


def _start_worker(number: int) -> None:
    interruption.heed_parent_alone()
    # Errors of reading go to the parent. What is printed beside them is of threads that the parent's end surprises.
    sys.excepthook = lambda *about: None


class ImageLoader:
    """Images in batches on a device, decoded by processes that are kept from one pass to the next.

    The first pass starts the processes. They end when nothing refers to the loader any more. They hand batches over in
    shared memory. Where they die of too little of it, or of another limit, others go on that write batches to pipes;
    where those die too, this process decodes.

    Args:
        read: makes what is stacked of an image file: a tensor, or a tensor and a text.
        workers: processes that decode; with 0, this process does.
    """

    def __init__(self, read: Callable[[Any], Any], workers: int, device: torch.device) -> None:
        self.read = read
        self.workers = workers
        self.device = device
        self._files: list[list[Path]] = []  # of the pass that the processes are at
        self._in_shared_memory = True
        self._kept = self._loader(self._files) if workers else None
        self._in_a_pass = False

    def batches(self, files: list[list[Path]]) -> Iterator[Any]:
        """One pass: what is read from each list of files, stacked, on the device.

        Raises:
            UserError: an image cannot be decoded.
            RuntimeError: a pass has begun inside another, whose processes cannot serve both.
        """
        if self._in_a_pass:
            raise RuntimeError("a pass over images has begun inside another")
        self._in_a_pass = self.workers > 0  # without processes, threads may read at once
        try:
            yield from on_device(map(_as_tensors, self._lasting(files)), self.device)
        except UserError as error:
            # A worker process sends its error as a traceback in text, which ends with the message.
            message = re.split(r"\bUserError: ", str(error))[-1].strip()
            raise UserError(message) from None
        finally:
            self._in_a_pass = False

    def _lasting(self, files: list[list[Path]]) -> Iterator[Any]:
        """The batches of a pass on the CPU, in another way from where processes die on."""
        delivered = 0
        try:
            with interruption.deferred():
                loaded = self._begin(files)
            for batch in loaded:
                delivered += 1
                yield batch
            return
        except (RuntimeError, OSError, EOFError) as error:
            if self._kept is None or not _is_of_processes(error):
                raise
            self._fall_back(error)
        # What is left of the processes ends now: nothing holds the pass but the error, which holds itself.
        loaded = iter(())
        gc.collect()
        yield from self._lasting(files[delivered:])

    def _fall_back(self, error: Exception) -> None:
        """Have batches made in the way that needs less of the machine."""
        self._kept = None
        if self._in_shared_memory:
            self._in_shared_memory = False
            self._kept = self._loader(self._files)
        way = "through pipes" if self._kept else "without them, which is slower"
        logger.warning(
            "warning: processes that decode images failed (%s): going on %s; %s",
            first_line(error)[:120],
            way,
            WORKERS_REMEDY,
        )

    def _begin(self, files: list[list[Path]]) -> Iterator[Any]:
        """Begin a pass; its batches on the CPU."""
        if self._kept is None:
            return iter(self._loader(files, workers=0))
        self._files[:] = files
        return iter(self._kept)

    def _loader(self, files: list[list[Path]], workers: int | None = None) -> DataLoader:
        """What decodes, in as many processes as the loader has unless `workers` says otherwise."""
        workers = self.workers if workers is None else workers
        # A loader draws a seed when it starts. With torch's own generator, dropout would depend on
        # how much was decoded before.
        generator = torch.Generator()
        return DataLoader(
            ImageDataset(self.read),
            batch_sampler=files,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=None if self._in_shared_memory else _as_arrays,
            pin_memory=self.device.type == "cuda",
            generator=generator,
            worker_init_fn=_start_worker,
            multiprocessing_context=interruption.START_METHOD if workers else None,
        )


def _is_of_processes(error: Exception) -> bool:
    """Whether an error is that processes could not be started, died, or could not hand over what they made.

    What an image file has to do with is a UserError; so any other error of input or output is of the processes.
    """
    if isinstance(error, RuntimeError):
        return any(sign in str(error) for sign in SIGNS_OF_PROCESSES)
    return True


def _as_arrays(items: list[Any]) -> Any:
    """Stack what was read, without shared memory: arrays go through a pipe."""
    if isinstance(items[0], Tensor):
        return np.stack([item.numpy() for item in items])
    pixels, texts = zip(*items, strict=True)
    return [_as_arrays(list(pixels)), list(texts)]


def _as_tensors(batch: Any) -> Any:
    """A batch whose arrays are tensors."""
    if isinstance(batch, list):
        return [_as_tensors(part) for part in batch]
    return torch.from_numpy(batch) if isinstance(batch, np.ndarray) else batch


def on_device(batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """The batches with their tensors on a device. To a GPU the next one is sent while it works with the one before."""
    if device.type != "cuda":
        for batch in batches:
            yield _each_tensor(batch, lambda tensor: tensor.to(device))
        return
    sending = torch.cuda.Stream(device)
    working = torch.cuda.current_stream(device)

    def to_gpu(tensor: Tensor) -> Tensor:
        sent = tensor.to(device, non_blocking=True)
        # Its memory, which is of the stream that sends, is in use until this one's work is done.
        sent.record_stream(working)
        return sent

    def send(batch: Any) -> tuple[Any, torch.cuda.Event]:
        with torch.cuda.stream(sending):
            return _each_tensor(batch, to_gpu), sending.record_event()

    for batch, arrival in one_ahead(map(send, batches)):
        working.wait_event(arrival)
        yield batch


def one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The items in order, each when the one after it has been taken too."""
    taken: list[Item] = []
    for item in items:
        taken.append(item)
        if len(taken) > 1:
            yield taken.pop(0)
    yield from taken


def _each_tensor(batch: Any, change: Callable[[Tensor], Any]) -> Any:
    """A batch, which is a tensor or a list of tensors and texts, with its tensors changed."""
    if isinstance(batch, Tensor):
        return change(batch)
    return [change(part) if isinstance(part, Tensor) else part for part in batch]
