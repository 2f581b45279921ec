"""Encode images and captions as features, by a CLIP with its preprocessing."""

import contextlib
import functools
import hashlib
import importlib.metadata
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import PIL
import torch
from torch import Tensor, nn

from data_utils import ImageLoader, load_image, make_preprocess, read_or_explain
from models.backbone import Backbone, Tokenizer
from models.clip_model import backbone as openai_backbone
from models.clip_model import load_clip, load_finetuned, load_sized
from models.configuration import Checkpoint
from models.lean_clip import fold, folded
from models.names import open_clip_name
from runtime import distributed
from runtime.choices import ORIGINAL, named
from runtime.image_files import decoded, read_photo
from runtime.precision import HALF, check_encode_precision, encoding
from runtime.progress import Counter
from settings.groups import Clip
from utils import LONGEST_FEATURE, SHORTEST_FEATURE, UserError

CAPTIONS_AT_ONCE = 256  # batch size of captions; 32, as for images, would leave a GPU idle
# Settings that do not affect the bytes of a preprocessed image.
NOT_OF_BYTES = ("mean", "std", "context", "architecture")
# Maximum number of captions whose tokens are cached, 1 KB each; no split of a benchmark has more.
CAPTIONS_KEPT = 65_536

Chunked = TypeVar("Chunked")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A CLIP with its preprocessing. Features are unnormalised, float32.

    Attributes:
        backbone: description of the model, without its weights.
        loader: reads preprocessed images. All copies of this encoder share its workers, if it has
            any.
        preprocessing: settings of `model` and `loader`: model name, transform, target ratio,
            decode, background, the values that `backbone` records, and the precision to encode in.
        between: called after each batch of images; an exception that it raises ends the encoding.
    """

    model: Any  # has encode_image and encode_text
    backbone: Backbone
    loader: ImageLoader
    preprocessing: dict[str, Any]
    device: torch.device
    batch_size: int = 32
    between: Callable[[], None] = lambda: None

    @torch.no_grad()
    def images(self, paths: list[Path], what: str = "images") -> Tensor:
        """Encode image files as features (len(paths), D) on the device, in order.

        Several processes share the work, and each gets all features. `what` names the images in the
        progress display.
        """
        chunks = distributed.shard(_chunks(paths, self.batch_size))
        encoded = [self._no_features()]
        with _counter(sum(map(len, chunks)), what) as counter, self._folded():
            for pixels in self.loader.batches(chunks):
                encoded.append(self._image_features(pixels))
                counter.update(len(pixels))
                self.between()
        features = distributed.gather_shards(torch.cat(encoded))
        check_lengths(features, paths)
        return features

    @torch.no_grad()
    def read_images(self, pixels: Tensor) -> Tensor:
        """Encode images from `loader.read`, bytes (b, 3, R, R), as features (b, D) on the device."""
        features = self._image_features(pixels.to(self.device))
        check_lengths(features, ["the reference image"] * len(features))
        return features

    @torch.no_grad()
    def readable_images(self, shards: list[list[Path]]) -> Iterator[tuple[Tensor, list[str]]]:
        """Encode image files, some of which may be damaged, in this process only.

        Yields:
            For each shard, the features (n, D) of its n readable files, on the CPU, in order; and
            for each of its files the reason that it cannot be read, "" if it can.
        """
        read = functools.partial(
            read_or_explain, read=self.loader.read, resolution=self.backbone.resolution
        )
        loader = ImageLoader(read, self.loader.workers, self.device)
        chunks_of_shards = [_chunks(shard, self.batch_size) for shard in shards]
        batches = loader.batches(list(itertools.chain.from_iterable(chunks_of_shards)))
        with _counter(sum(map(len, shards)), "images") as counter, self._folded():
            for chunks in chunks_of_shards:
                encoded = [self._no_features()]
                reasons: list[str] = []
                for pixels, problems in itertools.islice(batches, len(chunks)):
                    readable = [row for row, problem in enumerate(problems) if not problem]
                    if len(readable) < len(pixels):
                        pixels = pixels[readable]
                    if readable:
                        encoded.append(self._image_features(pixels))
                    reasons += problems
                    counter.update(len(problems))
                    self.between()
                yield torch.cat(encoded).cpu(), reasons

    @property
    def precision(self) -> str:
        """Return the precision to encode in, one of ENCODE_PRECISIONS."""
        return self.preprocessing.get("encode_precision", "fp32")

    def _image_features(self, pixels: Tensor) -> Tensor:
        """Encode bytes (b, 3, R, R) as features (b, D)."""
        with encoding(self.precision, self.device):
            return self.model.encode_image(self.backbone.normalise(pixels)).float()

    def _text_features(self, tokens: Tensor) -> Tensor:
        """Encode tokens (b, context) as features (b, D)."""
        with encoding(self.precision, self.device):
            return self.model.encode_text(tokens).float()

    def _folded(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the model's weights are folded once for many batches, see `lean_clip`."""
        if getattr(self.model, "is_folded", False):
            return contextlib.nullcontext()
        return folded(self.model, HALF.get(self.precision))

    def fold(self) -> None:
        """Fold the model's weights permanently, for example in a search server, where no weight changes any more."""
        fold(self.model, HALF.get(self.precision))
        self.model.is_folded = True  # looking through its modules takes a tenth of a short caption

    def _no_features(self) -> Tensor:
        return torch.empty(0, self.backbone.dim, device=self.device)

    def warn_of_cuts(self, captions: list[str]) -> None:
        """Log how many captions are cut, see `Tokenizer`; their tokens are cached until they are encoded."""
        tokenizer = self.backbone.tokenizer
        tokens = [_tokens(tokenizer, caption) for caption in captions]
        if tokens:
            tokenizer.warn_of_cuts(captions, torch.stack(tokens))

    @torch.no_grad()
    def captions(self, captions: list[str]) -> Tensor:
        """Encode captions as features (len(captions), D) on the device, in order. Duplicates are encoded only once."""
        tokenizer = self.backbone.tokenizer
        tokens_of = {caption: _tokens(tokenizer, caption) for caption in captions}
        each = torch.stack(list(tokens_of.values())).unsqueeze(1)
        columns_of = dict(zip(tokens_of, tokenizer.columns(each), strict=True))
        # A batch has only captions of one length, so that no caption is padded to the length of another.
        unique = sorted(columns_of, key=columns_of.__getitem__)
        chunks = []
        for _, of_a_length in itertools.groupby(unique, key=columns_of.__getitem__):
            chunks += _chunks(list(of_a_length), CAPTIONS_AT_ONCE)
        encoded = [self._no_features()]
        with self._folded():
            for chunk in distributed.shard(chunks):
                tokens = torch.stack([tokens_of[caption] for caption in chunk])
                tokens = tokens[:, : columns_of[chunk[0]]]
                encoded.append(self._text_features(tokens.to(self.device)))
        row_of = {caption: row for row, caption in enumerate(unique)}
        rows = torch.tensor([row_of[caption] for caption in captions], device=self.device)
        features = distributed.gather_shards(torch.cat(encoded))
        check_lengths(features, [f"the caption {caption!r}" for caption in unique])
        return features[rows]

    @property
    def reported_preprocessing(self) -> dict[str, Any]:
        """Return the preprocessing of images and captions, as keys and results record it."""
        names = ("transform", "target_ratio", "resolution", "decode", "background")
        chosen = {name: self.preprocessing[name] for name in names}
        return named({**chosen, **self.backbone.preprocessing})

    def image_preprocessing(self) -> dict[str, Any]:
        """Return everything that determines the preprocessed images, besides the files themselves."""
        images = {
            name: value
            for name, value in self.reported_preprocessing.items()
            if name not in NOT_OF_BYTES
        }
        return {**images, "versions": versions()}

    def describe(self) -> dict[str, Any]:
        """Return everything that determines the features, besides the images and captions, in plain types."""
        return {
            "clip_model_name": self.preprocessing["clip_model_name"],
            **self.reported_preprocessing,
            "weights": weights_digest(self.model.state_dict()),
            "precision": f"{self.precision} on {self.device.type}",
            "versions": {**versions(), **_installed(self.backbone.packages)},
        }


