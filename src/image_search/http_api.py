"""Answers over HTTP: questions as forms, answers as JSON, thumbnails, and the page that asks for them.

A request names images of the index by row alone, or brings one along, so none makes the server read another file.
Uploads stay in memory, and nothing is kept of them.
"""

import asyncio
import functools
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from image_search.api_guide import guide
from image_search.batching import Together
from image_search.guard import MOST_SECONDS, RETRY_AFTER
from image_search.photos import KINDS, small_image
from image_search.searcher import PLACES, Found, Question, Searcher
from image_search.thumbnails import SIDES, Thumbnails
from image_search.uploads import Upload, checked_upload
from runtime.image_files import jpeg
from utils import UserError

PAGE = Path(__file__).parent / "page"
FILES = {"/": "text/html", "/page.css": "text/css", "/page.js": "text/javascript"}
MOST_ANSWERS = 100
MOST_FIELDS = 16
MOST_SHOWN = 100  # images to choose from
LARGEST_ROW = 2**63 - 1
DECODERS = 4  # threads: each may hold an image of MOST_PIXELS
TITLE = "Composed image retrieval"
SUMMARY = "Search an index of images by an image and what to change of it."

Made = TypeVar("Made")


class Asked(BaseModel):
    """A question, as the fields of a form."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    row: int | None = Field(
        None, ge=0, le=LARGEST_ROW, description="The reference, as a row of the index."
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
    without_reference: bool = Field(
        False, description="Leave the reference out of the answers, if it is a row."
    )
    target: int | None = Field(
        None, ge=0, le=LARGEST_ROW, description="An image whose place is asked for, as a row."
    )
    filter: str = Field(
        "",
        max_length=1000,
        description="What images have to be, in the language of the index's store.",
    )


class Photo(BaseModel):
    """An image of the index: its row, its file's name, and its path from the indexed folder on."""

    row: str = Field(
        description="A whole number as text: Milvus's have 63 bits, and numbers of JavaScript hold 53."
    )
    name: str
    path: str


class Answer(Photo):
    """An image with its cosine similarity to the question."""

    similarity: float


class Answers(BaseModel):
    """The nearest images first, and what the Combiner did: see docs/moe.md."""

    answers: list[Answer]
    place: int | None = Field(
        description=f"Of the target, from 1; null where it is not among {PLACES:,}, or none was named."
    )
    gate: float | None = Field(description="How much of the residual is text; null for a sum.")
    experts: list[float] = Field(description="The weights of the experts; empty without any.")
    note: str = Field(description="What to know of how the question was read.")
    server: str = Field(description="Changes when the server starts anew, and rows may then, too.")


class Health(BaseModel):
    """That the server answers, and what it is."""

    status: Literal["ok"] = "ok"
    images: int
    composes: str = Field(description="sum or combiner.")
    k: int
    places: int = Field(description="Among how many a target's place is looked for.")
    kinds: list[str] = Field(description="Endings of files that may be uploaded.")
    filters: bool = Field(description="Whether the index's store takes a filter.")
    server: str


class Error(BaseModel):
    """What is wrong, in one sentence."""

    error: str


REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": Error, "description": "The question cannot be asked."},
    429: {"model": Error, "description": "Too many at once: try again after Retry-After."},
}


