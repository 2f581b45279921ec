"""A web page to search an index: choose or upload a reference, say what to change, go on from an answer.

    python src/demo_app.py --index photos_index --combiner-path models_final/combiner_trained     (or `make app`)

It serves this machine alone unless --host says otherwise. It needs requirements-app.txt.
"""

import argparse
import contextlib
import functools
import importlib.util
import logging
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL.Image import Image

from cli import options
from cli.flag_types import port
from cli.parsers import ScriptParser
from cli.startup import check_files, pick_device
from image_search.dialogue import MOST_BYTES, Dialogue
from image_search.guard import KEPT_FOR, MOST_KEPT, Guard, Hosts, drop_settings, tidy
from image_search.manifest import check_index
from image_search.photos import KINDS, small_image
from reports import pages
from reports.sheets import shares
from runtime import interruption
from utils import Stopped, UserError, command, first_line

if TYPE_CHECKING:
    from image_search.searcher import Searcher

logger = logging.getLogger(__name__)

CHOICES = 40  # images to choose a reference from
SIDE = 320  # pixels of an image on the page
HISTORY_SIDE = 80  # pixels of an image in the history
GRACE = 1  # seconds that answers may still take when the page ends
LONGEST_END = 5  # seconds; a container is killed after ten
TIDIED_EVERY = 10  # seconds
LOOKED_EVERY = 0.2  # seconds, for a signal
TITLE = "Composed image retrieval"
STYLE = """
#reference img { width: 100%; height: 100%; object-fit: contain; }
/* Galleries have the columns that Gradio was told, and fewer where an image would be narrower than this. */
#results { --narrowest: 110px; }
#choice { --narrowest: 72px; }
.grid-container { padding-top: 1.5rem; grid-auto-rows: auto;
  grid-template-columns: repeat(auto-fill, minmax(max(var(--narrowest), 100% / (var(--grid-cols) + 1)), 1fr)); }
#results .thumbnail-item { aspect-ratio: auto; height: auto; } /* grows with the label, which is below the image */
#results .thumbnail-item img { aspect-ratio: 1; height: auto; }
#results .caption-label { position: static; max-width: none; border: none; }
#results .caption-label { white-space: normal; overflow-wrap: anywhere; }
.steps { padding-left: 1.2rem; overflow-wrap: anywhere; }
.steps img { display: inline; width: auto; height: auto; max-height: 40px; max-width: 100%; }
.steps img { vertical-align: middle; margin: 2px 6px 2px 0; }
.bars { display: grid; grid-template-columns: auto 1fr auto; gap: 2px 8px; align-items: center; }
.bars i { display: block; height: 10px; border-radius: 3px; background: var(--primary-500, #2166ac); }
footer { display: none !important; }
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags of the page."""
    parents = [
        *options.search_flags(),
        options.clip_flags(),
        options.tuned_clip_flag(),
        options.compute_flags(False),
    ]
    parser = ScriptParser(__doc__, parents=parents)
    group = parser.add_argument_group("page")
    group.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 for other machines (default: 127.0.0.1)"
    )
    group.add_argument("--port", type=port, default=7860, help="(default: 7860)")
    group.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a further name of the page, as of a proxy in front of it; may be repeated",
    )
    options.add_k(group, default=12)
    return parser.parse_args(argv)


def check_gradio() -> None:
    """Raise UserError where Gradio is not installed, which only the page needs."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the page needs Gradio: pip install -r requirements-app.txt")


def history(dialogue: Dialogue) -> str:
    """The steps so far, in HTML."""
    if not dialogue.steps:
        return "<p>Choose an image below, or upload one.</p>"
    lines = []
    for step in dialogue.steps:
        jpeg = pages.jpeg(step.picture(HISTORY_SIDE), HISTORY_SIDE)
        url = pages.data_url(jpeg, "image/jpeg")
        asked = pages.text(f"“{step.text}”") if step.found else ""
        lines.append(f'<li><img src="{url}" alt="{pages.text(step.reference.name)}">{asked}</li>')
    return f'<ol class="steps">{"".join(lines)}</ol>'


def shown(dialogue: Dialogue, unasked: Any) -> tuple:
    """What the page shows of a dialogue: itself, reference, text, answers, bars, note, history.

    Images are decoded and made small, so that no file is served.

    Args:
        unasked: the text to show where no search was made with the reference.
    """
    step = dialogue.last
    if step is None:
        return dialogue, None, unasked, [], "", "", history(dialogue)
    reference = step.picture(SIDE)
    text = step.text or unasked
    if step.found is None:
        return dialogue, reference, text, [], "", "", history(dialogue)
    answers = []
    for place, (path, similarity) in enumerate(step.found.answers, start=1):
        answers.append((small_image(path, SIDE), f"{place}. {similarity:.3f} {path.name}"))
    bars = pages.bars(shares(step.found.gate, step.found.experts))
    return dialogue, reference, text, answers, bars, step.found.note, history(dialogue)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The components of the page that handlers read and fill.

    Attributes:
        dialogue: the state that the page keeps for its user.
        rows: of the images to choose from.
    """

    dialogue: Any
    rows: Any
    reference: Any
    upload: Any
    text: Any
    ask: Any
    undo: Any
    note: Any
    steps: Any
    answers: Any
    experts: Any
    choice: Any
    more: Any

    @property
    def outputs(self) -> list[Any]:
        """What `shown` fills."""
        return [
            self.dialogue,
            self.reference,
            self.text,
            self.answers,
            self.experts,
            self.note,
            self.steps,
        ]


