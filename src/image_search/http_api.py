"""Answers over HTTP: questions as forms, answers as JSON, thumbnails, and the page that asks for them.

A request names images of the index by row alone, or brings one along, so none makes the server read another file.
Uploads stay in memory: of those that are to be asked with again, what CLIP sees, until others need the room. Workers
decode images, threads wait for the index, so that the loop is free for the next request.
"""

import asyncio
import functools
import hashlib
import logging
import random
import secrets
import threading
import uuid
from base64 import b64encode
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

import numpy as np
import torch
from cachetools import LRUCache
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartParser
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import ClientDisconnect

from image_search.api_guide import guide
from image_search.batching import Batcher
from image_search.beside_weights import experts_of, measured
from image_search.examples import Example
from image_search.photos import TAKEN
from image_search.searcher import LESS, TARGET_DEPTH, Found, Question, RetrievedImage, Searcher
from image_search.stores.base import QuestionError
from image_search.uploads import MOST_BYTES, File, preview, read_upload
from image_search.workers import SECONDS, Outcome, Overrun, Pool
from models.schemas import Expert
from runtime.files import file_size
from runtime.image_files import thumbnail
from utils import UserError

logger = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page"
PAGE_FILES = {
    "/": "text/html",
    "/page.css": "text/css",
    "/page.js": "text/javascript",
    "/figure.js": "text/javascript",
    "/server.js": "text/javascript",
    "/words.js": "text/javascript",
    "/cite.bib": "text/plain",
}
MOST_ANSWERS = 100
MOST_REFERENCES = 4  # of a query: rows, uploads and files together
FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
MOST_FIELDS = 32
LONGEST_FIELD = 2**16  # bytes
MultiPartParser.spool_max_size = MOST_BYTES  # uploads are not written to disk
MOST_SHOWN = 100  # images to choose from
AGE = 600  # seconds for which a browser keeps an image of the index
LARGEST_ROW = 2**63 - 1
# Processes that decode. An upload has few pixels; an image of the index has at most as many as Pillow decodes.
UPLOADS = {"workers": 4, "memory": 2**30}
PHOTOS = {"workers": 4, "memory": 2**31}
MOST_KEPT = 64 * 2**20  # bytes of thumbnails, and as many of what CLIP sees of uploads
SMALLEST_PACKED = 1000  # bytes of an answer that is compressed
SIDES = {"small": 320, "large": 1280}  # pixels of the longer side of a thumbnail
TITLE = "Composed image retrieval"
SUMMARY = "Search an index of images by reference images and what to change in them."


class Asked(BaseModel):
    """A question, as the fields of a form. A list is a field that may be repeated."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    row: list[Annotated[int, Field(ge=0, le=LARGEST_ROW)]] = Field(
        [],
        description="A reference, as a row of the index. May be repeated: a query is composed of the mean of up to "
        f"{MOST_REFERENCES} references.",
    )
    upload: list[Annotated[str, Field(max_length=100)]] = Field(
        [], description="A reference, as POST /upload calls it. May be repeated."
    )
    text: str = Field("", description="What to change.")
    k: int | None = Field(None, ge=1, le=MOST_ANSWERS, description="Answers; else as many as --k.")
    mix: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Ask with the sum, and this share of text in it: 0 is the image alone, 1 the text alone. "
        "Left out, the question is composed as the server's flags say.",
    )
    lean: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Lean the Combiner's gate: 0 towards the image, 1 towards the text. Its odds are multiplied by "
        "lean / (1 - lean), so 0.5, as left out, is the gate as it was trained.",
    )
    less_row: int | None = Field(
        None,
        ge=0,
        le=LARGEST_ROW,
        description=f"An image that answers are to look less like, as a row: {LESS:g} times its feature, normalised, "
        "is taken off the query's, which is normalised again.",
    )
    less_upload: str = Field("", max_length=100, description="The same, as POST /upload calls it.")
    without_reference: bool = Field(
        False, description="Leave the references that are rows out of the results."
    )
    target: int | None = Field(
        None, ge=0, le=LARGEST_ROW, description="An image whose place is asked for, as a row."
    )
    filter: str = Field(
        "",
        max_length=1000,
        description="What images have to be, in the language of the index's store.",
    )
    distinct: bool = Field(False, description="Leave copies of other answers out.")
    min_similarity: float | None = Field(
        None, ge=-1, le=1, description="The similarity that an answer has at least."
    )

    @field_validator("upload")
    @classmethod
    def _but_blanks(cls, names: list[str]) -> list[str]:
        """Take an empty field, as browsers send it, for none."""
        return [name for name in names if name]


REPEATED = {
    name for name, field in Asked.model_fields.items() if get_origin(field.annotation) is list
}


class Photo(BaseModel):
    """An image of the index: its row, its file's name, and its path from the indexed folder on."""

    row: str = Field(
        description="A whole number as text: Milvus's have 63 bits, and numbers of JavaScript hold 53."
    )
    name: str
    path: str


