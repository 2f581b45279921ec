"""Images and captions to CLIP features, once: the encoder, and a cache on disk with an honest key."""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import PIL
import torch
import torchvision
from torch import Tensor
from tqdm import tqdm

from benchmarks import Split
from clip_model import CLIP, feature_dim, tokenize
from data_utils import ImageDataset, ReadableImages, Reader, load_batches, normalise
from runtime import distributed
from runtime.files import file_identities
from runtime.tensors import load_tensors, save_tensors
from utils import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoder:
    """A CLIP with the preprocessing that its features are made with. Features are unnormalised, float32.

    Attributes:
        recipe: model name, transform, target ratio and resolution, from which `model` and `read` were made.
        between: called between two batches of images; what it raises ends the encoding.
    """

    model: CLIP
    read: Reader
    recipe: dict[str, str | int | float]
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
        encoded = [torch.empty(0, feature_dim(self.model), device=self.device)]
        batches = load_batches(ImageDataset(paths, self.read), chunks, self.workers, self.device)
        total, shown = sum(map(len, chunks)), None if distributed.is_main() else True
        with tqdm(total=total, desc=f"encoding {what}", unit="img", leave=False, disable=shown) as bar:
            for pixels in batches:
                encoded.append(self.model.encode_image(normalise(pixels)).float())
                bar.update(len(pixels))
                self.between()
        return distributed.gather_shards(torch.cat(encoded))

    @torch.no_grad()
    def readable_images(self, paths: list[Path], what: str) -> tuple[Tensor, list[str]]:
        """Features (n, D) of the n image files that can be read, in order, and why each of all cannot, "" where it can.

        In this process alone.
        """
        encoded, reasons = [torch.empty(0, feature_dim(self.model), device=self.device)], []
        images = ReadableImages(paths, self.read, self.recipe["resolution"])
        batches = load_batches(images, _chunks(len(paths), self.batch_size), self.workers, self.device)
        with tqdm(total=len(paths), desc=f"encoding {what}", unit="img", leave=False, disable=None) as bar:
            for pixels, readable in batches:
                if readable.any():
                    encoded.append(self.model.encode_image(normalise(pixels[readable])).float())
                reasons += readable.tolist()
                bar.update(len(pixels))
                self.between()
        return torch.cat(encoded), [self._reason(path, good) for path, good in zip(paths, reasons, strict=True)]

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
        encoded = [torch.empty(0, feature_dim(self.model), device=self.device)]
        for rows in distributed.shard(_chunks(len(unique), self.batch_size)):
            tokens = tokenize([unique[row] for row in rows])
            encoded.append(self.model.encode_text(tokens.to(self.device)).float())
        row_of = {caption: row for row, caption in enumerate(unique)}
        rows = torch.tensor([row_of[caption] for caption in captions], device=self.device)
        return distributed.gather_shards(torch.cat(encoded))[rows]

    def image_recipe(self) -> dict[str, str | int | float]:
        """All that determines the preprocessed images beside the files themselves."""
        return {k: v for k, v in self.recipe.items() if k != "clip_model_name"} | {"versions": versions()}

    def describe(self) -> dict[str, str | int | float]:
        """All that determines the features beside the images and captions themselves, in plain types."""
        return self.recipe | {
            "weights": weights_digest(self.model.state_dict()),
            "precision": f"float32 on {self.device.type}",
            "versions": versions(),
        }


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
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class FeatureCache:
    """Features on disk, one file for each key; without a folder nothing is kept.

    A file that is truncated, damaged or another's is noticed and made anew.
    """

    def __init__(self, folder: Path | None, encoder: Encoder) -> None:
        self.folder = folder
        self.encoder = encoder
        self.encoder_key = encoder.describe() if folder else None

    def images(self, paths: list[Path], label: str) -> Tensor:
        """Features (len(paths), D) of image files; `label` begins the name of the file that keeps them."""
        identities = file_identities(paths) if self.folder else None
        return self._get(f"{label}-images", identities, lambda: self.encoder.images(paths, f"{label} images"))

    def captions(self, captions: list[str], label: str) -> Tensor:
        """Features (len(captions), D) of captions; `label` begins the name of the file that keeps them."""
        return self._get(f"{label}-captions", captions, lambda: self.encoder.captions(captions))

    def _get(self, label: str, inputs: object, compute: Callable[[], Tensor]) -> Tensor:
        if self.folder is None:
            return compute()
        key = hashlib.sha256(json.dumps([label, self.encoder_key, inputs]).encode()).hexdigest()
        path = self.folder / f"{label}-{key[:16]}.pt"
        # The main rank reads and writes; the others get what it has, so that all agree whether to encode.
        features = distributed.from_main(self._read(path, key) if distributed.is_main() else None, self.encoder.device)
        if features is None:
            features = compute()
            if distributed.is_main():
                self._write(path, key, features)
        return features

    def _read(self, path: Path, key: str) -> Tensor | None:
        if not path.exists():
            return None
        try:
            content = load_tensors(path)
            features = content["features"]
            if content["key"] == key and content["digest"] == weights_digest({"features": features}):
                logger.info("features read from %s", path)
                return features
        except (UserError, KeyError, AttributeError, TypeError):
            pass  # not one of our files; said below, as for one of ours that is damaged
        logger.warning("%s is damaged or of another origin: encoding anew", path)
        return None

    def _write(self, path: Path, key: str, features: Tensor) -> None:
        features = features.cpu()
        try:
            save_tensors(path, {"key": key, "digest": weights_digest({"features": features}), "features": features})
        except UserError as error:
            logger.warning("%s; going on without a cache", error)  # the features are in memory: nothing is lost


@dataclass(frozen=True)
class FrozenSplit:
    """A split as tensors on the device: all that an epoch or an evaluation on frozen features needs.

    Attributes:
        images: (N, D) in gallery order.
        captions: (Q, V, D), V texts a triplet.
    """

    split: Split
    images: Tensor
    captions: Tensor


def freeze(cache: FeatureCache, split: Split, texts: list[list[str]], label: str) -> FrozenSplit:
    """Encode a split's images and the texts of its triplets, or take them from the cache.

    Args:
        texts: V texts for each triplet.
        label: beginning of the names of the cache's files.
    """
    images = cache.images(split.paths, label)
    captions = cache.captions([text for variants in texts for text in variants], label)
    return FrozenSplit(split, images, captions.unflatten(0, (len(texts), -1)))


def freeze_queries(
    cache: FeatureCache, splits: list[Split], caption: Callable[[tuple[str, ...]], str], label: str
) -> list[FrozenSplit]:
    """Each split's gallery and its evaluation captions as features, V = 1.

    Args:
        caption: the text of a triplet's captions at evaluation.
    """
    return [freeze(cache, s, [[caption(t.captions)] for t in s.triplets], f"{label}-{s.name}") for s in splits]
