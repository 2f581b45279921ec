"""Features kept: a cache on disk with an honest key, and a split as tensors on the device."""

import hashlib
import itertools
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import Split
from models.encoder import Encoder, weights_digest
from runtime import distributed
from runtime.files import file_identities
from runtime.tensors import load_tensors, save_tensors
from utils import UserError

logger = logging.getLogger(__name__)


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
        return self._get(
            f"{label}-images", identities, lambda: self.encoder.images(paths, f"{label} images")
        )

    def captions(self, captions: list[str], label: str) -> Tensor:
        """Features (len(captions), D) of captions; `label` begins the name of the file that keeps them."""
        return self._get(f"{label}-captions", captions, lambda: self._encode_captions(captions))

    def _encode_captions(self, captions: list[str]) -> Tensor:
        self.encoder.backbone.tokenizer.warn_of_cuts(captions)
        return self.encoder.captions(captions)

    def _get(self, label: str, inputs: object, compute: Callable[[], Tensor]) -> Tensor:
        if self.folder is None:
            return compute()
        key = hashlib.sha256(json.dumps([label, self.encoder_key, inputs]).encode()).hexdigest()
        path = self.folder / f"{label}-{key[:16]}.pt"
        # The main rank reads and writes; the others get what it has, so that all agree whether to encode.
        kept = self._read(path, key) if distributed.is_main() else None
        features = distributed.from_main(kept, self.encoder.device)
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
            digest = weights_digest({"features": features})
            if content["key"] == key and content["digest"] == digest:
                logger.info("features read from %s", path)
                return features
        except (UserError, KeyError, AttributeError, TypeError):
            pass  # not one of our files: the same warning as for one of ours that is damaged
        logger.warning("%s is damaged or of another origin: encoding anew", path)
        return None

    def _write(self, path: Path, key: str, features: Tensor) -> None:
        features = features.cpu()
        digest = weights_digest({"features": features})
        try:
            save_tensors(path, {"key": key, "digest": digest, "features": features})
        except UserError as error:  # the features are in memory: nothing is lost
            logger.warning("%s; going on without a cache", error)


@dataclass(frozen=True, kw_only=True)
class FrozenSplit:
    """A split as tensors on the device: all that an epoch or an evaluation on frozen features needs.

    Attributes:
        images: (N, D) in gallery order.
        captions: (Q, V, D), V texts a triplet.
        tables: what follows from the split alone, made when it is first asked for; validations share it.
    """

    split: Split
    images: Tensor
    captions: Tensor
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
        """Whether a gallery image is neither reference nor target of any triplet, (N,) bool."""
        return self._table("outside")

    def _table(self, name: str) -> Tensor:
        """What the split says of its rows under a name, as a tensor on the device."""
        if name not in self.tables:
            rows = getattr(self.split, name)
            self.tables[name] = torch.tensor(rows, device=self.images.device)
        return self.tables[name]

    @property
    def references(self) -> Tensor:
        """Features (Q, D) of each query's reference."""
        return self.images[self.reference_rows]


def freeze(cache: FeatureCache, split: Split, texts: list[list[str]], label: str) -> FrozenSplit:
    """Encode a split's images and the texts of its triplets, or take them from the cache.

    Args:
        texts: V texts for each triplet.
        label: beginning of the names of the cache's files.
    """
    images = cache.images(split.paths, label)
    captions = cache.captions(list(itertools.chain.from_iterable(texts)), label)
    return FrozenSplit(split=split, images=images, captions=captions.unflatten(0, (len(texts), -1)))


def freeze_queries(
    cache: FeatureCache, splits: list[Split], caption: Callable[[tuple[str, ...]], str], label: str
) -> list[FrozenSplit]:
    """Each split's gallery and its evaluation captions as features, V = 1.

    Args:
        caption: the text of a triplet's captions at evaluation.
    """
    frozen = []
    for split in splits:
        texts = [[caption(triplet.captions)] for triplet in split.triplets]
        frozen.append(freeze(cache, split, texts, f"{label}-{split.name}"))
    return frozen
