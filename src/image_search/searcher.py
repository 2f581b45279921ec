"""Search an image index with reference images and a sentence."""

import dataclasses
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from image_search.faiss_index import normalised
from image_search.image_index import encoder_key, open_index
from image_search.manifest import as_made
from image_search.stores.base import FAISS, TIME, Hit, ImageIndex, QueryError, store_of
from models.pair import Pair, load_pair
from runtime.choices import WHITE
from runtime.files import file_identities, file_size
from runtime.image_files import FORMATS
from settings.groups import PairChoice
from utils import UserError

MOST_CHARACTERS = 2000  # maximum length of a text; many times what CLIP reads
# The time of CLIP's tokenizer grows with the square of a word's length; a word is a run of letters or of symbols.
LONGEST_WORD = 100
LONG_WORD = re.compile(rf"[^\W\d_]{{{LONGEST_WORD + 1}}}|[^\w\s]{{{LONGEST_WORD + 1}}}")
WORD = re.compile(r"[^\W\d_]+|[^\w\s]")  # a run of letters, or a single symbol such as an emoji
TARGET_DEPTH = 1000  # number of results that are searched for the target's rank
DEEPEST = 10_000  # maximum number of results that are searched for distinct images
LESS = 0.3  # weight of the image that the results should resemble less
SAME = 1e-5  # maximum difference of an element, or a similarity, of normalised features of identical pixels


@dataclass(frozen=True, kw_only=True, eq=False)
class SearchQuery:
    """Query of an index: reference images, and what to change in them.

    Attributes:
        references: images, each a file, the bytes (3, R, R) that the encoder's loader made from a file, or
            unnormalised features (1, D). The query uses the mean of several references; none are needed for text alone.
        text: the caption; "" for the references alone.
        k: number of results.
        less: image, given like a reference, that the results should resemble less: LESS times its normalised feature
            is subtracted from the query, which is then normalised again.
        mix: weight of the text in the sum, 0 to 1; None composes the query with the pair's combining function.
        lean: shift of the Combiner's gate, see `combiner.leaned`; None for the trained gate.
        without: rows to exclude from the results.
        target: row of the target, whose rank is reported.
        condition: filter on the images, in the language of the index's store.
        distinct: whether to exclude copies of other results.
        min_similarity: smallest cosine similarity of a result.
    """

    references: Sequence[Path | Tensor]
    text: str
    k: int
    less: Path | Tensor | None = None
    mix: float | None = None
    lean: float | None = None
    without: frozenset[int] = frozenset()
    target: int | None = None
    condition: str = ""
    distinct: bool = False
    min_similarity: float | None = None

    @property
    def depth(self) -> int:
        """Return the number of nearest images to retrieve for this query."""
        wanted = self.k if self.target is None else max(self.k, TARGET_DEPTH)
        return wanted + len(self.without)


class RetrievedImage(NamedTuple):
    """An image that a query retrieved.

    Attributes:
        row: row of the image in the index.
        similarity: cosine similarity to the query.
        is_gone: whether the file no longer exists.
        copy_of: row of an earlier result with the same features; None if there is none.
    """

    row: int
    path: Path
    similarity: float
    is_gone: bool
    copy_of: int | None


@dataclass(frozen=True, kw_only=True)
class Found:
    """Results of a query.

    Attributes:
        results: the retrieved images, most similar first.
        rank: rank of the target, starting at 1; None without a target, or if its rank is above TARGET_DEPTH.
        gate: share of the text in the Combiner's residual; None for a sum.
        experts: weight of each expert; empty without a mixture.
        note: message for the user; may be empty.
    """

    results: list[RetrievedImage]
    rank: int | None
    gate: float | None
    experts: list[float]
    note: str