class Kept(BaseModel):
    """An upload that questions may name, for as long as there is room for it."""

    upload: str
    picture: str = Field(description="A small JPEG of it, as a data: address.")


class KnownExample(BaseModel):
    """A question whose answer is known."""

    reference: Photo
    text: str
    target: Photo


class Answer(Photo):
    """An image with its cosine similarity to the question."""

    similarity: float
    is_gone: bool = Field(description="Whether its file is not there any more.")
    copy_of: str | None = Field(
        description="The row of an answer above that is the same image; null where there is none."
    )


class Answers(BaseModel):
    """The nearest images first, and what the Combiner did: see docs/internals/moe.md."""

    answers: list[Answer]
    place: int | None = Field(
        description=f"Of the target, from 1; null where it is not among {TARGET_DEPTH:,}, or none was named."
    )
    gate: float | None = Field(description="How much of the residual is text; null for a sum.")
    experts: list[float] = Field(description="The weights of the experts; empty without any.")
    note: str = Field(description="What to know of how the question was read.")
    server: str = Field(description="Changes when the server starts anew, and rows may then, too.")


class Health(BaseModel):
    """That the server answers, and what it is."""

    status: Literal["ok"] = "ok"
    images: int
    composes: str = Field(description="sum, combiner, image or text.")
    model: str = Field(description="The CLIP that encodes.")
    measured: str = Field(
        description="Benchmark and recall, of the weights' validation or their model card; empty where neither is."
    )
    experts: list[Expert] = Field(
        description="In the order of their weights; empty where nothing tells what they take."
    )
    k: int
    most: int = Field(description="Answers that may be asked for.")
    references: int = Field(description="References that a query may have.")
    places: int = Field(description="Among how many a target's place is looked for.")
    kinds: list[str] = Field(description="Endings of files that may be uploaded.")
    filters: bool = Field(description="Whether the index's store takes a filter.")
    examples: int = Field(description="Questions whose answers are known.")
    server: str


class Error(BaseModel):
    """Error message in one sentence."""

    error: str


ERROR_ANSWERS: dict[int | str, dict[str, Any]] = {
    400: {"model": Error, "description": "The question cannot be asked."},
}