def lay_out(gradio: Any) -> Parts:
    """Put the components on the page that is open, in their order from left to right and down."""
    parts = {"dialogue": gradio.State(Dialogue()), "rows": gradio.State([])}
    gradio.Markdown(f"# {TITLE}\nA reference, and what to change. Click a result to go on from it.")
    with gradio.Row():
        with gradio.Column(scale=1, min_width=300):
            parts["reference"] = gradio.Image(
                label="Reference", elem_id="reference", interactive=False, height=260, buttons=[]
            )
            parts["upload"] = gradio.UploadButton(
                "Upload a reference", file_types=sorted(KINDS), elem_id="upload"
            )
            parts["text"] = gradio.Textbox(
                label="What to change", placeholder="is red, no sleeves", elem_id="text"
            )
            parts["ask"] = gradio.Button("Search", variant="primary", elem_id="search")
            parts["undo"] = gradio.Button("Undo", elem_id="undo")
            parts["note"] = gradio.Markdown(elem_id="note")
            parts["steps"] = gradio.HTML(elem_id="history")
        with gradio.Column(scale=3, min_width=300):
            parts["answers"] = _gallery(gradio, "Results", columns=4, elem_id="results")
            parts["experts"] = gradio.HTML(elem_id="experts")
    parts["choice"] = _gallery(gradio, "References", columns=8, elem_id="choice")
    parts["more"] = gradio.Button("Other images", elem_id="more")
    return Parts(**parts)


def _gallery(gradio: Any, label: str, *, columns: int, elem_id: str) -> Any:
    """Images to click on, as high as they need to be."""
    return gradio.Gallery(
        label=label,
        columns=columns,
        elem_id=elem_id,
        height="max-content",
        allow_preview=False,
        object_fit="contain",
        buttons=[],
    )


def wire(gradio: Any, page: Any, parts: Parts, *, searcher: "Searcher", k: int) -> None:
    """Let the components change the dialogue of the user who touches them."""
    unchanged = gradio.skip()

    # A text that was typed stays until it is searched with, unless a handler passes another as `unasked`.
    def safely(change: Callable[..., Dialogue], unasked: Any = unchanged) -> Callable[..., tuple]:
        """A handler that tells users what they can put right, and then leaves the dialogue as it was."""

        @functools.wraps(change)
        def handler(*inputs: Any) -> tuple:
            try:
                return shown(change(*inputs), unasked)
            except UserError as error:
                message = pages.text(error)
                gradio.Warning(message)
                return tuple(message if part is parts.note else unchanged for part in parts.outputs)

        return handler

    def random_images() -> tuple[list[int], list[Image]]:
        images = {row: searcher.image(row) for row in searcher.some(CHOICES)}
        return list(images), [small_image(image or Path(), SIDE) for image in images.values()]

    def start() -> tuple:
        return *random_images(), *shown(Dialogue(), "")

    def choose(dialogue: Dialogue, rows: list[int], event: gradio.SelectData) -> Dialogue:
        place = event.index
        return dialogue.choose(searcher, rows[place] if 0 <= place < len(rows) else -1)

    def choose_answer(dialogue: Dialogue, event: gradio.SelectData) -> Dialogue:
        return dialogue.choose_answer(searcher, event.index)

    def upload(dialogue: Dialogue, name: str) -> Dialogue:
        file = Path(name)
        try:
            return dialogue.upload(searcher, file)
        finally:
            file.unlink(missing_ok=True)

    def ask(dialogue: Dialogue, text: str) -> Dialogue:
        return dialogue.ask(searcher, text, k)

    page.load(start, None, [parts.rows, parts.choice, *parts.outputs])
    parts.more.click(random_images, None, [parts.rows, parts.choice])
    parts.choice.select(safely(choose), [parts.dialogue, parts.rows], parts.outputs)
    parts.answers.select(safely(choose_answer, unasked=""), [parts.dialogue], parts.outputs)
    parts.upload.upload(safely(upload), [parts.dialogue, parts.upload], parts.outputs)
    parts.ask.click(safely(ask), [parts.dialogue, parts.text], parts.outputs)
    parts.text.submit(safely(ask), [parts.dialogue, parts.text], parts.outputs)
    parts.undo.click(safely(Dialogue.undo), [parts.dialogue], parts.outputs)