class Service:
    """What the addresses answer. All users share one searcher, one thread that asks it, and the thumbnails.

    Args:
        k: answers where a question does not say.
        together: answers the questions; see `Together`.
    """

    def __init__(self, searcher: Searcher, k: int, together: "Together[Question, Found]") -> None:
        self.searcher = searcher
        self.k = min(k, MOST_ANSWERS)
        self.together = together
        self.thumbnails = Thumbnails()
        self.server = uuid.uuid4().hex[:12]
        self.decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="decoder")

    async def search(self, request: Request) -> Response:
        """The images nearest to an image that is changed as a text says."""
        asked, upload = await read_question(request)
        image: Path | torch.Tensor | None = None
        if upload is not None:
            image = await self._decode(functools.partial(self._read, upload))
        elif asked.row is not None:
            image = self._file(asked.row)
        question = Question(
            image=image,
            text=asked.text,
            k=asked.k or self.k,
            mix=asked.mix,
            without=asked.row if asked.without_reference else None,
            target=asked.target,
            condition=asked.filter.strip(),
        )
        self.searcher.check(question)
        answer = asyncio.wrap_future(self.together.ask(question))
        try:
            found = await asyncio.wait_for(answer, MOST_SECONDS)
        except asyncio.TimeoutError:
            raise HTTPException(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "no answer in time: try again",
                {"retry-after": RETRY_AFTER},
            ) from None
        answers = Answers(
            answers=[self._answer(*hit) for hit in zip(found.rows, found.answers, strict=True)],
            place=found.place,
            gate=found.gate,
            experts=found.experts,
            note=found.note,
            server=self.server,
        )
        return Response(answers.model_dump_json(), media_type="application/json")

    async def preview(self, request: Request) -> Response:
        """A small JPEG of an image that is sent, or why it cannot be asked with. Nothing of it is kept."""
        _, upload = await read_question(request)
        if upload is None:
            raise UserError("there is no image: send one")
        return jpeg_response(await self._decode(functools.partial(self._preview, upload)))

    async def image(self, row: int, size: Literal["small", "large"] = "small") -> Response:
        """A JPEG of an image of the index."""
        file = self._file(row)
        return jpeg_response(
            await self._decode(functools.partial(self.thumbnails.get, file, size)), age=600
        )

    def photo(self, row: int) -> Photo:
        """The name of an image of the index."""
        return self._photo(row, self._file(row))

    def some(self, count: int = Query(40, ge=1, le=MOST_SHOWN)) -> list[Photo]:
        """Images of the index, at random."""
        return [self._photo(row, self._file(row)) for row in self.searcher.some(count)]

    def health(self) -> Health:
        """That the server answers, and what it is."""
        return Health(
            images=len(self.searcher),
            composes=self.searcher.pair.compose.combining_function,
            k=self.k,
            places=min(PLACES, len(self.searcher)),
            kinds=sorted(KINDS),
            filters=self.searcher.knows_conditions,
            server=self.server,
        )

    async def _decode(self, work: Callable[[], Made]) -> Made:
        """What some work with pixels makes, in one of a few threads."""
        return await asyncio.get_running_loop().run_in_executor(self.decoders, work)

    def _read(self, upload: Upload) -> torch.Tensor:
        """Bytes (3, R, R), as CLIP's preprocessing makes them."""
        encoder = self.searcher.pair.encoder
        return encoder.loader.read(upload.stream())

    def _preview(self, upload: Upload) -> bytes:
        self._read(upload)  # says why it cannot be asked with
        return jpeg(small_image(upload.stream(), SIDES["small"]), SIDES["small"])

    def _file(self, row: int) -> Path:
        file = self.searcher.image(row) if row <= LARGEST_ROW else None
        if file is None:
            raise HTTPException(
                HTTPStatus.NOT_FOUND, "there is no such image: choose one that is shown"
            )
        return file

    def _photo(self, row: int, file: Path) -> Photo:
        return Photo(row=str(row), name=file.name, path=self._shown_path(file))

    def _answer(self, row: int, answer: tuple[Path, float]) -> Answer:
        file, similarity = answer
        return Answer(
            row=str(row),
            name=file.name,
            path=self._shown_path(file),
            similarity=round(similarity, 6),
        )

    def _shown_path(self, file: Path) -> str:
        """A path from the indexed folder on: what is above is the server's own."""
        for folder in self.searcher.index.about.get("folders", []):
            if file.is_relative_to(folder):
                return str(file.relative_to(Path(folder).parent))
        return file.name


