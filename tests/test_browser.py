"""All pages in a real browser, headless Chromium: no errors in its console, nothing wider than the screen or cut, and
the search page used as a user would: load, ask, click a result, upload, bad upload.

With PICTURES=DIR it writes screenshots there, of the demo's models if `make app` has made their index.
"""

import os
import shutil
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from PIL import Image

import demo_app
import search
import visualize
from forks import HANG
from image_search.guard import Hosts
from image_search.searcher import load_searcher
from reports import pages, sheets
from runtime.choices import PairChoice
from test_dialogue import bad_uploads
from test_search import images

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)"
    ),
]
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
    "--disable-sync",
]
WIDTHS = (1280, 768, 390, 320)
PICTURES = os.environ.get("PICTURES")
DEMO = Path(__file__).parent.parent / "demo"
# What is beyond the screen's left or right edge, wider than its own box, or beyond an edge of a box that clips it.
CUT = """selector => [...document.querySelectorAll(selector)].filter(element => {
    const inner = element.getBoundingClientRect();
    if (inner.left < 0 || inner.right > document.documentElement.clientWidth) return true;
    if (element.scrollWidth > element.clientWidth + 1) return true;
    for (let around = element.parentElement; around !== document.body; around = around.parentElement) {
        if (getComputedStyle(around).overflow === "visible") continue;
        const outer = around.getBoundingClientRect();
        if (inner.left < outer.left - 1 || inner.right > outer.right + 1) return true;
        if (inner.top < outer.top - 1 || inner.bottom > outer.bottom + 1) return true;
    }
    return false;
}).map(element => element.alt || element.innerText || element.src.slice(0, 80))"""