def check_lengths(features: Tensor, names: Sequence[object]) -> None:
    """Reject features (n, D) with such small or large norms that rounding makes their cosine similarities meaningless.

    Args:
        names: names of the n encoded images or captions, for the message.

    Raises:
        UserError: a norm is below SHORTEST_FEATURE or above LONGEST_FEATURE; the message names the
            first.
    """
    lengths = features.norm(dim=-1)
    is_lost = (lengths < SHORTEST_FEATURE) | (lengths > LONGEST_FEATURE)
    if is_lost.any():  # waits for the device, once
        row = int(is_lost.nonzero()[0])
        raise UserError(
            f"the features of {names[row]} have norm {lengths[row]:.1g}, which cannot be ranked: choose "
            "other weights, or --encode-precision fp32"
        )


def _counter(total: int, what: str) -> Counter:
    """Return the progress display of an encoding, which only the main process shows."""
    return Counter(total, f"encoding {what}", shown=distributed.is_main())


def versions() -> dict[str, str]:
    """Return the versions of the packages that affect images and features."""
    return {
        "torch": str(torch.__version__),
        **_installed(["torchvision"]),
        "pillow": PIL.__version__,
    }


def _installed(packages: Sequence[str]) -> dict[str, str]:
    """Return package -> version for the packages that are installed, without importing them."""
    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _chunks(items: Sequence[Chunked], size: int) -> list[list[Chunked]]:
    """Split the items into lists of `size`; the last list may be shorter."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


@functools.lru_cache(CAPTIONS_KEPT)
def _tokens(tokenizer: Tokenizer, caption: str) -> Tensor:
    """Return a caption's tokens (context,), cached because they are needed before encoding and in each validation."""
    return tokenizer([caption])[0]


