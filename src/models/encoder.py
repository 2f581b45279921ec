"""Images and captions to features: a CLIP with the preprocessing that its features are made with."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL
import torch
import torchvision
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

from data_utils import (
    ImageDataset,
    ReadableImages,
    Reader,
    load_batches,
    load_image,
    make_preprocess,
    normalise,
)
from models.clip_model import CLIP, feature_dim, load_clip, load_finetuned, resolution, tokenize
from models.configuration import Checkpoint
from runtime import distributed
from runtime.choices import ClipChoice
from runtime.image_files import decoded
from runtime.precision import check_encode_precision, encoding
from utils import UserError


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A CLIP with the preprocessing that its features are made with. Features are unnormalised, float32.

    Attributes:
        recipe: model name, transform, target ratio, precision and resolution, from which `model` and `read` were made.
        workers: processes that decode images, 0 for this one.
        between: called between two batches of images; what it raises ends the encoding.
    """

    model: CLIP
    read: Reader
    recipe: dict[str, Any]
    device: torch.device
    workers: int = 0
    batch_size: int = 32
    between: Callable[[], None] = lambda: None

    @torch.no_grad()
    def images(self, paths: list[Path], what: str = "images") -> Tensor:
        """Image files to features (len(paths), D) on the device, in order, with a progress bar that names `what`.

        Several processes share the work; each gets all features.
        """
        chunks = distributed.shard(_chunks(len(paths), self.batch_size))
        encoded = [self._no_features()]
        batches = load_batches(ImageDataset(paths, self.read), chunks, self.workers, self.device)
        with _progress(sum(map(len, chunks)), what) as bar:
            for pixels in batches:
                encoded.append(self._image_features(pixels))
                bar.update(len(pixels))
                self.between()
        return distributed.gather_shards(torch.cat(encoded))

    @torch.no_grad()
    def readable_images(self, paths: list[Path], what: str) -> tuple[Tensor, list[str]]:
        """Features (n, D) of the n image files that can be read, in order, and why each of all cannot, "" where it can.

        In this process alone.
        """
        encoded = [self._no_features()]
        could_be_read: list[bool] = []
        images = ReadableImages(paths, self.read, self.recipe["resolution"])
        batches = load_batches(
            images, _chunks(len(paths), self.batch_size), self.workers, self.device
        )
        with _progress(len(paths), what) as bar:
            for pixels, readable in batches:
                if readable.any():
                    encoded.append(self._image_features(pixels[readable]))
                could_be_read += readable.tolist()
                bar.update(len(pixels))
                self.between()
        reasons = [
            self._reason(path, readable)
            for path, readable in zip(paths, could_be_read, strict=True)
        ]
        return torch.cat(encoded), reasons

    @property
    def precision(self) -> str:
        """In what it encodes, one of ENCODE_PRECISIONS."""
        return self.recipe.get("encode_precision", "fp32")

    def _image_features(self, pixels: Tensor) -> Tensor:
        """Bytes (b, 3, R, R) to features (b, D)."""
        with encoding(self.precision, self.device):
            return self.model.encode_image(normalise(pixels)).float()

    def _text_features(self, tokens: Tensor) -> Tensor:
        """Tokens (b, 77) to features (b, D)."""
        with encoding(self.precision, self.device):
            return self.model.encode_text(tokens).float()

    def _no_features(self) -> Tensor:
        return torch.empty(0, feature_dim(self.model), device=self.device)

    def _reason(self, path: Path, readable: bool) -> str:
        """Why an image cannot be read."""
        if readable:
            return ""
        try:
            self.read(path)
        except UserError as error:
            return str(error)
        return f"image {path} could not be read a moment ago, now it can: start again"

    @torch.no_grad()
    def captions(self, captions: list[str]) -> Tensor:
        """Captions to features (len(captions), D) on the device, in order; a repeated one is encoded once."""
        unique = list(dict.fromkeys(captions))
        encoded = [self._no_features()]
        for rows in distributed.shard(_chunks(len(unique), self.batch_size)):
            tokens = tokenize([unique[row] for row in rows])
            encoded.append(self._text_features(tokens.to(self.device)))
        row_of = {caption: row for row, caption in enumerate(unique)}
        rows = torch.tensor([row_of[caption] for caption in captions], device=self.device)
        return distributed.gather_shards(torch.cat(encoded))[rows]

    def image_recipe(self) -> dict[str, Any]:
        """All that determines the preprocessed images beside the files themselves."""
        apart = {"clip_model_name", "encode_precision"}
        recipe = {name: value for name, value in self.recipe.items() if name not in apart}
        return {**recipe, "versions": versions()}

    def describe(self) -> dict[str, Any]:
        """All that determines the features beside the images and captions themselves, in plain types."""
        recipe = {name: value for name, value in self.recipe.items() if name != "encode_precision"}
        precision = f"{self.precision} on {self.device.type}"
        if self.precision == "fp32" and self.device.type == "cpu":
            precision = "float32 on cpu"  # as earlier versions said it, whose caches are still good
        return {
            **recipe,
            "weights": weights_digest(self.model.state_dict()),
            "precision": precision,
            "versions": versions(),
        }


def _progress(total: int, what: str) -> tqdm:
    """A progress bar of the one process that has the terminal; none where the output is no terminal."""
    hidden = None if distributed.is_main() else True
    return tqdm(total=total, desc=f"encoding {what}", unit="img", leave=False, disable=hidden)


def versions() -> dict[str, str]:
    """Versions of the packages that images and features pass through."""
    packages = {"torch": torch, "torchvision": torchvision, "pillow": PIL}
    return {name: str(package.__version__) for name, package in packages.items()}


def _chunks(count: int, size: int) -> list[list[int]]:
    """0 .. count - 1 in lists of `size`."""
    return [list(range(start, min(start + size, count))) for start in range(0, count, size)]


def weights_digest(state: dict[str, Tensor]) -> str:
    """SHA-256 of a state dict's names, shapes, types and values."""
    digest = hashlib.sha256()
    for name, weight in sorted(state.items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_encoder(
    settings: ClipChoice,
    tuned: Checkpoint | None,
    device: torch.device,
    *,
    workers: int,
    batch_size: int = 32,
    opened: Callable[[Path], Image] = decoded,
) -> Encoder:
    """CLIP in eval mode with its preprocessing.

    Args:
        settings: from `configuration.settle`: nothing in it is None.
        tuned: stage-1 weights that replace the model's own.
        opened: opens an image file.
    """
    recipe = dataclasses.asdict(settings)
    check_encode_precision(recipe["encode_precision"], device)
    model = load_clip(recipe["clip_model_name"], device)
    if tuned:
        load_finetuned(model, tuned.state, tuned.path)
    recipe["resolution"] = resolution(model)
    preprocess = make_preprocess(recipe["transform"], recipe["target_ratio"], recipe["resolution"])
    read = functools.partial(load_image, preprocess=preprocess, opened=opened)
    return Encoder(
        model=model, read=read, recipe=recipe, device=device, workers=workers, batch_size=batch_size
    )
