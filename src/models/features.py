"""A cache of features on disk, and the features of a split as tensors on the device."""

import functools
import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import Benchmark, Split
from models.encoder import Encoder, weights_digest
from runtime import distributed
from runtime.image_source import IMAGES
from runtime.tensors import load_tensors, save_tensors
from utils import UserError

logger = logging.getLogger(__name__)
PIECE = 4096  # images per intermediate file: about a minute of work for a GPU


class FeatureCache:
    """A cache of features on disk, one file per key; without a folder, nothing is cached.

    Truncated, damaged and foreign files are detected and written again. While many images are
    encoded, the features so far are in files of PIECE images each, from which an interrupted
    encoding resumes.

    Args:
        told_by: how a changed image is detected, see `runtime.files.stamp`.
    """

    def __init__(self, folder: Path | None, encoder: Encoder, *, told_by: str = "sample") -> None:
        self.folder = folder
        self.encoder = encoder
        self.told_by = told_by
        self.encoder_key = encoder.describe() if folder else None

    def images(self, paths: list[Path], label: str) -> Tensor:
        """Return the features (len(paths), D) of image files; `label` is a prefix of the cache file's name."""
        if self.folder is None:
            return self.encoder.images(paths, f"{label} images")
        identities = IMAGES.identities(paths, self.told_by)
        if len(paths) <= PIECE:
            encode = functools.partial(self.encoder.images, paths, f"{label} images")
            return self._get(f"{label}-images", identities, encode)
        encode = functools.partial(self._in_pieces, paths, identities, label)
        features = self._get(f"{label}-images", identities, encode)
        if distributed.is_main():
            self._drop_pieces(identities, label)
        return features

    def _in_pieces(self, paths: list[Path], identities: Sequence[object], label: str) -> Tensor:
        """Encode images in pieces, and cache each piece until all of them are encoded."""
        features = []
        for start in range(0, len(paths), PIECE):
            end = min(start + PIECE, len(paths))
            what = f"{label} images up to {end} of {len(paths)}"
            encode = functools.partial(self.encoder.images, paths[start:end], what)
            features.append(self._get(f"{label}-piece", identities[start:end], encode))
        return torch.cat(features)

    def _drop_pieces(self, identities: Sequence[object], label: str) -> None:
        """Delete the files of `_in_pieces`, if the file with all features is on disk."""
        whole, _ = self._place(f"{label}-images", identities)
        if whole.exists():
            for start in range(0, len(identities), PIECE):
                piece, _ = self._place(f"{label}-piece", identities[start : start + PIECE])
                piece.unlink(missing_ok=True)

    def captions(self, captions: list[str], label: str) -> Tensor:
        """Return the features (len(captions), D) of captions; `label` is a prefix of the cache file's name."""
        return self._get(f"{label}-captions", captions, lambda: self._encode_captions(captions))

    def _encode_captions(self, captions: list[str]) -> Tensor:
        self.encoder.warn_of_cuts(captions)
        return self.encoder.captions(captions)

    def _get(self, label: str, inputs: object, compute: Callable[[], Tensor]) -> Tensor:
        if self.folder is None:
            return compute()
        path, key = self._place(label, inputs)
        # Only the main rank reads the cache. It sends features or None to all ranks, so they agree whether to encode.
        kept = self._read(path, key) if distributed.is_main() else None
        features = distributed.from_main(kept, self.encoder.device)
        if features is None:
            features = compute()
            if distributed.is_main():
                self._write(path, key, features)
        return features

    def _place(self, label: str, inputs: object) -> tuple[Path, str]:
        """Return the cache file for the features of some inputs, and its key."""
        key = hashlib.sha256(json.dumps([label, self.encoder_key, inputs]).encode()).hexdigest()
        return (self.folder or Path()) / f"{label}-{key[:16]}.pt", key

    def _read(self, path: Path, key: str) -> Tensor | None:
        if not path.exists():
            return None
        try:
            content = load_tensors(path)
            features = content["features"]
            digest = weights_digest({"features": features})
            if content["key"] == key and content["digest"] == digest:
                logger.info("features read from %s", path)
                return features
        except (UserError, KeyError, AttributeError, TypeError):
            pass  # a foreign file gets the same warning as a damaged one
        logger.warning("%s is damaged or belongs to another run: encoding again", path)
        return None

    def _write(self, path: Path, key: str, features: Tensor) -> None:
        features = features.cpu()
        digest = weights_digest({"features": features})
        try:
            save_tensors(path, {"key": key, "digest": digest, "features": features})
        except UserError as error:  # nothing is lost, because the features are in memory
            logger.warning("%s; continuing without a cache", error)


