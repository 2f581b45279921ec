"""Features kept: a cache on disk with an honest key, and a split as tensors on the device."""

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
PIECE = 4096  # images: a minute of a GPU, and few files


class FeatureCache:
    """Features on disk, one file for each key; without a folder nothing is kept.

    Truncated, damaged and foreign files are detected and made again. While many images are encoded, what is done
    lies in files of PIECE images each, with which an interrupted encoding resumes.

    Args:
        told_by: how a changed image is told, see `runtime.files.stamp`.
    """

    def __init__(self, folder: Path | None, encoder: Encoder, *, told_by: str = "sample") -> None:
        self.folder = folder
        self.encoder = encoder
        self.told_by = told_by
        self.encoder_key = encoder.describe() if folder else None

    def images(self, paths: list[Path], label: str) -> Tensor:
        """Features (len(paths), D) of image files; `label` begins the name of the file that keeps them."""
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
        """Encode images, some at a time, which are kept until all are there."""
        features = []
        for start in range(0, len(paths), PIECE):
            end = min(start + PIECE, len(paths))
            what = f"{label} images up to {end} of {len(paths)}"
            encode = functools.partial(self.encoder.images, paths[start:end], what)
            features.append(self._get(f"{label}-piece", identities[start:end], encode))
        return torch.cat(features)

    def _drop_pieces(self, identities: Sequence[object], label: str) -> None:
        """Delete what `_in_pieces` kept, if the whole is on the disk."""
        whole, _ = self._place(f"{label}-images", identities)
        if whole.exists():
            for start in range(0, len(identities), PIECE):
                piece, _ = self._place(f"{label}-piece", identities[start : start + PIECE])
                piece.unlink(missing_ok=True)

    def captions(self, captions: list[str], label: str) -> Tensor:
        """Features (len(captions), D) of captions; `label` begins the name of the file that keeps them."""
        return self._get(f"{label}-captions", captions, lambda: self._encode_captions(captions))

    def _encode_captions(self, captions: list[str]) -> Tensor:
        self.encoder.warn_of_cuts(captions)
        return self.encoder.captions(captions)

    def _get(self, label: str, inputs: object, compute: Callable[[], Tensor]) -> Tensor:
        if self.folder is None:
            return compute()
        path, key = self._place(label, inputs)
        # The main rank reads and writes; the others get what it has, so that all agree whether to encode.
        kept = self._read(path, key) if distributed.is_main() else None
        features = distributed.from_main(kept, self.encoder.device)
        if features is None:
            features = compute()
            if distributed.is_main():
                self._write(path, key, features)
        return features

    def _place(self, label: str, inputs: object) -> tuple[Path, str]:
        """The file that keeps features of some inputs, and its key."""
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
            pass  # not one of our files: the same warning as for one of ours that is damaged
        logger.warning("%s is damaged or belongs to another run: encoding again", path)
        return None

    def _write(self, path: Path, key: str, features: Tensor) -> None:
        features = features.cpu()
        digest = weights_digest({"features": features})
        try:
            save_tensors(path, {"key": key, "digest": digest, "features": features})
        except UserError as error:  # the features are in memory: nothing is lost
            logger.warning("%s; continuing without a cache", error)


@dataclass(frozen=True, kw_only=True)
class FrozenSplit:
    """A split as tensors on the device: all that an epoch or an evaluation on frozen features needs.

    Attributes:
        images: (N, D) in gallery order.
        captions: (Q, V, D), V texts a triplet.
        texts: what protocols call the V texts of an evaluation.
        tables: what follows from the split alone, made when it is first asked for; validations share it.
    """

    split: Split
    images: Tensor
    captions: Tensor
    texts: tuple[str, ...] = ("",)
    tables: dict[str, Tensor] = field(default_factory=dict)

    @property
    def reference_rows(self) -> Tensor:
        """Gallery row of each query's reference, (Q,)."""
        return self._table("reference_rows")

    @property
    def target_rows(self) -> Tensor:
        """Gallery row of each query's named target, (Q,). Raises ValueError where they are secret."""
        return self._table("target_rows")

    @property
    def other_target_rows(self) -> Tensor:
        """Gallery rows of each query's other targets, (Q, T - 1), see `Split.other_target_rows`."""
        return self._table("other_target_rows")

    @property
    def group_rows(self) -> Tensor:
        """Gallery rows of each query's group, (Q, G - 1), see `Split.group_rows`."""
        return self._table("group_rows")

    @property
    def outside(self) -> Tensor:
        """Return which gallery images are neither reference nor target of any triplet, (N,) bool."""
        return self._table("outside")

    def outside_of(self, gallery: str) -> Tensor | None:
        """Return which images are not in a protocol's gallery, (N,) bool; None if all are."""
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
        """Features (Q, D) of each query's reference."""
        return self.images[self.reference_rows]

    def captions_of(self, text: str) -> Tensor:
        """Features (Q, D) of what a protocol with this text asks each query with."""
        return self.captions[:, self.texts.index(text)]


def freeze(
    cache: FeatureCache,
    split: Split,
    texts: list[list[str]],
    *,
    label: str,
    names: tuple[str, ...] = ("",),
) -> FrozenSplit:
    """Encode a split's images and the texts of its triplets, or take them from the cache.

    Args:
        texts: V texts for each triplet.
        label: beginning of the names of the cache's files.
        names: what protocols call the V texts.
    """
    images = cache.images(split.paths, label)
    captions = cache.captions(list(itertools.chain.from_iterable(texts)), label)
    return FrozenSplit(
        split=split, images=images, captions=captions.unflatten(0, (len(texts), -1)), texts=names
    )


def freeze_queries(
    cache: FeatureCache, splits: list[Split], benchmark: Benchmark, label: str
) -> list[FrozenSplit]:
    """Each split's gallery, and what the benchmark's protocols ask with, as features."""
    frozen = []
    for split in splits:
        texts = [benchmark.evaluation_texts(triplet.captions) for triplet in split.triplets]
        own_label = f"{label}-{split.name}"
        frozen.append(freeze(cache, split, texts, label=own_label, names=benchmark.texts))
    return frozen