class Service:
    """Service of the addresses. Users share one searcher, one thread that asks it, the workers and the thumbnails.

    Uploads have workers of their own, so that what they cost holds nobody up who looks at the index.

    Args:
        k: answers where a question does not say.
        batcher: answers the questions; see `Batcher`.
        examples: questions whose answers are known.
        seconds: that a worker has for an image.
    """

    def __init__(
        self,
        searcher: Searcher,
        k: int,
        batcher: "Batcher[Question, Found]",
        *,
        examples: Sequence[Example] = (),
        seconds: float = SECONDS,
    ) -> None:
        self.searcher = searcher
        self.k = min(k, MOST_ANSWERS)
        self.batcher = batcher
        self.examples = examples
        self.measured = measured(searcher.pair)
        self.experts = experts_of(searcher.pair)
        # JPEGs of image files by side, those that were asked for last.
        self.thumbnails: LRUCache[tuple[Path, str], bytes] = LRUCache(MOST_KEPT, getsizeof=len)
        # What CLIP sees of uploads, by names that nobody else can guess.
        self.seen: LRUCache[str, np.ndarray] = LRUCache(
            MOST_KEPT, getsizeof=lambda seen: seen.nbytes
        )
        self.server = uuid.uuid4().hex[:12]
        self.uploads = Pool(seconds=seconds, **UPLOADS)
        self.photos = Pool(seconds=seconds, **PHOTOS)
        # A browser has few connections: the first question would wait until the first pictures are there.
        threading.Thread(target=self.photos.prepare, daemon=True).start()

    def close(self) -> None:
        """End the processes that decode."""
        self.uploads.close()
        self.photos.close()

    async def search(self, request: Request) -> Response:
        """The images nearest to reference images that are changed as a text says."""
        asked, files = await read_question(request)
        references = [self._seen(name) for name in asked.upload]
        references += [await self._reference(row) for row in asked.row]
        for file in files:
            pixels = await self._of_upload(read_upload, file, self._read)
            references.append(torch.from_numpy(pixels))
        question = Question(
            references=references,
            text=asked.text,
            k=asked.k or self.k,
            less=await self._image(asked.less_row, asked.less_upload),
            mix=asked.mix,
            lean=asked.lean,
            without=frozenset(asked.row if asked.without_reference else ()),
            target=asked.target,
            condition=asked.filter.strip(),
            distinct=asked.distinct,
            min_similarity=asked.min_similarity,
        )
        self.searcher.check(question)
        found = await asyncio.wrap_future(self.batcher.ask(question))
        answers = Answers(
            answers=[self._answer(answer) for answer in found.answers],
            place=found.place,
            gate=found.gate,
            experts=found.experts,
            note=found.note,
            server=self.server,
        )
        return Response(answers.model_dump_json(), media_type="application/json")

    async def upload(self, request: Request) -> Kept:
        """Take an image, or say why it cannot be asked with, so that questions need not send it each time."""
        _, files = await read_question(request)
        if len(files) != 1:
            raise QuestionError("image: send one file")
        shown = (self._read, SIDES["small"], self._background)
        seen, small = await self._of_upload(preview, files[0], *shown)
        name = secrets.token_urlsafe()
        self.seen[name] = seen
        return Kept(upload=name, picture=f"data:image/jpeg;base64,{b64encode(small).decode()}")

    async def image(
        self, request: Request, row: int, size: Literal["small", "large"] = "small"
    ) -> Response:
        """A JPEG of an image of the index."""
        file = await asyncio.to_thread(self._file, row)
        kept = self.thumbnails.get((file, size))
        if kept is not None:
            return unless_known(request, kept, "image/jpeg", age=AGE)
        try:
            picture = await self.photos.run(thumbnail, file, SIDES[size], self._background)
        except Overrun:
            raise HTTPException(
                HTTPStatus.SERVICE_UNAVAILABLE, "this image takes too long: try another"
            ) from None
        if await asyncio.to_thread(file_size, file) is not None:
            self.thumbnails[file, size] = picture
        return unless_known(request, picture, "image/jpeg", age=AGE)

    async def photo(self, row: int) -> Photo:
        """The name of an image of the index."""
        return await asyncio.to_thread(self._photo, row)

    async def some(self, count: int = Query(40, ge=1, le=MOST_SHOWN)) -> list[Photo]:
        """Images of the index, at random."""
        return await asyncio.to_thread(self._some, count)

    async def some_examples(self, count: int = Query(4, ge=1, le=MOST_SHOWN)) -> list[KnownExample]:
        """Questions whose answers are known, at random; none where --examples names none."""
        return await asyncio.to_thread(self._some_examples, count)

    async def health(self) -> Health:
        """That the server answers, and what it is."""
        return Health(
            images=len(self.searcher),
            composes=self.searcher.pair.compose.combining_function,
            model=shown_model(self.searcher.pair.encoder.preprocessing["clip_model_name"]),
            measured=self.measured,
            experts=self.experts,
            k=self.k,
            most=MOST_ANSWERS,
            references=MOST_REFERENCES,
            places=min(TARGET_DEPTH, len(self.searcher)),
            kinds=sorted(TAKEN),
            filters=self.searcher.knows_conditions,
            examples=len(self.examples),
            server=self.server,
        )

    @property
    def _read(self) -> Callable[[Any], torch.Tensor]:
        """Return the preprocessing of an image to bytes (3, R, R) for CLIP."""
        return self.searcher.pair.encoder.loader.read

    @property
    def _background(self) -> str:
        """Return the background of transparent images, as they are read."""
        return self.searcher.pair.encoder.preprocessing["background"]

    async def _of_upload(
        self, function: Callable[..., Outcome], upload: File, *arguments: Any
    ) -> Outcome:
        """Return the image that a worker decodes from an upload."""
        try:
            return await self.uploads.run(function, upload, *arguments)
        except Overrun:
            raise QuestionError(
                f"the image takes more than {self.uploads.seconds:g} seconds or "
                f"{self.uploads.memory // 2**20} MiB to decode: upload a smaller or simpler copy"
            ) from None

    async def _image(self, row: int | None, upload: str) -> torch.Tensor | None:
        """Return the image of a row or of an upload; None if neither is given."""
        if upload:
            return self._seen(upload)
        return None if row is None else await self._reference(row)

    def _seen(self, upload: str) -> torch.Tensor:
        """Return the preprocessed upload, bytes (3, R, R)."""
        seen = self.seen.get(upload)
        if seen is None:
            raise HTTPException(HTTPStatus.GONE, "the image is not kept any more: upload it again")
        return torch.from_numpy(seen)

    async def _reference(self, row: int) -> torch.Tensor:
        """Features (1, D) of an image of the index; where its file has changed, what a worker reads of that."""
        file, features = await asyncio.to_thread(self._kept, row)
        if features is not None:
            return features
        try:
            pixels = await self.photos.run(read_photo, file, self._read)
        except (UserError, Overrun):
            raise QuestionError(
                "this image has changed and cannot be decoded any more: choose another"
            ) from None
        return torch.from_numpy(pixels)

    def _kept(self, row: int) -> tuple[Path, torch.Tensor | None]:
        file = self._file(row)
        return file, self.searcher.kept_features(row, file)

    def _file(self, row: int) -> Path:
        file = self.searcher.image(row) if row <= LARGEST_ROW else None
        if file is None:
            raise HTTPException(
                HTTPStatus.NOT_FOUND, "there is no such image: choose one that is shown"
            )
        return file

    def _some(self, count: int) -> list[Photo]:
        return [self._photo(row) for row in self.searcher.index.some(count)]

    def _some_examples(self, count: int) -> list[KnownExample]:
        chosen = random.sample(self.examples, min(count, len(self.examples)))
        return [
            KnownExample(
                reference=self._photo(example.reference),
                text=example.text,
                target=self._photo(example.target),
            )
            for example in chosen
        ]

    def _photo(self, row: int) -> Photo:
        file = self._file(row)
        return Photo(row=str(row), name=file.name, path=self._shown_path(file))

    def _answer(self, found: RetrievedImage) -> Answer:
        copy_of = None if found.copy_of is None else str(found.copy_of)
        return Answer(
            row=str(found.row),
            name=found.path.name,
            path=self._shown_path(found.path),
            similarity=round(found.similarity, 6),
            is_gone=found.is_gone,
            copy_of=copy_of,
        )

    def _shown_path(self, file: Path) -> str:
        """A path from the indexed folder on: what is above is the server's own."""
        for folder in self.searcher.index.about.get("folders", []):
            if file.is_relative_to(folder):
                return str(file.relative_to(Path(folder).parent))
        return file.name