@dataclass(frozen=True, kw_only=True)
class FrozenSplit:
    """Frozen features and tables of a split as tensors on the device, as an epoch or an evaluation needs them.

    Attributes:
        images: image features (N, D) in gallery order.
        captions: text features (Q, V, D), for V texts per triplet.
        texts: the protocols' names for the V texts of an evaluation.
        tables: tensors that depend only on the split, computed on first use and shared by all
            validations.
    """

    split: Split
    images: Tensor
    captions: Tensor
    texts: tuple[str, ...] = ("",)
    tables: dict[str, Tensor] = field(default_factory=dict)

    @property
    def reference_rows(self) -> Tensor:
        """Return the gallery row of each query's reference, (Q,)."""
        return self._table("reference_rows")

    @property
    def target_rows(self) -> Tensor:
        """Return the gallery row of each query's annotated target, (Q,). Raises ValueError if these are not public."""
        return self._table("target_rows")

    @property
    def other_target_rows(self) -> Tensor:
        """Return the gallery rows of each query's other targets, (Q, T - 1), see `Split.other_target_rows`."""
        return self._table("other_target_rows")

    @property
    def group_rows(self) -> Tensor:
        """Return the gallery rows of each query's group, (Q, G - 1), see `Split.group_rows`."""
        return self._table("group_rows")

    @property
    def outside(self) -> Tensor:
        """Return a mask (N,) of the gallery images that are neither reference nor target of any triplet."""
        return self._table("outside")

    def outside_of(self, gallery: str) -> Tensor | None:
        """Return a mask (N,) of the images that are not in a protocol's gallery; None if all images are in it."""
        if gallery == "VAL":
            return self.outside
        return self._table("unlisted") if self.split.only_asked else None

    def _table(self, name: str) -> Tensor:
        """Return a table of the split by its name, as a tensor on the device."""
        if name not in self.tables:
            rows = getattr(self.split, name)
            self.tables[name] = torch.tensor(rows, device=self.images.device)
        return self.tables[name]

    @property
    def references(self) -> Tensor:
        """Return the features (Q, D) of the queries' references."""
        return self.images[self.reference_rows]

    def captions_of(self, text: str) -> Tensor:
        """Return the features (Q, D) of the queries' texts for protocols that use this text."""
        return self.captions[:, self.texts.index(text)]


def freeze(
    cache: FeatureCache,
    split: Split,
    texts: list[list[str]],
    *,
    label: str,
    names: tuple[str, ...] = ("",),
) -> FrozenSplit:
    """Encode a split's images and the texts of its triplets, or read their features from the cache.

    Args:
        texts: V texts for each triplet.
        label: prefix of the cache files' names.
        names: the protocols' names for the V texts.
    """
    images = cache.images(split.paths, label)
    captions = cache.captions(list(itertools.chain.from_iterable(texts)), label)
    return FrozenSplit(
        split=split, images=images, captions=captions.unflatten(0, (len(texts), -1)), texts=names
    )


def freeze_queries(
    cache: FeatureCache, splits: list[Split], benchmark: Benchmark, label: str
) -> list[FrozenSplit]:
    """Return the features of each split's gallery, and of the query texts of all the benchmark's protocols."""
    frozen = []
    for split in splits:
        texts = [benchmark.evaluation_texts(triplet.captions) for triplet in split.triplets]
        own_label = f"{label}-{split.name}"
        frozen.append(freeze(cache, split, texts, label=own_label, names=benchmark.texts))
    return frozen