def build(searcher: "Searcher", k: int, uploads: Path) -> Any:
    """The page, with handlers for a searcher that answers k images.

    Args:
        uploads: the folder of what is uploaded and of the images that are shown.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)  # before it is imported, which makes the folder
    import gradio

    with gradio.Blocks(title=TITLE, analytics_enabled=False) as page:
        wire(gradio, page, lay_out(gradio), searcher=searcher, k=k)
    return page


def application(page: Any, hosts: Hosts, uploads: Path) -> Guard:
    """The page as an ASGI application. Its fonts are the system's, so that nothing is requested from other hosts."""
    import gradio
    from fastapi import FastAPI

    from image_search.messages import events_of

    theme = gradio.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    os.environ["GRADIO_RUN_HISTORY"] = "False"  # browsers would keep all searches
    bare = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    served = gradio.mount_gradio_app(
        bare,
        page,
        path="/",
        max_file_size=MOST_BYTES,
        show_error=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        footer_links=[],
        theme=theme,
        css=STYLE,
    )
    page.has_launched = True  # from now on Gradio checks the paths that it is sent
    page.is_running = True
    return Guard(served, hosts, events=events_of(page.config), uploads=uploads)


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket at an address, which nobody else can take from now on. Raises UserError if somebody has."""
    try:
        family, *_, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"--host {host} --port {port}: {reason}; choose another") from None
    return bound


@contextlib.contextmanager
def served(app: Guard, bound: socket.socket) -> Iterator[threading.Thread]:
    """Serve in a thread, which listens when the context begins and has answered when it ends."""
    import uvicorn

    config = uvicorn.Config(
        app, log_level="warning", ws="none", timeout_graceful_shutdown=GRACE, server_header=False
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
    thread.start()
    try:
        while thread.is_alive() and not server.started:
            thread.join(0.01)
        if not server.started:
            raise RuntimeError("the server did not start: what is above says why")
        yield thread
    finally:
        server.should_exit = True
        thread.join(LONGEST_END)


@command
def main(argv: list[str] | None = None) -> None:
    """Serve the page until it is stopped."""
    args = parse(argv)
    check_files(args)
    check_index(args.index)
    if ignored := drop_settings():
        logger.warning("warning: %s of the environment is ignored here", ", ".join(ignored))
    check_gradio()
    bound = bound_socket(args.host, args.port)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # Gradio's requests to itself

    from image_search.searcher import load_searcher

    searcher = load_searcher(args.index, options.pair_choice(args), pick_device(args.device))
    hosts = Hosts(args.host, args.allow_host)
    # All signals that end a process are waited for, so that what is on the disk goes with the page.
    with (
        interruption.listening(interruption.heeded_endings()) as stop,
        tempfile.TemporaryDirectory(prefix="demo_app-", ignore_cleanup_errors=True) as folder,
    ):
        uploads = Path(folder)
        page = build(searcher, args.k, uploads)
        with served(application(page, hosts, uploads), bound) as server:
            shown_host = f"[{args.host}]" if ":" in args.host.strip("[]") else args.host
            logger.info("%d images; http://%s:%d", len(searcher), shown_host, args.port)
            wait(server, stop, uploads)
    if stop.requested == "SIGINT":
        raise KeyboardInterrupt
    if not stop.requested:
        raise RuntimeError("the server ended by itself: what is above says why")
    raise Stopped(stop.requested, "start it again with the same command")


def wait(server: threading.Thread, stop: interruption.StopRequest, uploads: Path) -> None:
    """Wait until the server ends or a signal asks for it, and keep the folder of uploads small."""
    tidied = time.monotonic()
    while server.is_alive() and not stop.requested:
        server.join(LOOKED_EVERY)
        if time.monotonic() - tidied > TIDIED_EVERY:
            tidy(uploads, MOST_KEPT, KEPT_FOR)
            tidied = time.monotonic()


if __name__ == "__main__":
    main()