def read_photo(file: Path, read: Callable[[Path], torch.Tensor]) -> np.ndarray:
    """An image of the index as the encoder's loader reads it, bytes (3, R, R)."""
    return read(file).numpy()


async def read_question(request: Request) -> tuple[Asked, list[File]]:
    """The fields of a form and its images.

    Raises:
        QuestionError: a field is unknown, twice there or of another type, or there are too many references.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in FORMS:
        raise HTTPException(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send the query as a form")
    try:
        form = await request.form(
            max_files=MOST_REFERENCES, max_fields=MOST_FIELDS, max_part_size=LONGEST_FIELD
        )
    except ValueError:
        raise QuestionError("the form is damaged: send it again, in UTF-8") from None
    fields: dict[str, Any] = {}
    files = []
    for name in form:
        values = form.getlist(name)
        if name == "image":
            for value in values:
                if isinstance(value, str):
                    raise QuestionError("image: send a file, not text; no address is fetched")
                files.append(File(value.filename or "", await value.read()))
        elif not all(isinstance(value, str) for value in values):
            raise QuestionError("image is the only field that may be a file")
        elif name not in REPEATED and len(values) > 1:
            raise QuestionError("a field is there twice: send it once")
        else:
            fields[name] = values if name in REPEATED else values[0]
    try:
        asked = Asked.model_validate(fields)
    except ValidationError as error:
        raise QuestionError(first_fault(error.errors()[0])) from None
    count = len(files) + len(asked.upload) + len(asked.row)
    if count > MOST_REFERENCES:
        raise QuestionError(
            f"image, upload and row name {count} references: send {MOST_REFERENCES} at most"
        )
    if asked.less_row is not None and asked.less_upload:
        raise QuestionError("less_row and less_upload are two images: send one")
    return asked, files


def first_fault(fault: Any) -> str:
    """A fault of a field in words. What was sent is not repeated."""
    # Places in a list are numbers, which say nothing to who has sent one value.
    parts = [part for part in fault["loc"] if isinstance(part, str) and part.isascii()]
    name = ".".join(parts)[:50]
    return f"{name}: {fault['msg'][0].lower()}{fault['msg'][1:]}"


def unless_known(request: Request, content: bytes, kind: str, age: int = 0) -> Response:
    """Content that a browser may keep, and need not get again when it asks whether that is still the same.

    Args:
        age: seconds for which it need not ask.
    """
    tag = f'W/"{hashlib.sha256(content).hexdigest()[:20]}"'
    headers = {"etag": tag, "cache-control": f"private, max-age={age}" if age else "no-cache"}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
    return Response(content, media_type=kind, headers=headers)


def shown_model(name: str) -> str:
    """The name of a CLIP without the place of its file, which is the server's own."""
    model, _, _ = name.partition("=")
    _, _, place = model.rpartition(":")
    return Path(place).name if Path(place).exists() else model


