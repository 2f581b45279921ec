"""Search an image index with a reference image and a sentence."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from image_search.image_index import encoder_key, open_index
from image_search.manifest import as_made
from image_search.photos import opened
from image_search.stores import ImageIndex
from models.pair import Pair, load_pair
from runtime.choices import PairChoice
from runtime.files import file_identities, file_size
from utils import UserError

MOST_CHARACTERS = 2000  # of a text; many times what CLIP reads


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a query retrieved.

    Attributes:
        answers: (image file, cosine similarity), the nearest first.
        rows: of the answers in the index.
        gate: how much of the residual is text; None for the sum.
        experts: weight of each expert; empty without a mixture.
        note: what the user should know, "" for nothing.
    """

    answers: list[tuple[Path, float]]
    rows: list[int]
    gate: float | None
    experts: list[float]
    note: str


class Searcher:
    """An index, wherever it lives, and the pair that composes queries for it: all that scripts and the page ask.

    Raises:
        UserError: the index was made with other weights or preprocessing than the pair has.
    """

    def __init__(self, index: ImageIndex, pair: Pair) -> None:
        query_key = _but_precision(encoder_key(pair.encoder))
        index_key = _but_precision(index.about.get("encoder"))
        if index_key != query_key:
            names = {**query_key, **index_key}
            differing = [name for name in names if index_key.get(name) != query_key.get(name)]
            raise UserError(
                f"--index {index.folder} was made with other {' and '.join(differing)} than the query has: name the "
                "weights that it was made with, or make another index"
            )
        self.index = index
        self.pair = pair

    def __len__(self) -> int:
        return len(self.index)

    def image(self, row: int) -> Path | None:
        """The image file of a row of the index, None where there is no such row."""
        file = self.index.file(row)
        return None if file is None else Path(file[0])

    def some(self, count: int) -> list[int]:
        """So many rows at random, or all there are."""
        return self.index.some(count)

    def reference_features(self, image: Path) -> Tensor:
        """Unnormalised features (1, D) of an image file.

        They come from the index if it holds the file as it is now, or if the file is gone.
        """
        row = self.index.row(str(image.resolve()))
        if file_size(image) is not None:
            if row is None or self.index.file(row) != file_identities([image])[0]:
                return self.pair.encoder.images([image])
        elif row is None:
            raise UserError(f"there is no image {image}: name another")
        features = self.index.features_of(row)
        return torch.from_numpy(features).to(self.pair.encoder.device)

    @torch.no_grad()
    def search(self, reference: Tensor, text: str, k: int, condition: str = "") -> Found:
        """The images nearest to a reference that is changed as a text says.

        Args:
            reference: unnormalised features (1, D).
            condition: what images have to be, see `ImageIndex.search`.
        """
        text = text.strip()
        if not text:
            raise UserError("the text is empty: say what to change")
        if len(text) > MOST_CHARACTERS:
            raise UserError(
                f"the text has {len(text):,} characters: say it in {MOST_CHARACTERS:,} at most"
            )
        note = ""
        tokenizer = self.pair.encoder.backbone.tokenizer
        if tokenizer.cuts(text):
            note = f"the text has more than {tokenizer.context} tokens: what is beyond them was left out"
        captions = self.pair.encoder.captions([text])
        query = self.pair.compose(reference, captions).cpu().numpy()  # (1, D)
        hits = self.index.search(query[0], k, condition)
        insight = self.pair.compose.insight(reference, captions)
        return Found(
            answers=[(hit.path, hit.similarity) for hit in hits],
            rows=[hit.row for hit in hits],
            gate=None if insight is None else float(insight.gate),
            experts=[] if insight is None else insight.experts[0].tolist(),
            note=note,
        )


def _but_precision(key: Any) -> dict[str, Any]:
    """What features depend on but for the precision, which a query need not share with an index."""
    known = key if isinstance(key, dict) else {}
    return {name: value for name, value in known.items() if name != "encode_precision"}


def load_searcher(folder: Path, choice: PairChoice, device: torch.device) -> Searcher:
    """An index and a pair for it. Where the flags name no CLIP, the pair has the one that the index was made with.

    Raises:
        UserError: the index is damaged or of other weights, or whatever is wrong with the checkpoints.
    """
    index = open_index(folder)
    wanted = as_made(index.about, choice)
    # One query is encoded exactly, whatever a million images were, unless a flag says otherwise.
    clip = dataclasses.replace(wanted.clip, encode_precision=choice.clip.encode_precision)
    return Searcher(index, load_pair(dataclasses.replace(wanted, clip=clip), device, opened=opened))
