"""HTTP interface of the search: queries as forms, results as JSON, thumbnails, and the files of the page.

A request refers to an indexed image only by its row, or contains an uploaded image, so no request makes the server
read any other file. Uploads stay in memory: the server keeps the preprocessed pixels of an upload until later uploads
need the space. Worker processes decode images and threads wait for the index, so the event loop stays free.
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
from image_search.searcher import (
    LESS,
    TARGET_DEPTH,
    Found,
    RetrievedImage,
    Searcher,
    SearchQuery,
)
from image_search.stores.base import QueryError
from image_search.uploads import MOST_BYTES, File, preview, read_pixels, read_upload
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
MOST_RESULTS = 100
MOST_REFERENCES = 4  # maximum number of rows, uploads and files in a query
FORM_TYPES = ("multipart/form-data", "application/x-www-form-urlencoded")
MOST_FIELDS = 32
LONGEST_FIELD = 2**16  # bytes
MultiPartParser.spool_max_size = MOST_BYTES  # uploads are not written to disk
MOST_SHOWN = 100  # maximum number of images per request to /some or /examples
AGE = 600  # seconds for which a browser may cache a thumbnail
LARGEST_ROW = 2**63 - 1
# Decoding processes. Uploads have a lower limit on pixels than indexed images, whose only limit is Pillow's.
UPLOADS = {"workers": 4, "memory": 2**30}
PHOTOS = {"workers": 4, "memory": 2**31}
MOST_KEPT = 64 * 2**20  # maximum bytes of cached thumbnails, and again of preprocessed uploads
SMALLEST_PACKED = 1000  # minimum bytes of a response to compress it
SIDES = {"small": 320, "large": 1280}  # pixels of the longer side of a thumbnail
TITLE = "Composed image retrieval"
SUMMARY = "Search an index of images by reference images and what to change in them."


class SearchForm(BaseModel):
    """Query as the fields of a form; fields that are lists may be repeated."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    row: list[Annotated[int, Field(ge=0, le=LARGEST_ROW)]] = Field(
        [],
        description="Row of an indexed image to use as a reference. May be repeated: the query uses the mean of up to "
        f"{MOST_REFERENCES} references.",
    )
    upload: list[Annotated[str, Field(max_length=100)]] = Field(
        [],
        description="Name of an upload, from POST /upload, to use as a reference. May be repeated.",
    )
    text: str = Field(
        "", description="Caption: what to change in the references, or what to look for."
    )
    k: int | None = Field(
        None, ge=1, le=MOST_RESULTS, description="Number of results (default: the server's --k)."
    )
    mix: float | None = Field(
        None,
        ge=0,
        le=1,
        description=(
            "Weight of the text in a sum of image and text: 0 uses only the image, 1 only the text (default: "
            "compose the query with the server's combining function)."
        ),
    )
    lean: float | None = Field(
        None,
        ge=0,
        le=1,
        description=(
            "Shift of the Combiner's gate: 0 towards the image, 1 towards the text. The odds of the gate are "
            "multiplied by lean / (1 - lean), so 0.5 leaves the gate as trained (default: 0.5)."
        ),
    )
    less_row: int | None = Field(
        None,
        ge=0,
        le=LARGEST_ROW,
        description="Row of an image that the results should resemble less: "
        f"{LESS:g} times its normalised feature is subtracted from the query feature, which is normalised again.",
    )
    less_upload: str = Field(
        "", max_length=100, description="Name of an upload that the results should resemble less."
    )
    without_reference: bool = Field(
        False, description="Exclude references that are rows from the results."
    )
    target: int | None = Field(
        None, ge=0, le=LARGEST_ROW, description="Row of the target, whose rank is returned."
    )
    filter: str = Field(
        "",
        max_length=1000,
        description="Condition on the results, in the filter language of the index's store.",
    )
    distinct: bool = Field(False, description="Exclude copies of other results.")
    min_similarity: float | None = Field(
        None, ge=-1, le=1, description="Smallest cosine similarity of a result."
    )

    @field_validator("upload")
    @classmethod
    def _but_blanks(cls, names: list[str]) -> list[str]:
        """Drop empty values, which browsers send for empty fields."""
        return [name for name in names if name]