# Images that are shown in another proportion than they have, but for a pixel, and fill what surrounds them.
SQUEEZED = """selector => [...document.querySelectorAll(selector)].filter(image => {
    if (image.closest(".thumbnail-item, #reference") && getComputedStyle(image).objectFit === "contain") return false;
    const box = image.getBoundingClientRect();
    const [width, height] = [image.naturalWidth, image.naturalHeight];
    return Math.abs(box.width * height - box.height * width) > Math.max(width, height);
}).map(image => `${image.alt}: ${image.width} x ${image.height} of ${image.naturalWidth} x ${image.naturalHeight}`)"""
SHAPES = [(640, 40), (40, 640), (400, 225), (225, 400), (300, 300), (900, 1), (1, 900)]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=CHROMIUM,
            args=[*QUIET, "--disable-quic", "--disable-component-update"],
            timeout=1000 * HANG,
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Open an address; what goes wrong in the page is collected in `page.errors`."""
    opened = []

    def open_page(address: str, width: int = 1280):
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.set_default_timeout(1000 * HANG)
        page.errors = []
        page.on(
            "console",
            lambda message: page.errors.append(message.text) if message.type == "error" else None,
        )
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on(
            "request",
            lambda request: page.errors.append(request.url) if is_foreign(request.url) else None,
        )
        page.goto(address)
        opened.append(page)
        return page

    yield open_page
    for page in opened:
        page.close()


def is_foreign(url: str) -> bool:
    """Whether a request leaves this machine."""
    return not url.startswith(("http://127.0.0.1", "file:", "data:", "blob:"))


def picture(page, name: str) -> None:
    if PICTURES:
        page.wait_for_timeout(300)  # what moves comes to rest
        page.screenshot(path=str(Path(PICTURES) / f"{name}.png"))


# Pages that are files


@pytest.fixture
def files(golden, stage_2, tmp_path, drawn):
    """One page of each kind."""
    run = stage_2("CIRR", "--save-best")
    names = {"run": run / "index.html"}
    flags = [
        "--clip-model-name",
        golden / "clip_vit.pt",
        "--clip-model-path",
        golden / "tuned_clip_vit.pt",
    ]
    flags += [
        "--dataset",
        "CIRR",
        "--combining-function",
        "combiner",
        "--data-root",
        golden,
        "--device",
        "cpu",
    ]
    flags += [
        "--combiner-path",
        golden / "combiner_moe_cirr.pt",
        "--num-workers",
        0,
        "--output-dir",
        tmp_path / "s",
    ]
    visualize.main(list(map(str, flags)))
    names |= {"sheet": tmp_path / "s" / "sheet.html", "experts": tmp_path / "s" / "experts.html"}
    (first, *_) = images(tmp_path / "photos", 8)
    first = first.rename(first.with_stem("a_name_that_is_longer_than_a_thumbnail_is_wide"))
    index = [
        "index",
        "--images",
        tmp_path / "photos",
        "--output",
        tmp_path / "i",
        "--num-workers",
        0,
    ]
    search.main(list(map(str, [*index, "--clip-model-name", drawn / "tiny_clip_vit.pt"])))
    ask = [
        "query",
        "--index",
        tmp_path / "i",
        "--image",
        first,
        "--text",
        "is red",
        "--html",
        tmp_path / "a.html",
    ]
    search.main(list(map(str, ask)))
    return names | {"answers": tmp_path / "a.html"}


def test_pages_render_without_errors_on_wide_and_narrow_screens(files, open_page):
    for name, file in files.items():
        for width in WIDTHS:
            page = open_page(file.as_uri(), width)
            assert page.errors == [], name
            assert page.evaluate("document.documentElement.scrollWidth") <= width, name
            broken = "[...document.images].filter(i => !i.complete || !i.naturalWidth).length"
            assert (
                page.evaluate(
                    "Promise.all([...document.images].map(i => i.decode())).then(() => 0)"
                )
                == 0
            )
            assert page.evaluate(broken) == 0, name
            assert page.evaluate(CUT, "img, figcaption") == [], (name, width)
            assert page.evaluate(SQUEEZED, "img") == [], (name, width)
            assert page.locator("h1").count() == 1


def test_images_of_every_shape_keep_their_proportion(open_page, tmp_path):
    thumbnails = {}
    for shape in SHAPES:
        thumbnails[str(shape)] = pages.jpeg(Image.new("RGB", shape), sheets.SIDES[0])
    answers = [(name, 0.5) for name in thumbnails]
    cards = []
    for name in thumbnails:
        ranking = {"gallery": sheets.Row(answers, {name: 0})}
        cards.append(sheets.Card(label="1", caption="", reference=name, rows=ranking, bars={}))
    first = str(SHAPES[0])
    written = {
        "sheet": sheets.sheet("sheet", "", {"all": cards}, thumbnails),
        "answers": sheets.results_page("x", first, answers, about="", thumbnails=thumbnails),
    }
    for name, text in written.items():
        file = tmp_path / f"{name}.html"
        file.write_text(text)
        for width in (1280, 320):
            page = open_page(file.as_uri(), width)
            page.evaluate("Promise.all([...document.images].map(i => i.decode()))")
            assert page.evaluate(SQUEEZED, "img") == [], (name, width)
            assert page.evaluate(CUT, "img, figcaption") == [], (name, width)


# The search page


@pytest.fixture(scope="module")
def searcher(drawn, tmp_path_factory):
    """An index of drawn images with a MoE Combiner that is not trained; for screenshots the demo's, which is."""
    folder = tmp_path_factory.mktemp("app")
    if PICTURES and (DEMO / "index" / "index.json").exists():
        weights = sorted((DEMO / "models" / "FashionIQ_moe").glob("*/seed_0"))[-1]
        choice = PairChoice(combining_function=None, clip_path=None, combiner_path=weights)
        return load_searcher(DEMO / "index", choice, torch.device("cpu"))
    words = [
        "index",
        "--images",
        drawn / "fashionIQ_dataset" / "images",
        "--output",
        folder / "index",
    ]
    words += [
        "--clip-model-name",
        drawn / "tiny_clip_vit.pt",
        "--num-workers",
        0,
        "--device",
        "cpu",
    ]
    search.main(list(map(str, words)))
    from combiner import Combiner

    torch.manual_seed(0)
    torch.save({"epoch": 0, "Combiner": Combiner(64, 16, 24).state_dict()}, folder / "combiner.pt")
    choice = PairChoice(
        combining_function=None, clip_path=None, combiner_path=folder / "combiner.pt"
    )
    return load_searcher(folder / "index", choice, torch.device("cpu"))


