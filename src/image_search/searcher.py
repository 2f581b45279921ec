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
from image_search.stores.base import FAISS, TIME, Hit, ImageIndex, QuestionError, store_of
from models.pair import Pair, load_pair
from runtime.choices import WHITE
from runtime.files import file_identities, file_size
from runtime.image_files import FORMATS
from settings.groups import PairChoice
from utils import UserError

MOST_CHARACTERS = 2000  # of a text; many times what CLIP reads
# The time of CLIP's tokenizer grows with the square of a word, which to it are letters or signs in a row.
LONGEST_WORD = 100
LONG_WORD = re.compile(rf"[^\W\d_]{{{LONGEST_WORD + 1}}}|[^\w\s]{{{LONGEST_WORD + 1}}}")
WORD = re.compile(r"[^\W\d_]+|[^\w\s]")  # or a sign, as emoji are
TARGET_DEPTH = 1000  # among which a target's place is looked for
DEEPEST = 10_000  # images among which distinct ones are looked for
LESS = 0.3  # of an image's feature that a question looks less like
SAME = 1e-5  # difference of an element, or a similarity, of normalised features of the same pixels


@dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """Query of an index: reference images, and what to change in them.

    Attributes:
        references: images, each a file; what the encoder's loader read of one, bytes (3, R, R); or its features
            (1, D), unnormalised. Several are searched with as their mean; none for the text alone.
        text: "" for the references alone.
        k: answers.
        less: an image as one of `references`, which answers are to look less like: LESS of its normalised feature is
            taken off the query, which is normalised again; None for none.
        mix: share of the text in the sum that is asked with, 0 to 1; None asks with what the pair composes.
        lean: of the Combiner's gate, see `combiner.leaned`; None is as it was trained.
        without: rows that are no answers.
        target: a row whose place is asked for; None for none.
        condition: what images have to be, in the language of the index's store.
        distinct: leave copies of other answers out.
        min_similarity: that an answer has at least; None for any.
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
        """Return how many of the nearest images it takes to answer it."""
        wanted = self.k if self.target is None else max(self.k, TARGET_DEPTH)
        return wanted + len(self.without)


class RetrievedImage(NamedTuple):
    """An image that a query retrieved.

    Attributes:
        row: in the index.
        similarity: cosine similarity to the query.
        is_gone: whether there is no such file any more.
        copy_of: the row of an answer above with the same features, None where there is none.
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
        answers: the nearest first.
        place: of the target, from 1; None where it is not among TARGET_DEPTH, or none was named.
        gate: how much of the residual is text; None for the sum.
        experts: weight of each expert; empty without a mixture.
        note: what the user should know, "" for nothing.
    """

    answers: list[RetrievedImage]
    place: int | None
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
        index_key = _but_precision(index.about["encoder"])
        if index_key != query_key:
            names = {**query_key, **index_key}
            differing = [name for name in names if index_key.get(name) != query_key.get(name)]
            raise UserError(
                f"--index {index.folder} was made with other {' and '.join(differing)} than the query has: name the "
                "weights that it was made with, or make another index"
            )
        self.index = index
        self.pair = pair
        pair.encoder.fold()

    def __len__(self) -> int:
        return len(self.index)

    def image(self, row: int) -> Path | None:
        """The image file of a row of the index, None where there is no such row."""
        file = self.index.file(row)
        return None if file is None else Path(file[0])

    def reference_features(self, image: Path) -> Tensor:
        """Unnormalised features (1, D) of an image file.

        They come from the index if it holds the file as it is now, or if the file is gone.
        """
        row = self.index.row(str(image.resolve()))
        if row is None and file_size(image) is None:
            raise UserError(f"there is no image {image}: name another")
        features = None if row is None else self.kept_features(row, image)
        return self.pair.encoder.images([image]) if features is None else features

    def kept_features(self, row: int, image: Path) -> Tensor | None:
        """Return the features of a row, None where its image file is there and is not what was encoded any more.

        A file that may not be read any more has changed, too.
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
        """Return whether the index lives in a store that takes a question's condition."""
        return store_of(self.index.about.get("store", FAISS)).filters

    @torch.no_grad()
    def answer(self, questions: Sequence[Question]) -> list[Found]:
        """Answer each question. All texts and all images are encoded together.

        Raises:
            QuestionError: one of the questions cannot be asked, see `check`.
        """
        for question in questions:
            self.check(question)
        encoder = self.pair.encoder
        texts = [question.text.strip() for question in questions]
        captions = encoder.captions(texts)  # (Q, D)
        references = self._references(questions)
        compose, inputs = self.pair.compose, [references, captions]
        leans = [question.lean for question in questions]
        if any(lean is not None for lean in leans):
            inputs.append(captions.new_tensor([0.5 if lean is None else lean for lean in leans]))
        composed, insight = compose.explained(*inputs)
        queries = composed.clone()
        for number, question in enumerate(questions):
            if question.mix is not None:
                image_part = (1 - question.mix) * references[number]
                mixed = image_part + question.mix * captions[number]
                queries[number] = F.normalize(mixed, dim=-1)
            if question.less is not None:
                (away,) = F.normalize(self._features([question.less]), dim=-1)
                queries[number] = F.normalize(queries[number] - LESS * away, dim=-1)
        nearest = self._nearest(queries.cpu(), questions)
        found = []
        for number, question in enumerate(questions):
            hits = nearest[number]
            notes = [self._note(texts[number])]
            if question.distinct:
                hits = self._distinct(queries[[number]].cpu(), question, hits)
            rows = [hit.row for hit in hits]
            near = hits[: question.k]
            if near and question.min_similarity is not None:
                near = [hit for hit in near if hit.similarity >= question.min_similarity]
                if not near:
                    notes.append(f"the nearest image has a similarity of {hits[0].similarity:.4f}")
            seen = None if question.mix is not None or insight is None else insight
            found.append(
                Found(
                    answers=self._answers(near),
                    place=rows.index(question.target) + 1 if question.target in rows else None,
                    gate=None if seen is None else float(seen.gate[number]),
                    experts=[] if seen is None else seen.experts[number].tolist(),
                    note="; ".join(filter(None, notes)),
                )
            )
        return found

    def _answers(self, hits: Sequence[Hit]) -> list[RetrievedImage]:
        copies = self._copies(hits)
        answers = []
        for row, path, similarity in hits:
            is_gone = file_size(path) is None
            answers.append(RetrievedImage(row, path, similarity, is_gone, copy_of=copies.get(row)))
        return answers

    def _copies(self, hits: Sequence[Hit]) -> dict[int, int]:
        """Row of a hit -> row of the first hit with the same features; only rows that have such a one.

        Images of the same bytes have the same features to the last bit, those of the same pixels nearly.
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

    def _distinct(self, query: Tensor, question: Question, hits: list[Hit]) -> list[Hit]:
        """Hits of a query (1, D) without copies of other hits, as many as are asked for where there are so many."""
        depth = question.depth
        while True:
            copies = self._copies(hits)
            distinct = [hit for hit in hits if hit.row not in copies]
            is_all = len(hits) < depth - len(question.without) or depth >= DEEPEST
            if len(distinct) >= question.k or is_all:
                return distinct
            depth = min(2 * depth, DEEPEST)
            (hits,) = self._nearest(query, [dataclasses.replace(question, k=depth)])

    def check(self, question: Question) -> None:
        """Raise QuestionError where a question lacks the text or the image that it needs, or its text is too long."""
        text = question.text.strip()
        composes = self.pair.compose.combining_function
        is_text = composes == "text" if question.mix is None else question.mix == 1
        is_image = composes == "image" if question.mix is None else question.mix == 0
        if not question.references and not is_text:
            raise QuestionError("there is no reference yet: choose an image or upload one")
        if not text and not is_image:
            raise QuestionError("the text is empty: say what to change")
        if question.lean is not None and (composes != "combiner" or question.mix is not None):
            raise QuestionError("lean is of a Combiner's gate, and this asks without one: say mix")
        if len(text) > MOST_CHARACTERS:
            raise QuestionError(
                f"the text has {len(text):,} characters: say it in {MOST_CHARACTERS:,} at most"
            )
        if LONG_WORD.search(text):
            raise QuestionError(
                f"a word of the text has more than {LONGEST_WORD} letters: part it by spaces"
            )

    def _references(self, questions: Sequence[Question]) -> Tensor:
        """Features (Q, D) of the references of each question; zeros where there is none.

        Those of several are their mean, unnormalised as the sum and the Combiner take them, so that the sum with
        several is the mean of the sums with each. The less alike the references are, the shorter is their mean, and
        the more the text counts in the sum.
        """
        images = [image for question in questions for image in question.references]
        counts = [len(question.references) for question in questions]
        features = self._features(images).split(counts)
        return torch.stack([each.sum(0) / max(1, len(each)) for each in features])

    def _features(self, images: Sequence[Path | Tensor]) -> Tensor:
        """Features (N, D) of images that are asked with."""
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

    def _nearest(self, queries: Tensor, questions: Sequence[Question]) -> list[list[Hit]]:
        """The images nearest to normalised queries (Q, D), without rows left out.

        One search for each condition, and one for those that look deep for a target, which others need not wait for.
        """
        hits: dict[int, list[Hit]] = {}
        groups: dict[tuple[str, bool], list[int]] = {}
        for number, question in enumerate(questions):
            groups.setdefault((question.condition, question.target is not None), []).append(number)
        for (condition, _), alike in groups.items():
            most = max(questions[number].depth for number in alike)
            nearest = self.index.search(queries[alike].numpy(), most, condition)
            for number, found in zip(alike, nearest, strict=True):
                without = questions[number].without
                hits[number] = [hit for hit in found if hit.row not in without]
        return [hits[number] for number in range(len(questions))]

    def _note(self, text: str) -> str:
        """Return a note to the user on how a text was read."""
        tokenizer = self.pair.encoder.backbone.tokenizer
        notes = []
        if tokenizer.cuts(text):
            notes.append(
                f"the text has more than {tokenizer.context} tokens: what is beyond them was left out"
            )
        if self._is_spelled(text):
            notes.append(
                "the model knows most words of the text by their letters alone, as in a language that it was not "
                "trained on: the answers may have little to do with them"
            )
        return "; ".join(notes)

    def _is_spelled(self, text: str) -> bool:
        """Check whether the tokenizer splits half of the words of a text into letters. ASCII is known."""
        words = WORD.findall(text)
        others = [word for word in words if not word.isascii()]
        if not others:
            return False
        tokenizer = self.pair.encoder.backbone.tokenizer
        tokens = (tokenizer.encode([*others, ""], tokenizer.context) != tokenizer.pad).sum(1)
        around = int(tokens[-1])  # what stands around each word
        spelled = 0
        for word, length in zip(others, tokens.tolist(), strict=False):
            spelled += length - around > max(1, len(word) / 2)
        return 2 * spelled >= len(words)


def _but_precision(key: dict[str, Any]) -> dict[str, Any]:
    """Return the settings on which features depend, without the precision, which may differ from the index."""
    return {name: value for name, value in key.items() if name != "encode_precision"}


def load_searcher(
    folder: Path, choice: PairChoice, device: torch.device, store: str | None = None
) -> Searcher:
    """An index and a pair for it. Where the flags name no CLIP, the pair has the one that the index was made with.

    Args:
        store: where a flag says that the index lives, None where flags are silent.

    Raises:
        UserError: the index is damaged or of other weights, or whatever is wrong with the checkpoints.
    """
    index = open_index(folder, store)
    wanted = as_made(folder, index.about, choice)
    # One query is encoded exactly, whatever a million images were, unless a flag says otherwise.
    clip = wanted.clip.model_copy(update={"encode_precision": choice.clip.encode_precision})
    pair = load_pair(dataclasses.replace(wanted, clip=clip), device, WHITE, FORMATS)
    return Searcher(index, pair)