REPEATED = {
    name for name, field in SearchForm.model_fields.items() if get_origin(field.annotation) is list
}


class Photo(BaseModel):
    """An indexed image: its row, its file name, and its path, which begins with the name of the indexed folder."""

    row: str = Field(
        description="Integer as a string: rows in Milvus have 63 bits, more than a JavaScript number can represent."
    )
    name: str
    path: str


class StoredUpload(BaseModel):
    """An uploaded image that later queries can refer to until it is evicted for space."""

    upload: str = Field(description="Name of the upload.")
    picture: str = Field(description="Thumbnail of the image: a JPEG as a data: URL.")


class KnownExample(BaseModel):
    """An example query with a known target."""

    reference: Photo
    text: str
    target: Photo


class SearchResult(Photo):
    """A retrieved image."""

    similarity: float = Field(description="Cosine similarity to the query.")
    is_gone: bool = Field(description="Whether the file no longer exists.")
    copy_of: str | None = Field(
        description="Row of an earlier result that is the same image; null if there is none."
    )


class SearchResults(BaseModel):
    """Results of a query, and the state of the Combiner: see docs/internals/moe.md."""

    results: list[SearchResult] = Field(description="Retrieved images, most similar first.")
    rank: int | None = Field(
        description="Rank of the target, starting at 1; null without a target, or if its rank is above "
        f"{TARGET_DEPTH:,}."
    )
    gate: float | None = Field(
        description="Share of the text in the Combiner's residual, 0 to 1; null for a sum."
    )
    experts: list[float] = Field(description="Weights of the experts; empty without a mixture.")
    note: str = Field(description="Message for the user; may be empty.")
    server: str = Field(
        description="ID of the server process; rows may change when the server is restarted."
    )


class Health(BaseModel):
    """Status and settings of the server."""

    status: Literal["ok"] = "ok"
    images: int = Field(description="Number of indexed images.")
    composes: str = Field(description="Combining function: sum, combiner, image or text.")
    model: str = Field(description="Name of the CLIP model.")
    measured: str = Field(
        description="Benchmark and recall from the validation of the weights or from their model card; may be empty."
    )
    experts: list[Expert] = Field(
        description="Experts in the order of their weights; empty without a report on them."
    )
    k: int = Field(description="Default number of results.")
    max_k: int = Field(description="Maximum number of results.")
    max_references: int = Field(description="Maximum number of references in a query.")
    rank_depth: int = Field(description="Number of results that are searched for the target.")
    kinds: list[str] = Field(description="File extensions of images that can be uploaded.")
    filters: bool = Field(description="Whether the index's store supports filters.")
    examples: int = Field(description="Number of example queries with a known target.")
    server: str = Field(description="ID of the server process.")


class Error(BaseModel):
    """Error message in one sentence."""

    error: str


ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    400: {"model": Error, "description": "The query is invalid."},
}