@pytest.fixture(scope="module")
def address(searcher, tmp_path_factory):
    """Where the page is served."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", "")  # put back at the end
        uploads = tmp_path_factory.mktemp("uploads")
        page = demo_app.build(searcher, 8, uploads)
        bound = demo_app.bound_socket("127.0.0.1", 0)
        with demo_app.served(demo_app.application(page, Hosts("127.0.0.1"), uploads), bound):
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"


@pytest.fixture
def app(open_page, address):
    """The loaded page."""

    def app(width: int = 1280):
        page = open_page(address, width)
        page.wait_for_selector("#choice button img")
        return page

    return app


def choose(page, number: int) -> None:
    page.locator("#choice button:has(img)").nth(number).click()
    page.wait_for_selector("#reference img")
    page.wait_for_function("document.querySelectorAll('#history li').length > 0")


def ask(page, text: str) -> None:
    page.locator("#text textarea, #text input").fill(text)
    page.click("#search")


def answers(page, count: int = 8) -> None:
    """Wait until the answers are there."""
    page.wait_for_function(f"document.querySelectorAll('#results button img').length == {count}")


def steps(page) -> list[str]:
    return [item.strip() for item in page.locator("#history li").all_inner_texts()]


def wait_for_steps(page, count: int) -> None:
    page.wait_for_function(f"document.querySelectorAll('#history li').length == {count}")


@pytest.mark.parametrize("width", WIDTHS)
def test_load_ask_and_go_on_from_a_result(width, app, searcher):
    page = app(width)
    assert "Choose an image" in page.inner_text("#history")
    choose(page, 0)
    ask(page, "change the color to red")
    answers(page)
    page.wait_for_selector("#experts .bars")
    assert page.locator("#experts .bars i").count() == 5  # the gate and four experts
    labels = page.locator("#results .caption-label").all_inner_texts()
    assert [label.split()[0] for label in labels] == [f"{n}." for n in range(1, 9)]
    similarities = [float(label.split()[1]) for label in labels]
    assert similarities == sorted(similarities, reverse=True)
    assert steps(page) == ["“change the color to red”"]
    picture(page, f"app-{width}")
    page.locator("#results button:has(img)").nth(1).click()
    wait_for_steps(page, 2)
    ask(page, "make it larger")
    answers(page)
    page.wait_for_function(
        "document.querySelector('#history').innerText.includes('make it larger')"
    )
    assert steps(page) == ["“change the color to red”", "“make it larger”"]
    page.click("#undo")
    page.wait_for_function(
        "!document.querySelector('#history').innerText.includes('make it larger')"
    )
    page.click("#undo")
    wait_for_steps(page, 1)
    answers(page)  # those of the first step are back
    assert page.errors == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", WIDTHS)
def test_galleries_are_seen_whole_on_every_screen(width, app):
    page = app(width)
    choose(page, 0)
    ask(page, "is red")
    answers(page)
    page.wait_for_selector("#experts .bars")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for gallery, most in {"results": 4, "choice": 8}.items():
        assert page.evaluate(CUT, f"#{gallery} img, #{gallery} .caption-label") == []
        boxes = [image.bounding_box() for image in page.locator(f"#{gallery} button img").all()]
        columns = len({box["x"] for box in boxes})
        assert columns == most if width == 1280 else 2 <= columns <= most
        assert all(box["width"] >= 70 for box in boxes)


def test_upload_and_bad_uploads(app, tmp_path):
    page = app()
    Image.new("RGB", (60, 50), "teal").save(tmp_path / "mine.png")
    page.set_input_files(
        "#upload input, input#upload, input[type=file]", str(tmp_path / "mine.png")
    )
    wait_for_steps(page, 1)
    ask(page, "is red")
    answers(page)
    before = steps(page)
    for name, message in bad_uploads(tmp_path).items():
        page.set_input_files("#upload input, input#upload, input[type=file]", str(tmp_path / name))
        words = {"notes.txt": "Invalid file type", "large.jpg": "exceed"}.get(name, message)
        page.wait_for_function("words => document.body.innerText.includes(words)", arg=words)
        assert steps(page) == before, name  # nothing is lost
        assert page.locator("#results button img").count() == 8
        page.wait_for_timeout(100)
    ask(page, "is blue")
    page.wait_for_function("document.querySelector('#history').innerText.includes('is blue')")


@pytest.mark.parametrize("width", [1280, 320])
def test_uploads_of_every_shape_keep_their_proportion(width, app, tmp_path):
    page = app(width)
    for number, shape in enumerate(SHAPES, start=1):
        Image.new("RGB", shape, "teal").save(tmp_path / f"{number}.png")
        page.set_input_files(
            "#upload input, input#upload, input[type=file]", str(tmp_path / f"{number}.png")
        )
        wait_for_steps(page, number)
        ask(page, f"is red {number}")
        page.wait_for_function(
            f"document.querySelector('#history').innerText.includes('is red {number}')"
        )
        assert page.evaluate(SQUEEZED, "img") == [], shape
        assert page.evaluate(CUT, "#history img") == [], shape
    assert page.errors == []


def test_an_empty_and_a_long_text(app):
    page = app()
    ask(page, "is red")
    page.wait_for_function("document.body.innerText.includes('there is no reference yet')")
    choose(page, 0)
    ask(page, "   ")
    page.wait_for_function(
        "document.querySelector('#note').innerText.includes('the text is empty')"
    )
    ask(page, "red " * 100)
    answers(page)
    page.wait_for_function(
        "document.querySelector('#note').innerText.includes('more than 77 tokens')"
    )


def test_two_users_at_once_do_not_mix(app):
    first, second = app(), app()
    choose(first, 0)
    choose(second, 3)
    ask(first, "is red")
    ask(second, "is blue")
    answers(first)
    answers(second)
    assert steps(first) == ["“is red”"]
    assert steps(second) == ["“is blue”"]
    third = app()
    assert steps(third) == []


def test_no_file_is_served_but_what_is_shown(address, searcher, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    here = Path(__file__).parent.parent
    paths = [
        tmp_path / "secret.txt",
        here / "README.md",
        here / "src" / "demo_app.py",
        "/etc/passwd",
    ]
    paths += [
        searcher.index.paths[0],
        searcher.index.folder / "index.json",
        f"{here}/src/../README.md",
    ]
    for path in paths:
        for route in ("/gradio_api/file=", "/file=", "/"):
            with pytest.raises(urllib.error.HTTPError) as error:
                urllib.request.urlopen(f"{address}{route}{path}")
            assert error.value.code in (403, 404, 405), (route, path)