def weights_digest(state: dict[str, Tensor]) -> str:
    """Return the SHA-256 of a state dict's names, shapes, types and values."""
    digest = hashlib.sha256()
    for name, weight in sorted(state.items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_backbone(name: str, device: torch.device) -> tuple[nn.Module, Backbone]:
    """Load the model of `--clip-model-name` in eval mode with float32 weights; return it and its description."""
    other = open_clip_name(name)
    if other is not None:
        from models import open_clip_package

        return open_clip_package.load(other, name, device)
    model = load_clip(name, device)
    return model, openai_backbone(model)


def _warn_of_changes(tuned: Checkpoint, backbone: Backbone) -> None:
    """Log a warning if a model's configuration has changed since fine-tuning; a model folder may have been edited."""
    for name, value in backbone.preprocessing.items():
        trained = tuned.table.get(name)
        if trained not in (None, value):
            logger.warning(
                "warning: %s was trained with %s %s, but --clip-model-name uses %s",
                tuned.path,
                name,
                trained,
                value,
            )


def load_encoder(
    settings: Clip,
    tuned: Checkpoint | None,
    device: torch.device,
    *,
    workers: int,
    batch_size: int = 32,
    formats: tuple[str, ...] | None = None,
) -> Encoder:
    """Load a CLIP in eval mode with its preprocessing.

    Args:
        settings: result of `configuration.resolve_clip_options`, in which no value is None.
        tuned: stage-1 weights that replace the model's own.
        formats: Pillow's formats that images may have; None for all.
    """
    preprocessing = settings.model_dump()
    check_encode_precision(preprocessing["encode_precision"], device)
    if tuned and tuned.sizes:
        model: nn.Module = load_sized(tuned.sizes, tuned.state, tuned.path, device=device)
        backbone = openai_backbone(model)
    elif tuned and tuned.folder:
        from models import open_clip_package

        model, backbone = open_clip_package.load_exported(
            tuned.folder, tuned.state, tuned.path, device=device
        )
    else:
        model, backbone = load_backbone(preprocessing["clip_model_name"], device)
        if tuned:
            load_finetuned(model, tuned.state, tuned.path)
            _warn_of_changes(tuned, backbone)
    preprocessing.update(backbone.preprocessing)
    preprocess = make_preprocess(
        preprocessing["transform"],
        preprocessing["target_ratio"],
        backbone.resolution,
        interpolation=backbone.interpolation,
        resize_mode=backbone.resize_mode,
    )
    opened = functools.partial(decoded, formats=formats)
    if preprocessing["background"] != ORIGINAL:
        background = preprocessing["background"]
        opened = functools.partial(read_photo, background=background, formats=formats)
    if preprocessing["decode"] == "draft":
        opened = functools.partial(opened, side=backbone.resolution)
    read = functools.partial(load_image, preprocess=preprocess, opened=opened)
    return Encoder(
        model=model,
        backbone=backbone,
        loader=ImageLoader(read, workers, device),
        preprocessing=preprocessing,
        device=device,
        batch_size=batch_size,
    )