class Service:
    """Handlers of the HTTP routes; all users share the searcher, the batcher, the workers and the cached thumbnails.

    Uploads have their own workers, so that expensive uploads do not delay users who browse the index.

    Args:
        k: default number of results.
        batcher: batcher that runs the queries.
        examples: example queries with known targets.
        seconds: time limit for decoding an image.
    """

    def __init__(
        self,
        searcher: Searcher,
        k: int,
        batcher: "Batcher[SearchQuery, Found]",
        *,
        examples: Sequence[Example] = (),
        seconds: float = SECONDS,
    ) -> None:
        self.searcher = searcher
        self.k = min(k, MOST_RESULTS)
        self.batcher = batcher
        self.examples = examples
        self.measured = measured(searcher.pair)
        self.experts = experts_of(searcher.pair)
        # JPEGs, keyed by image file and size; the least recently requested ones are evicted.
        self.thumbnails: LRUCache[tuple[Path, str], bytes] = LRUCache(MOST_KEPT, getsizeof=len)
        # Preprocessed uploads, keyed by names that other users cannot guess.
        self.seen: LRUCache[str, np.ndarray] = LRUCache(
            MOST_KEPT, getsizeof=lambda seen: seen.nbytes
        )
        self.server = uuid.uuid4().hex[:12]
        self.uploads = Pool(seconds=seconds, **UPLOADS)
        self.photos = Pool(seconds=seconds, **PHOTOS)
        # A browser opens few connections, so the first query would wait for the first thumbnails.
        for pool in (self.photos, self.uploads):
            threading.Thread(target=pool.start, daemon=True).start()

    def close(self) -> None:
        """End the decoding processes."""
        self.uploads.close()
        self.photos.close()

    async def search(self, request: Request) -> Response:
        """Return the images nearest to the query: references that are changed as the text describes."""
        form, files = await read_form(request)
        references = [self._seen(name) for name in form.upload]
        references += [await self._reference(row) for row in form.row]
        for file in files:
            pixels = await self._of_upload(read_upload, file, self._read)
            references.append(torch.from_numpy(pixels))
        query = SearchQuery(
            references=references,
            text=form.text,
            k=form.k or self.k,
            less=await self._image(form.less_row, form.less_upload),
            mix=form.mix,
            lean=form.lean,
            without=frozenset(form.row if form.without_reference else ()),
            target=form.target,
            condition=form.filter.strip(),
            distinct=form.distinct,
            min_similarity=form.min_similarity,
        )
        self.searcher.check(query)
        found = await asyncio.wrap_future(self.batcher.submit(query))
        results = SearchResults(
            results=[self._result(image) for image in found.results],
            rank=found.rank,
            gate=found.gate,
            experts=found.experts,
            note=found.note,
            server=self.server,
        )
        return Response(results.model_dump_json(), media_type="application/json")

    async def upload(self, request: Request) -> StoredUpload:
        """Store an image, so that queries can refer to it without sending it again."""
        _, files = await read_form(request)
        if len(files) != 1:
            raise QueryError("image: send one file")
        shown = (self._read, SIDES["small"], self._background)
        seen, small = await self._of_upload(preview, files[0], *shown)
        name = secrets.token_urlsafe()
        self.seen[name] = seen
        picture = f"data:image/jpeg;base64,{b64encode(small).decode()}"
        return StoredUpload(upload=name, picture=picture)

    async def image(
        self, request: Request, row: int, size: Literal["small", "large"] = "small"
    ) -> Response:
        """Return a JPEG of an indexed image."""
        file = await self._look_up(self._file, row)
        kept = self.thumbnails.get((file, size))
        if kept is not None:
            return unless_known(request, kept, "image/jpeg", age=AGE)
        try:
            picture = await self.photos.run(thumbnail, file, SIDES[size], self._background)
        except Overrun:
            raise HTTPException(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "decoding this image takes too long: try another image",
            ) from None
        if await asyncio.to_thread(file_size, file) is not None:
            self.thumbnails[file, size] = picture
        return unless_known(request, picture, "image/jpeg", age=AGE)

    async def photo(self, row: int) -> Photo:
        """Return the row, name and path of an indexed image."""
        return await self._look_up(self._photo, row)

    async def some(self, count: int = Query(40, ge=1, le=MOST_SHOWN)) -> list[Photo]:
        """Return random indexed images."""
        return await self._look_up(self._some, count)

    async def some_examples(self, count: int = Query(4, ge=1, le=MOST_SHOWN)) -> list[KnownExample]:
        """Return random example queries with known targets; none if the server runs without --examples."""
        return await self._look_up(self._some_examples, count)

    async def health(self) -> Health:
        """Return the status and settings of the server."""
        return Health(
            images=len(self.searcher),
            composes=self.searcher.pair.compose.combining_function,
            model=shown_model(self.searcher.pair.encoder.preprocessing["clip_model_name"]),
            measured=self.measured,
            experts=self.experts,
            k=self.k,
            max_k=MOST_RESULTS,
            max_references=MOST_REFERENCES,
            rank_depth=min(TARGET_DEPTH, len(self.searcher)),
            kinds=sorted(TAKEN),
            filters=self.searcher.knows_conditions,
            examples=len(self.examples),
            server=self.server,
        )

    @property
    def _read(self) -> Callable[[Any], torch.Tensor]:
        """Return the function that preprocesses an image file to bytes (3, R, R) for CLIP."""
        return self.searcher.pair.encoder.loader.read

    @property
    def _background(self) -> str:
        """Return the background colour for transparent images."""
        return self.searcher.pair.encoder.preprocessing["background"]

    async def _of_upload(
        self, function: Callable[..., Outcome], upload: File, *arguments: Any
    ) -> Outcome:
        """Run a function on an upload in a worker, and return its result."""
        try:
            return await self.uploads.run(function, upload, *arguments)
        except Overrun:
            raise QueryError(
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
            raise HTTPException(HTTPStatus.GONE, "the image is no longer stored: upload it again")
        return torch.from_numpy(seen)

    async def _reference(self, row: int) -> torch.Tensor:
        """Return the features (1, D) of an indexed image; if its file has changed, its preprocessed bytes (3, R, R)."""
        file, features = await self._look_up(self._kept, row)
        if features is not None:
            return features
        try:
            pixels = await self.photos.run(read_pixels, file, self._read)
        except (UserError, Overrun):
            raise QueryError(
                "this image has changed and can no longer be decoded: choose another image"
            ) from None
        return torch.from_numpy(pixels)

    async def _look_up(self, function: Callable[..., Outcome], *arguments: Any) -> Outcome:
        """Call a function that reads the index, in a thread if the index may wait for a server."""
        if self.searcher.index.is_remote:
            return await asyncio.to_thread(function, *arguments)
        return function(*arguments)

    def _kept(self, row: int) -> tuple[Path, torch.Tensor | None]:
        file = self._file(row)
        return file, self.searcher.kept_features(row, file)

    def _file(self, row: int) -> Path:
        file = self.searcher.image(row)
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

    def _result(self, image: RetrievedImage) -> SearchResult:
        copy_of = None if image.copy_of is None else str(image.copy_of)
        return SearchResult(
            row=str(image.row),
            name=image.path.name,
            path=self._shown_path(image.path),
            similarity=round(image.similarity, 6),
            is_gone=image.is_gone,
            copy_of=copy_of,
        )

    def _shown_path(self, file: Path) -> str:
        """Return a path that begins with the name of the indexed folder; the folders above it are not public."""
        for folder in self.searcher.index.about.get("folders", []):
            if file.is_relative_to(folder):
                return str(file.relative_to(Path(folder).parent))
        return file.name


async def read_form(request: Request) -> tuple[SearchForm, list[File]]:
    """Return the fields of a form and its image files.

    Raises:
        QueryError: a field is unknown, repeated or of a wrong type, or there are too many references.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in FORM_TYPES:
        raise HTTPException(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send the query as a form")
    try:
        form = await request.form(
            max_files=MOST_REFERENCES, max_fields=MOST_FIELDS, max_part_size=LONGEST_FIELD
        )
    except ValueError:
        raise QueryError("the form is damaged: send it again, in UTF-8") from None
    fields: dict[str, Any] = {}
    files = []
    for name in form:
        values = form.getlist(name)
        if name == "image":
            for value in values:
                if isinstance(value, str):
                    raise QueryError("image: send a file, not text; URLs are not fetched")
                files.append(File(value.filename or "", await value.read()))
        elif not all(isinstance(value, str) for value in values):
            raise QueryError("image is the only field that may be a file")
        elif name not in REPEATED and len(values) > 1:
            raise QueryError("a field is repeated: send it once")
        else:
            fields[name] = values if name in REPEATED else values[0]
    try:
        search_form = SearchForm.model_validate(fields)
    except ValidationError as error:
        raise QueryError(invalid_field(error.errors()[0])) from None
    count = len(files) + len(search_form.upload) + len(search_form.row)
    if count > MOST_REFERENCES:
        raise QueryError(
            f"image, upload and row contain {count} references: send at most {MOST_REFERENCES}"
        )
    if search_form.less_row is not None and search_form.less_upload:
        raise QueryError("less_row and less_upload are two images: send one")
    return search_form, files


def invalid_field(fault: Any) -> str:
    """Return a message about an invalid field, without the value that was sent."""
    # Numbers are positions in a list, which mean nothing to a client that sent a single value.
    parts = [part for part in fault["loc"] if isinstance(part, str) and part.isascii()]
    name = ".".join(parts)[:50]
    return f"{name}: {fault['msg'][0].lower()}{fault['msg'][1:]}"


def unless_known(request: Request, content: bytes, kind: str, age: int = 0) -> Response:
    """Return a response that a browser may cache: with content, or with status 304 if the cached copy is current.

    Args:
        age: seconds for which the browser need not revalidate its copy.
    """
    tag = f'W/"{hashlib.sha256(content).hexdigest()[:20]}"'
    headers = {"etag": tag, "cache-control": f"private, max-age={age}" if age else "no-cache"}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
    return Response(content, media_type=kind, headers=headers)


def shown_model(name: str) -> str:
    """Return the name of a CLIP; if it is a path, only the file name, since folders are not public."""
    model, _, _ = name.partition("=")
    _, _, path = model.rpartition(":")
    return Path(path).name if Path(path).exists() else model


def failed(status: int, message: str, headers: Any = None) -> JSONResponse:
    """Return an error response whose message is one sentence."""
    return JSONResponse({"error": message}, status, headers)


def add_errors(app: FastAPI) -> None:
    """Add the exception handlers, which turn every error into one sentence."""

    def add(kind: type[Exception], answer: Callable[[Any], Response]) -> None:
        async def handle(_: Request, error: Any) -> Response:
            return answer(error)

        app.add_exception_handler(kind, handle)

    def broken(error: UserError) -> Response:
        logger.error("error: %s", error)
        return failed(
            HTTPStatus.SERVICE_UNAVAILABLE, "the search failed: see the server's terminal"
        )

    bad = HTTPStatus.BAD_REQUEST
    add(QueryError, lambda error: failed(bad, error.public_message))
    add(UserError, broken)
    add(RequestValidationError, lambda error: failed(bad, invalid_field(error.errors()[0])))
    add(
        HTTPException,
        lambda error: failed(error.status_code, str(error.detail).lower(), error.headers),
    )
    # The client disconnected before its request was complete.
    add(ClientDisconnect, lambda _: Response(status_code=bad))
    internal = "internal error: see the server's terminal"
    add(Exception, lambda _: failed(HTTPStatus.INTERNAL_SERVER_ERROR, internal))


def page_file(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    """Return a handler that serves a file of the page."""
    content = (PAGE / name).read_bytes()

    async def file(request: Request) -> Response:
        return unless_known(request, content, f"{kind}; charset=utf-8")

    return file


def build(service: Service, documented: bool) -> FastAPI:
    """Build the FastAPI application.

    Args:
        documented: whether to serve the documentation, /docs and /openapi.json.
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
    fields = SearchForm.model_json_schema()
    file = {"type": "string", "format": "binary"}
    kinds = " ".join(sorted(TAKEN))
    fields["properties"]["image"] = {
        "type": "array",
        "items": file,
        "description": f"Image file to use as a reference: {kinds}. May be repeated.",
    }
    form = {"requestBody": {"content": {"multipart/form-data": {"schema": fields}}}}
    app.add_api_route(
        "/search",
        service.search,
        methods=["POST"],
        response_model=SearchResults,
        responses=ERROR_RESPONSES,
        openapi_extra=form,
    )
    image = {"image": {**file, "description": f"Image file: {kinds}"}}
    form = {"requestBody": {"content": {"multipart/form-data": {"schema": {"properties": image}}}}}
    app.add_api_route(
        "/upload", service.upload, methods=["POST"], responses=ERROR_RESPONSES, openapi_extra=form
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