def failed(status: int, message: str, headers: Any = None) -> JSONResponse:
    """An error in one sentence."""
    return JSONResponse({"error": message}, status, headers)


def add_errors(app: FastAPI) -> None:
    """Let every error be one sentence."""

    async def refused(_: Request, error: Any) -> JSONResponse:
        return failed(HTTPStatus.BAD_REQUEST, error.told)

    async def broken(_: Request, error: Any) -> JSONResponse:
        logger.error("error: %s", error)
        return failed(
            HTTPStatus.SERVICE_UNAVAILABLE, "the page cannot answer now: its terminal says why"
        )

    async def malformed(_: Request, error: Any) -> JSONResponse:
        return failed(HTTPStatus.BAD_REQUEST, first_fault(error.errors()[0]))

    async def unknown(_: Request, error: Any) -> JSONResponse:
        return failed(error.status_code, str(error.detail).lower(), error.headers)

    async def left(_: Request, error: Any) -> Response:
        return Response(
            status_code=HTTPStatus.BAD_REQUEST
        )  # the sender is gone before its request is here

    async def fault(_: Request, error: Any) -> JSONResponse:
        return failed(
            HTTPStatus.INTERNAL_SERVER_ERROR, "a fault of the server: its terminal says more"
        )

    app.add_exception_handler(QuestionError, refused)
    app.add_exception_handler(UserError, broken)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(HTTPException, unknown)
    app.add_exception_handler(ClientDisconnect, left)
    app.add_exception_handler(Exception, fault)


def page_file(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    """An address that answers with a file of the page."""
    content = (PAGE / name).read_bytes()

    async def file(request: Request) -> Response:
        return unless_known(request, content, f"{kind}; charset=utf-8")

    return file


def build(service: Service, documented: bool) -> FastAPI:
    """The application.

    Args:
        documented: whether /docs and /openapi.json say what it answers.
    """
    described = "/openapi.json" if documented else None
    app = FastAPI(
        title=TITLE, description=SUMMARY, docs_url=None, redoc_url=None, openapi_url=described
    )
    add_errors(app)
    app.add_middleware(GZipMiddleware, minimum_size=SMALLEST_PACKED)
    for path, kind in PAGE_FILES.items():
        name = path.lstrip("/") or "index.html"
        app.add_api_route(path, page_file(name, kind), include_in_schema=False)
    asked = Asked.model_json_schema()
    file = {"type": "string", "format": "binary"}
    kinds = " ".join(sorted(TAKEN))
    asked["properties"]["image"] = {
        "type": "array",
        "items": file,
        "description": f"A reference, as a file: {kinds}. May be repeated.",
    }
    form = {"requestBody": {"content": {"multipart/form-data": {"schema": asked}}}}
    app.add_api_route(
        "/search",
        service.search,
        methods=["POST"],
        response_model=Answers,
        responses=ERROR_ANSWERS,
        openapi_extra=form,
    )
    image = {"image": {**file, "description": f"An image: {kinds}"}}
    form = {"requestBody": {"content": {"multipart/form-data": {"schema": {"properties": image}}}}}
    app.add_api_route(
        "/upload", service.upload, methods=["POST"], responses=ERROR_ANSWERS, openapi_extra=form
    )
    picture: dict[int | str, dict[str, Any]] = {200: {"content": {"image/jpeg": {}}}}
    app.add_api_route("/image/{row}", service.image, response_class=Response, responses=picture)
    app.add_api_route("/photo/{row}", service.photo)
    app.add_api_route("/some", service.some)
    app.add_api_route("/examples", service.some_examples)
    app.add_api_route("/health", service.health)
    if documented:
        written = functools.cache(lambda: guide(app.openapi()))

        async def explained() -> HTMLResponse:
            return HTMLResponse(written())

        app.add_api_route("/docs", explained, include_in_schema=False, methods=["GET"])
    return app