class Searcher:
    """Search interface for scripts and the page: an index in any store, and the pair that composes its queries.

    Raises:
        UserError: the index was made with other weights or preprocessing than the pair has.
    """

    def __init__(self, index: ImageIndex, pair: Pair) -> None:
        query_key = _but_precision(encoder_key(pair.encoder))
        index_key = _but_precision(index.about["encoder"])
        if index_key != query_key:
            names = {**query_key, **index_key}
            differing = [name for name in names if index_key.get(name) != query_key.get(name)]
            raise UserError(
                f"--index {index.folder} and the query differ in {' and '.join(differing)}: pass the weights that "
                "the index was made with, or build a new index"
            )
        self.index = index
        self.pair = pair
        pair.encoder.fold()

    def __len__(self) -> int:
        return len(self.index)

    def image(self, row: int) -> Path | None:
        """Return the image file of a row of the index; None if the row does not exist."""
        file = self.index.file(row)
        return None if file is None else Path(file[0])

    def reference_features(self, image: Path) -> Tensor:
        """Return the unnormalised features (1, D) of an image file.

        They come from the index if it contains the unchanged file, or if the file no longer exists.
        """
        row = self.index.row(str(image.resolve()))
        if row is None and file_size(image) is None:
            raise UserError(f"there is no image {image}: choose another image")
        features = None if row is None else self.kept_features(row, image)
        return self.pair.encoder.images([image]) if features is None else features

    def kept_features(self, row: int, image: Path) -> Tensor | None:
        """Return the indexed features of a row; None if its image file has changed or is no longer readable.

        The features of a file that no longer exists are still valid.
        """
        told_by = self.index.about.get("told_by", TIME)
        if file_size(image) is not None:
            try:
                is_same = self.index.file(row) == file_identities([image], told_by)[0]
            except OSError:
                is_same = False
            if not is_same:
                return None
        features = self.index.features_of(row)
        return torch.from_numpy(features).to(self.pair.encoder.device)

    @property
    def knows_conditions(self) -> bool:
        """Return whether the index is in a store that supports conditions."""
        return store_of(self.index.about.get("store", FAISS)).filters

    @torch.no_grad()
    def search(self, queries: Sequence[SearchQuery]) -> list[Found]:
        """Return the results of each query; all texts and all images are encoded together.

        Raises:
            QueryError: a query is invalid, see `check`.
        """
        for query in queries:
            self.check(query)
        encoder = self.pair.encoder
        texts = [query.text.strip() for query in queries]
        captions = encoder.captions(texts)  # (Q, D)
        references = self._references(queries)
        compose, inputs = self.pair.compose, [references, captions]
        leans = [query.lean for query in queries]
        if any(lean is not None for lean in leans):
            inputs.append(captions.new_tensor([0.5 if lean is None else lean for lean in leans]))
        composed, insight = compose.explained(*inputs)
        features = composed.clone()
        for number, query in enumerate(queries):
            if query.mix is not None:
                image_part = (1 - query.mix) * references[number]
                mixed = image_part + query.mix * captions[number]
                features[number] = F.normalize(mixed, dim=-1)
            if query.less is not None:
                (away,) = F.normalize(self._features([query.less]), dim=-1)
                features[number] = F.normalize(features[number] - LESS * away, dim=-1)
        nearest = self._nearest(features.cpu(), queries)
        found = []
        for number, query in enumerate(queries):
            hits = nearest[number]
            notes = [self._note(texts[number])]
            if query.distinct:
                hits = self._distinct(features[[number]].cpu(), query, hits)
            rows = [hit.row for hit in hits]
            near = hits[: query.k]
            if near and query.min_similarity is not None:
                near = [hit for hit in near if hit.similarity >= query.min_similarity]
                if not near:
                    notes.append(f"the nearest image has a similarity of {hits[0].similarity:.4f}")
            seen = None if query.mix is not None or insight is None else insight
            found.append(
                Found(
                    results=self._results(near),
                    rank=rows.index(query.target) + 1 if query.target in rows else None,
                    gate=None if seen is None else float(seen.gate[number]),
                    experts=[] if seen is None else seen.experts[number].tolist(),
                    note="; ".join(filter(None, notes)),
                )
            )
        return found

    def _results(self, hits: Sequence[Hit]) -> list[RetrievedImage]:
        copies = self._copies(hits)
        results = []
        for row, path, similarity in hits:
            is_gone = file_size(path) is None
            results.append(RetrievedImage(row, path, similarity, is_gone, copy_of=copies.get(row)))
        return results

    def _copies(self, hits: Sequence[Hit]) -> dict[int, int]:
        """Map the row of each hit that is a copy to the row of the first hit with the same features.

        Files with identical bytes have identical features; files with identical pixels have nearly identical features.
        """
        features = functools.cache(lambda row: normalised(self.index.features_of(row)))
        copies: dict[int, int] = {}
        firsts: list[Hit] = []
        for hit in hits:
            for other in reversed(firsts):
                if abs(other.similarity - hit.similarity) > SAME:
                    break
                if np.abs(features(other.row) - features(hit.row)).max() <= SAME:
                    copies[hit.row] = other.row
                    break
            if hit.row not in copies:
                firsts.append(hit)
        return copies

    def _distinct(self, feature: Tensor, query: SearchQuery, hits: list[Hit]) -> list[Hit]:
        """Return hits of a query feature (1, D) without copies; search deeper until there are k hits, if possible."""
        depth = query.depth
        while True:
            copies = self._copies(hits)
            distinct = [hit for hit in hits if hit.row not in copies]
            is_all = len(hits) < depth - len(query.without) or depth >= DEEPEST
            if len(distinct) >= query.k or is_all:
                return distinct
            depth = min(2 * depth, DEEPEST)
            (hits,) = self._nearest(feature, [dataclasses.replace(query, k=depth)])

    def check(self, query: SearchQuery) -> None:
        """Raise QueryError if a query lacks a text or a reference that it needs, or if its text is too long."""
        text = query.text.strip()
        composes = self.pair.compose.combining_function
        is_text = composes == "text" if query.mix is None else query.mix == 1
        is_image = composes == "image" if query.mix is None else query.mix == 0
        if not query.references and not is_text:
            raise QueryError("there is no reference yet: choose an image or upload one")
        if not text and not is_image:
            raise QueryError("the text is empty: type what to change")
        if query.lean is not None and (composes != "combiner" or query.mix is not None):
            raise QueryError(
                "lean needs a Combiner, but this query is composed without one: use mix"
            )
        if len(text) > MOST_CHARACTERS:
            raise QueryError(
                f"the text has {len(text):,} characters: shorten it to at most {MOST_CHARACTERS:,}"
            )
        if LONG_WORD.search(text):
            raise QueryError(
                f"a word of the text has more than {LONGEST_WORD} letters: insert spaces"
            )

    def _references(self, queries: Sequence[SearchQuery]) -> Tensor:
        """Return the reference features (Q, D) of the queries; zeros for a query without references.

        Several references are averaged without normalisation, as the sum and the Combiner use unnormalised features:
        the sum with several references is the mean of the sums with each. The less similar the references are, the
        smaller the norm of their mean is, and the larger the influence of the text in the sum.
        """
        images = [image for query in queries for image in query.references]
        counts = [len(query.references) for query in queries]
        features = self._features(images).split(counts)
        return torch.stack([each.sum(0) / max(1, len(each)) for each in features])

    def _features(self, images: Sequence[Path | Tensor]) -> Tensor:
        """Return the features (N, D) of images, each in a form described in `SearchQuery.references`."""
        encoder = self.pair.encoder
        features = torch.zeros(len(images), encoder.backbone.dim, device=encoder.device)
        read = {}
        for number, image in enumerate(images):
            if isinstance(image, Path):
                image = self.reference_features(image)
            if image.dtype == torch.uint8:
                read[number] = image
            else:
                features[number] = image[0]
        if read:
            features[list(read)] = encoder.read_images(torch.stack(list(read.values())))
        return features

    def _nearest(self, features: Tensor, queries: Sequence[SearchQuery]) -> list[list[Hit]]:
        """Return the images nearest to normalised query features (Q, D), without the excluded rows.

        Queries with the same condition share one search. Those with a target are searched separately, because they
        retrieve more images and the other queries need not wait for them.
        """
        hits: dict[int, list[Hit]] = {}
        groups: dict[tuple[str, bool], list[int]] = {}
        for number, query in enumerate(queries):
            groups.setdefault((query.condition, query.target is not None), []).append(number)
        for (condition, _), alike in groups.items():
            most = max(queries[number].depth for number in alike)
            nearest = self.index.search(features[alike].numpy(), most, condition)
            for number, found in zip(alike, nearest, strict=True):
                without = queries[number].without
                hits[number] = [hit for hit in found if hit.row not in without]
        return [hits[number] for number in range(len(queries))]

    def _note(self, text: str) -> str:
        """Return a note to the user on how the text was read; "" if there is nothing to note."""
        tokenizer = self.pair.encoder.backbone.tokenizer
        notes = []
        if tokenizer.cuts(text):
            notes.append(f"the text has more than {tokenizer.context} tokens: the rest was ignored")
        if self._is_spelled(text):
            notes.append(
                "the model splits most words of the text into single letters, as for a language that it was not "
                "trained on: the results may be unrelated to the text"
            )
        return "; ".join(notes)

    def _is_spelled(self, text: str) -> bool:
        """Check whether the tokenizer splits at least half of the words into letters; ASCII words count as known."""
        words = WORD.findall(text)
        others = [word for word in words if not word.isascii()]
        if not others:
            return False
        tokenizer = self.pair.encoder.backbone.tokenizer
        tokens = (tokenizer.encode([*others, ""], tokenizer.context) != tokenizer.pad).sum(1)
        around = int(tokens[-1])  # number of start and end tokens
        spelled = 0
        for word, length in zip(others, tokens.tolist(), strict=False):
            spelled += length - around > max(1, len(word) / 2)
        return 2 * spelled >= len(words)


def _but_precision(key: dict[str, Any]) -> dict[str, Any]:
    """Return an encoder key without the precision, which may differ between index and query."""
    return {name: value for name, value in key.items() if name != "encode_precision"}


def load_searcher(
    folder: Path, choice: PairChoice, device: torch.device, store: str | None = None
) -> Searcher:
    """Load an index and a pair to search it; unless the flags choose a CLIP, it is the CLIP of the index.

    Args:
        store: the store of the index as given by a flag; None without the flag.

    Raises:
        UserError: the index is damaged, was made with other weights, or a checkpoint cannot be loaded.
    """
    index = open_index(folder, store)
    wanted = as_made(folder, index.about, choice)
    # A query is encoded in full precision unless a flag chooses another, even if the index was encoded in less.
    clip = wanted.clip.model_copy(update={"encode_precision": choice.clip.encode_precision})
    pair = load_pair(dataclasses.replace(wanted, clip=clip), device, WHITE, FORMATS)
    return Searcher(index, pair)