async def read_question(request: Request) -> tuple[Asked, Upload | None]:
    """The fields of a form and its image.

    Raises:
        UserError: a field is unknown, twice there or of another type, or the image is none.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("multipart/form-data", "application/x-www-form-urlencoded"):
        raise HTTPException(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send the question as a form")
    upload = None
    async with request.form(max_files=1, max_fields=MOST_FIELDS) as form:
        fields = dict(form)
        if len(form.multi_items()) != len(fields):
            raise UserError("a field is there twice: send it once")
        image = fields.pop("image", None)
        if isinstance(image, UploadFile):
            upload = checked_upload(image.filename or "", await image.read())
        elif image is not None:
            raise UserError("image: send a file, no text; nothing is fetched from an address")
        try:
            asked = Asked.model_validate(fields)
        except ValidationError as error:
            raise UserError(first_fault(error.errors()[0])) from None
    if upload is not None and asked.row is not None:
        raise UserError("there are two references: send an image or a row")
    return asked, upload


def first_fault(fault: Any) -> str:
    """A fault of a field in words. What was sent is not repeated."""
    name = ".".join(str(part) for part in fault["loc"] if str(part).isascii())[:50]
    return f"{name}: {fault['msg'][0].lower()}{fault['msg'][1:]}"


def jpeg_response(content: bytes, age: int = 0) -> Response:
    """A JPEG that the browser may keep for some seconds."""
    kept = f"private, max-age={age}" if age else "no-store"
    return Response(content, media_type="image/jpeg", headers={"cache-control": kept})


def failed(status: int, message: str, headers: Any = None) -> JSONResponse:
    """An error in one sentence."""
    return JSONResponse({"error": message}, status, headers)


def add_errors(app: FastAPI) -> None:
    """Let every error be one sentence."""

    def refused(_: Request, error: Any) -> JSONResponse:
        return failed(HTTPStatus.BAD_REQUEST, str(error))

    def malformed(_: Request, error: Any) -> JSONResponse:
        return failed(HTTPStatus.BAD_REQUEST, first_fault(error.errors()[0]))

    def unknown(_: Request, error: Any) -> JSONResponse:
        return failed(error.status_code, str(error.detail).lower(), error.headers)

    def fault(_: Request, error: Any) -> JSONResponse:
        return failed(
            HTTPStatus.INTERNAL_SERVER_ERROR, "a fault of the server: its terminal says more"
        )

    app.add_exception_handler(UserError, refused)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(HTTPException, unknown)
    app.add_exception_handler(Exception, fault)


def page_file(name: str, kind: str) -> Callable[[], Response]:
    """An address that answers with a file of the page."""
    content = (PAGE / name).read_bytes()

    def file() -> Response:
        headers = {"cache-control": "no-cache"}
        return Response(content, media_type=f"{kind}; charset=utf-8", headers=headers)

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
    for path, kind in FILES.items():
        name = path.lstrip("/") or "index.html"
        app.add_api_route(path, page_file(name, kind), include_in_schema=False)
    asked = Asked.model_json_schema()
    asked["properties"]["image"] = {
        "type": "string",
        "format": "binary",
        "description": f"The reference, as a file: {' '.join(sorted(KINDS))}",
    }
    form = {"requestBody": {"content": {"multipart/form-data": {"schema": asked}}}}
    app.add_api_route(
        "/search",
        service.search,
        methods=["POST"],
        response_model=Answers,
        responses=REFUSALS,
        openapi_extra=form,
    )
    app.add_api_route("/preview", service.preview, methods=["POST"], include_in_schema=False)
    picture: dict[int | str, dict[str, Any]] = {200: {"content": {"image/jpeg": {}}}}
    app.add_api_route("/image/{row}", service.image, response_class=Response, responses=picture)
    app.add_api_route("/photo/{row}", service.photo)
    app.add_api_route("/some", service.some)
    app.add_api_route("/health", service.health)
    if documented:
        written = functools.cache(lambda: guide(app.openapi()))
        app.add_api_route(
            "/docs", lambda: HTMLResponse(written()), include_in_schema=False, methods=["GET"]
        )
    return app
