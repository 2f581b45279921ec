"""Image files to tensors: padding, preprocessing, decoding, batches. It knows no benchmark."""

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize
from torchvision.transforms import functional as F

from runtime import interruption
from runtime.image_files import decoded
from utils import UserError, first_line

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class SquarePad:
    """Zero-pad an image to a square: a side of n pixels gets int((max(w, h) - n) / 2) on both ends."""

    def __call__(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        longest = max(width, height)
        horizontal = int((longest - width) / 2)
        vertical = int((longest - height) / 2)
        return F.pad(image, [horizontal, vertical], 0, padding_mode="constant")


class TargetPad:
    """Zero-pad an image whose sides' ratio is at least `ratio` until it is about `ratio` (Baldrati et al. 2023)."""

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio

    def __call__(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        longest = max(width, height)
        if longest / min(width, height) < self.ratio:
            return image
        wanted = longest / self.ratio
        horizontal = max(int((wanted - width) / 2), 0)
        vertical = max(int((wanted - height) / 2), 0)
        return F.pad(image, [horizontal, vertical], 0, padding_mode="constant")


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of PIL to RGB."""
    return image.convert("RGB")


def make_preprocess(transform: str, target_ratio: float, resolution: int) -> Compose:
    """PIL image to bytes (3, resolution, resolution), uint8; `normalise` makes CLIP's input of them.

    An image is padded in the mode it was opened in. It becomes RGB after resizing, as in CLIP's pipeline.

    Args:
        transform: one of TRANSFORMS.
        target_ratio: longest to shortest side from which on targetpad pads.
        resolution: of the model's input, in pixels.
    """
    steps: list[Callable[[Any], Any]] = [
        Resize(resolution, interpolation=InterpolationMode.BICUBIC),
        CenterCrop(resolution),
        to_rgb,
        PILToTensor(),
    ]
    if transform == "squarepad":
        steps.insert(0, SquarePad())
    elif transform == "targetpad":
        steps.insert(0, TargetPad(target_ratio))
    return Compose(steps)


def normalise(pixels: Tensor) -> Tensor:
    """CLIP's input from bytes, (..., 3, R, R) uint8 -> float32. Bit-equal to ToTensor and Normalize."""
    mean, std = _mean_and_std(pixels.device)
    return pixels.float().div_(255).sub_(mean).div_(std)


@functools.lru_cache
def _mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    """CLIP's constants, (3, 1, 1) each. They are sent to a device once, since sending waits for it."""
    mean = torch.tensor(CLIP_MEAN, device=device).view(3, 1, 1)
    std = torch.tensor(CLIP_STD, device=device).view(3, 1, 1)
    return mean, std


Reader = Callable[[Path], Tensor]  # image file -> preprocessed bytes (3, R, R)


def load_image(
    path: Path, preprocess: Compose, opened: Callable[[Path], Image.Image] = decoded
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


class ImageDataset(Dataset):
    """Preprocessed images, item i is (3, R, R) uint8."""

    def __init__(self, paths: list[Path], read: Reader) -> None:
        self.paths = paths
        self.read = read

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> Tensor:
        return self.read(self.paths[row])


class ReadableImages(Dataset):
    """Preprocessed images and whether each could be read, item i is (3, R, R) uint8 and () bool.

    An image that could not be read is black.
    """

    def __init__(self, paths: list[Path], read: Reader, resolution: int) -> None:
        self.paths = paths
        self.read = read
        self.resolution = resolution

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        try:
            return self.read(self.paths[row]), torch.tensor(True)
        except UserError:
            black = torch.zeros(3, self.resolution, self.resolution, dtype=torch.uint8)
            return black, torch.tensor(False)


def _start_worker(number: int) -> None:
    interruption.heed_parent_alone()


def load_batches(
    dataset: Dataset, batches: list[list[int]], workers: int, device: torch.device
) -> Iterator[Any]:
    """The items at each list of rows, stacked, on the device.

    Args:
        workers: processes that decode; with 0, this process does.
    """
    pinned = device.type == "cuda"
    # A loader draws a seed when it starts. With torch's own generator, dropout would depend on how much
    # was decoded before.
    generator = torch.Generator()
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=pinned,
        generator=generator,
        worker_init_fn=_start_worker,
        multiprocessing_context=interruption.START_METHOD if workers else None,
    )
    try:
        with interruption.deferred():
            loaded = iter(loader)
        for batch in loaded:
            if isinstance(batch, Tensor):
                yield batch.to(device, non_blocking=pinned)
            else:
                yield [tensor.to(device, non_blocking=pinned) for tensor in batch]
    except UserError as error:
        # A worker process sends its error as a traceback in text, which ends with the message.
        message = re.split(r"\bUserError: ", str(error))[-1].strip()
        raise UserError(message) from None
