"""The search page as a server, over HTTP: whom it answers, what it takes and gives out, and what stays on the disk.

One page is launched for the whole file as a user launches it.
"""

import base64
import contextlib
import functools
import gzip
import http.client
import io
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, features
from PIL.PngImagePlugin import PngInfo

import demo_app
import search
from conftest import CASES, ROOT, SOAK
from forks import HANG, Script, family, free_port, state_of
from image_search import guard
from image_search.batching import Batcher
from image_search.guard import Hosts
from image_search.searcher import LESS, MOST_CHARACTERS, SearchQuery, load_searcher
from image_search.uploads import MOST_BYTES
from runtime import interruption
from settings.groups import PairChoice
from test_search import images
from test_uploads import bad_uploads

http_api = pytest.importorskip("image_search.http_api", reason="FastAPI is not installed")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("fastapi") is None, reason="FastAPI is not installed"),
    pytest.mark.skipif(sys.platform == "win32", reason="signals"),
]
SHORT = 500  # characters of an answer that refuses
KIND = "requests to the page"
LEAKS = re.compile(
    r"Traceback|File \"|/tmp/|/home/|site-packages|Error\(|<_io| object at 0x|"
    + re.escape(str(ROOT))
)
PHOTOS = 12


class Page:
    """A page that runs somewhere."""

    port: int

    def request(self, method: str, path: str, body=None, headers=(), host=None):
        """(status, text) of an answer. A header may be given twice."""
        status, _, content = self.answer(method, path, body, headers, host=host)
        return status, content.decode(errors="replace")

    def answer(self, method: str, path: str, body=None, headers=(), *, host=None):
        """(status, headers, content) of an answer to an address."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=HANG)
        with contextlib.closing(connection):
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for value in [f"127.0.0.1:{self.port}"] if host is None else host:
                connection.putheader("Host", value)
            for name, value in dict(headers).items():
                connection.putheader(name, value)
            if body is not None:
                connection.putheader("Content-Length", str(len(body)))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()

    def refuses(self, *words, **how) -> str:
        """A request that is answered by an error, which is one short sentence and tells nothing of the machine."""
        status, text = self.request(*words, **how)
        assert 400 <= status < 500, (words, how, status, text[:SHORT])
        assert len(text) <= SHORT
        assert not LEAKS.search(text), text
        if text != "Invalid HTTP request received.":  # which uvicorn says itself
            assert set(json.loads(text)) == {"error"}
        CASES[KIND, "refused"] += 1
        return text

    def ask(self, file: tuple[str, bytes] | None = None, **fields: object) -> dict:
        """An answer to a question."""
        status, text = self.request("POST", "/search", *form(file, **fields))
        assert status == 200, text
        CASES[KIND, "answered"] += 1
        return json.loads(text)

    def upload(self, name: str, content: bytes) -> tuple[str, bytes]:
        """What an upload is called from now on, and its small picture."""
        status, text = self.request("POST", "/upload", *form((name, content)))
        assert status == 200, text
        kept = json.loads(text)
        head, _, picture = kept["picture"].partition(",")
        assert head == "data:image/jpeg;base64"
        return kept["upload"], base64.b64decode(picture)

    def refuses_to_ask(self, file: tuple[str, bytes] | None = None, **fields: object) -> str:
        """What is said of a question that cannot be asked."""
        return self.refuses("POST", "/search", *form(file, **fields))

    def link(self, stack: contextlib.ExitStack, sent: bytes = b""):
        """A connection on which something was sent, which lasts as long as the stack."""
        link = stack.enter_context(socket.create_connection(("127.0.0.1", self.port), HANG))
        link.sendall(sent)
        return link


class Served(Page):
    """A page that runs as a process."""

    def __init__(self, index: Path, folder: Path, *flags: str):
        self.port = free_port()
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        script = ROOT / "src" / "demo_app.py"
        words = [script, "--index", index, "--port", self.port, "--device", "cpu", *flags]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TMPDIR", str(self.temporary))
            self.process = Script(words, folder)
        self.process.wait_for(lambda: f"http://127.0.0.1:{self.port}" in self.process.stderr)

    @property
    def files(self) -> list[Path]:
        """Those that the page has on the disk."""
        return [file for file in self.temporary.rglob("*") if file.is_file()]


def form(file: tuple[str, bytes] | None = None, **fields: object) -> tuple[bytes, dict[str, str]]:
    """The body and the headers of a form. A list is a field that is there several times."""
    parts = []
    for name, value in fields.items():
        for each in value if isinstance(value, list) else [value]:
            parts.append(part(f'name="{name}"', str(each).encode()))
    if file is not None:
        parts.append(part(f'name="image"; filename="{file[0]}"', file[1]))
    return joined(parts)


def part(about: str, content: bytes) -> bytes:
    return f"--edge\r\nContent-Disposition: form-data; {about}\r\n\r\n".encode() + content + b"\r\n"


def joined(parts: list[bytes]) -> tuple[bytes, dict[str, str]]:
    body = b"".join(parts) + b"--edge--\r\n"
    return body, {"Content-Type": "multipart/form-data; boundary=edge"}


def png(size: tuple[int, int], mode: str = "RGB") -> bytes:
    return encoded(Image.new(mode, size, 200 if mode == "L" else "teal"), "PNG")


def encoded(image: Image.Image, kind: str, **about) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **about)
    return buffer.getvalue()


def made_index(folder: Path, drawn: Path) -> Path:
    """An index of PHOTOS images, which lie beside it."""
    images(folder / "photos", PHOTOS)
    words = ["index", "--images", folder / "photos", "--output", folder / "index"]
    words += ["--clip-model-name", drawn / "tiny_clip_vit.pt", "--num-workers", 0]
    search.main(list(map(str, [*words, "--device", "cpu"])))
    return folder / "index"


@pytest.fixture(scope="module")
def index(drawn, tmp_path_factory) -> Path:
    return made_index(tmp_path_factory.mktemp("served"), drawn)


@pytest.fixture(scope="module")
def served(index, tmp_path_factory):
    served = Served(index, tmp_path_factory.mktemp("page"), "--api")
    yield served
    served.process.end()


# Whom it answers

FOREIGN = [
    "evil.example", "evil.example:7860", "localhost.evil.example", "127.0.0.1.evil.example", "127.0.0.1.",
    "evil@127.0.0.1", "127.0.0.1#evil", "127.0.0.1/evil", "10.1.2.3", "[::2]", "[::1", "2130706433", "0x7f000001",
    "127.1", "localhost:x", "local host", "",
]  # fmt: skip
PLACES = [("GET", "/"), ("GET", "/health"), ("GET", "/image/0"), ("POST", "/search")]


@pytest.mark.parametrize("host", sorted(set(FOREIGN) - {"127.0.0.1."}))
def test_a_foreign_host_is_refused_everywhere(host, served):
    for method, place in [*PLACES, ("POST", "/upload"), ("OPTIONS", "/")]:
        served.refuses(method, place, host=[host])


def test_a_request_has_one_host(served):
    served.refuses("GET", "/", host=[])
    served.refuses("GET", "/", host=["127.0.0.1", "evil.example"])


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST.", "127.0.0.1", "[::1]"])
def test_the_pages_own_names_are_answered(host, served):
    for port in ("", f":{served.port}"):
        assert served.request("GET", "/health", host=[host + port])[0] == 200


@settings(max_examples=1000 if SOAK else 25)
@given(st.text() | st.from_regex(r"[a-z0-9.\[\]:-]{1,20}", fullmatch=True))
def test_no_other_name_is_the_pages(name):
    bare = re.sub(r":\d+$", "", name).lower().removesuffix(".")
    assert Hosts("127.0.0.1").holds(name) == (bare in {"localhost", "127.0.0.1", "[::1]"})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]"])
def test_a_page_for_other_machines_is_known_by_every_address_and_few_names(host):
    hosts = Hosts(host, ["Photos.example"])
    known = ("192.168.1.9", "[fe80::1]:7860", "localhost", "photos.example:80")
    for name in (*known, socket.gethostname()):
        assert hosts.holds(name), name
    for name in ("evil.example", "photos.example.evil", "2130706433", "127.1", "0x7f.1"):
        assert not hosts.holds(name), name


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "null", "", "http://127.0.0.1:1", "http://localhost", "http://[", "file://"],
)  # fmt: skip
def test_a_request_of_another_page_is_refused(origin, served):
    for method, place in [*PLACES, ("POST", "/upload")]:
        served.refuses(method, place, headers={"Origin": origin})


def test_requests_of_the_page_itself_and_of_a_proxys_are_taken(served):
    own = {"Origin": f"http://127.0.0.1:{served.port}"}
    assert served.request("GET", "/health", headers=own)[0] == 200
    hosts = Hosts("127.0.0.1", ["photos.example"])
    assert hosts.is_own_origin("https://photos.example", "127.0.0.1:7860")
    assert not hosts.is_own_origin("https://localhost", "127.0.0.1:7860")


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_another_page_shows_no_image_of_this_one(site, served):
    """An image on a page is asked for without an origin; where it is of another site, browsers say so."""
    shown = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "no-cors"}
    for method, place in PLACES:
        served.refuses(method, place, headers=shown)
    link = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate"}
    assert served.request("GET", "/?row=1&text=x", headers=link)[0] == 200
    _, headers, _ = served.answer("GET", "/image/0")
    assert headers["cross-origin-resource-policy"] == "same-origin"


# What it gives out

KNOWN = [
    "/", "/page.css", "/page.js", "/figure.js", "/cite.bib", "/health", "/some", "/photo/0", "/image/0",
    "/image/0?size=large",
]  # fmt: skip
EXPLAINED = ["/docs", "/openapi.json"]


def test_every_answer_keeps_the_browser_from_other_hosts(served):
    for path in [*KNOWN, *EXPLAINED, "/nothing"]:
        _, headers, _ = served.answer("GET", path)
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "http" not in policy and "*" not in policy and "unsafe" not in policy
    for name in ("/", "/page.css", "/page.js", "/figure.js", "/docs"):
        content = served.request("GET", name)[1]
        loaded = re.sub(
            r'<a href="https://[^"]+"', "", content
        )  # but for links, which a visitor follows
        assert "://" not in loaded.replace("http://www.w3.org", "")


def test_only_what_is_known_is_there(served):
    for path in [*KNOWN, *EXPLAINED]:
        assert served.request("GET", path)[0] == 200
        for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
            served.refuses(method, path)
    for path in (
        "/config",
        "/gradio_api/info",
        "/file=/etc/passwd",
        "/redoc",
        "/search",
        "/upload",
    ):
        served.refuses("GET", path)
    paths = json.loads(served.request("GET", "/openapi.json")[1])["paths"]
    known = {"/search", "/upload", "/image/{row}", "/photo/{row}", "/some", "/examples", "/health"}
    assert set(paths) == known


def test_without_api_nothing_is_explained(worn):
    for path in EXPLAINED:
        worn.refuses("GET", path)
    assert worn.request("GET", "/health")[0] == 200


@pytest.mark.parametrize("way", ["/image/", "/photo/", "/page.css/", "/page/", "/"])
def test_no_file_is_given_out_but_what_is_shown(way, served, index, tmp_path):
    (tmp_path / "secret.png").write_bytes(png((9, 9)))
    photo = sorted(index.parent.glob("photos/*.png"))[0]
    places = [
        "/etc/passwd",
        ROOT / "README.md",
        index / "index.json",
        photo,
        tmp_path / "secret.png",
    ]
    for place in map(str, places):
        relative = "../" * 12 + place.lstrip("/")
        for path in (place, relative, relative.replace("..", "%2e%2e"), f"/proc/self/root{place}"):
            served.refuses("GET", way + path)
    for path in (
        "%00",
        "/etc/passwd%00.png",
        "a" * 9000,
        "//evil.example/x",
        "http://127.0.0.1:1/x",
    ):
        served.refuses("GET", way + path)


@pytest.mark.parametrize(
    "row", [-1, PHOTOS, 2**31, 2**63, 10**300, "1.5", "nan", "0x1", "", " ", "1/..", "٣٣"]
)
def test_only_rows_of_the_index_are_shown(row, served):
    quoted = str(row).replace(" ", "%20").encode("utf-8").decode("latin-1")
    for way in ("/image/", "/photo/"):
        served.refuses("GET", f"{way}{quoted}".encode("latin-1").decode("ascii", "ignore") or way)
    served.refuses_to_ask(row=row, text="is red")


def test_images_are_small_jpegs_that_are_kept(served):
    _, headers, content = served.answer("GET", "/image/3")
    assert headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(content)).format == "JPEG"
    assert served.answer("GET", "/image/3")[2] == content


def test_what_a_browser_has_is_not_sent_again_and_text_is_compressed(served):
    for path in ("/", "/page.css", "/page.js", "/image/3"):
        _, headers, content = served.answer("GET", path)
        known = {"If-None-Match": headers["etag"]}
        status, _, nothing = served.answer("GET", path, headers=known)
        assert (status, nothing) == (304, b"")
        other = {"If-None-Match": 'W/"0"', "Accept-Encoding": "gzip"}
        status, headers, packed = served.answer("GET", path, headers=other)
        assert status == 200
        if path == "/image/3":
            assert packed == content
        else:
            assert headers["content-encoding"] == "gzip"
            assert len(packed) < len(content) / 2
            assert gzip.decompress(packed) == content
    _, headers, packed = served.answer("GET", "/openapi.json", headers={"Accept-Encoding": "gzip"})
    assert "/search" in json.loads(gzip.decompress(packed))["paths"]


def test_small_answers_are_not_held_back():
    """By Nagle's algorithm, for 40 ms."""
    with contextlib.closing(demo_app.bound_socket("127.0.0.1", 0)) as bound:
        # Which asyncio looks at, and an accepted socket has from the one that listens.
        assert bound.proto == socket.IPPROTO_TCP


# What it answers


def test_an_answer_is_the_searchs(served, index, capsys):
    """The page and search.py ask through the same code."""
    for row in (0, 5):
        found = served.ask(row=row, text="is red", k=4)
        photo = json.loads(served.request("GET", f"/photo/{row}")[1])
        words = ["query", "--index", index, "--image", index.parent / photo["path"], "--json"]
        search.main(list(map(str, [*words, "--text", "is red", "--k", 4, "--device", "cpu"])))
        expected = json.loads(capsys.readouterr().out)
        for mine, theirs in zip(found["results"], expected["results"], strict=True):
            assert mine["similarity"] == pytest.approx(theirs["similarity"], abs=2e-6)
            assert index.parent / mine["path"] == Path(theirs["image"])
            assert mine["name"] == Path(theirs["image"]).name
        assert {name: found[name] for name in ("gate", "experts", "note")} == {
            name: expected[name] for name in ("gate", "experts", "note")
        }


def rows(found: dict) -> list[int]:
    return [int(result["row"]) for result in found["results"]]


def test_a_mixture_goes_from_the_image_to_the_text(served):
    image = served.ask(row=3, mix=0)
    assert rows(image)[0] == 3
    assert image["results"][0]["similarity"] == pytest.approx(1, abs=1e-5)
    assert served.ask(row=3, text="is red", mix=0)["results"] == image["results"]
    text = served.ask(text="is red", mix=1)
    assert served.ask(row=3, text="is red", mix=1)["results"] == text["results"]
    assert (
        served.ask(row=3, text="is red", mix=0.5)["results"]
        == served.ask(row=3, text="is red")["results"]
    )


def test_several_references_are_searched_with_as_their_mean(served, searcher):
    """And one as itself, to the last bit; alone and in a batch."""
    features = [torch.from_numpy(searcher.index.features_of(row)) for row in (3, 5, 8)]
    captions = searcher.pair.encoder.captions(["is red"])
    one, several = (
        SearchQuery(references=references, text="is red", k=PHOTOS)
        for references in (features[:1], features)
    )
    (found,) = searcher.search([one])
    (expected,) = searcher.index.search(
        F.normalize(features[0] + captions, dim=-1).numpy(), PHOTOS, ""
    )
    assert [(each.row, each.similarity) for each in found.results] == [
        (hit.row, hit.similarity) for hit in expected
    ]
    (found,) = searcher.search([several])
    gallery = torch.cat([torch.from_numpy(searcher.index.features_of(n)) for n in range(PHOTOS)])
    query = F.normalize(torch.cat(features).mean(0) + captions[0], dim=-1)
    expected = F.normalize(gallery, dim=-1) @ query
    for each in found.results:
        assert each.similarity == pytest.approx(expected[each.row].item(), abs=1e-5)
    order = [each.row for each in found.results]
    text = SearchQuery(references=[], text="is red", k=PHOTOS, mix=1)
    together = searcher.search([text, several, one])
    assert [each.row for each in together[1].results] == order
    assert (
        rows(served.ask(row=[3, 5, 8], text="is red"))
        == order
        != rows(served.ask(row=3, text="is red"))
    )


def test_references_are_rows_uploads_and_files(served, index):
    photo = json.loads(served.request("GET", "/photo/5")[1])
    file = (photo["name"], (index.parent / photo["path"]).read_bytes())
    upload, _ = served.upload(*file)
    mixes = [
        served.ask(row=[3, 5], text="is red"),
        served.ask(row=3, upload=upload, text="is red"),
        served.ask(file, row=3, upload="", text="is red"),
    ]
    assert rows(mixes[0]) == rows(mixes[1]) == rows(mixes[2])
    assert mixes[1]["results"] == mixes[2]["results"]


def test_a_query_has_so_many_references(served):
    most = json.loads(served.request("GET", "/health")[1])["max_references"]
    assert rows(served.ask(row=list(range(most)), text="is red"))
    said = f"{most + 1} references: send at most {most}"
    assert said in served.refuses_to_ask(row=list(range(most + 1)), text="is red")
    one_more = {"row": list(range(most - 1)), "upload": "x", "text": "is red"}
    assert said in served.refuses_to_ask(("a.png", b"never decoded"), **one_more)


def test_answers_look_less_like_an_image(served, searcher, index):
    features = torch.cat([torch.from_numpy(searcher.index.features_of(n)) for n in range(PHOTOS)])
    gallery = F.normalize(features, dim=-1)
    query = F.normalize(features[3] + searcher.pair.encoder.captions(["is red"])[0], dim=0)
    expected = gallery @ F.normalize(query - LESS * gallery[5], dim=0)
    found = served.ask(row=3, text="is red", less_row=5, k=PHOTOS)
    for result in found["results"]:
        assert result["similarity"] == pytest.approx(expected[int(result["row"])].item(), abs=1e-5)
    photo = json.loads(served.request("GET", "/photo/5")[1])
    upload, _ = served.upload(photo["name"], (index.parent / photo["path"]).read_bytes())
    assert rows(served.ask(row=3, text="is red", less_upload=upload)) == rows(found)
    assert "send one" in served.refuses_to_ask(row=3, text="x", less_row=5, less_upload=upload)


@pytest.mark.parametrize("k", [1, 4, PHOTOS, 100])
def test_the_reference_is_left_out_and_nothing_else(k, served):
    whole = rows(served.ask(row=3, mix=0, k=min(k + 1, 100)))
    assert 3 in whole
    without = rows(served.ask(row=3, mix=0, k=k, without_reference=True))
    assert without == [row for row in whole if row != 3][:k]


@pytest.mark.parametrize("k", [1, 4, PHOTOS])
def test_all_references_are_left_out(k, served):
    asked = {"row": [3, 5, 3], "mix": 0}
    whole = rows(served.ask(**asked, k=PHOTOS))
    assert {3, 5} <= set(whole)
    without = rows(served.ask(**asked, k=k, without_reference=True))
    assert without == [row for row in whole if row not in (3, 5)][:k]


def test_a_photo_of_a_phone_is_asked_with(served):
    pytest.importorskip("pi_heif", reason="pi-heif is not installed")
    upload = ("phone.heic", (Path(__file__).parent / "phone.heic").read_bytes())
    assert len(served.ask(upload, text="is red", k=3)["results"]) == 3


@pytest.mark.parametrize("without", [False, True])
def test_the_place_of_a_target_is_told_beyond_the_answers(without, served):
    asked = {"row": 3, "mix": 0, "without_reference": without}
    whole = rows(served.ask(k=100, **asked))
    for target in (whole[0], whole[-1], 3):
        said = served.ask(k=1, target=target, **asked)
        assert rows(said) == whole[:1]
        assert said["rank"] == (whole.index(target) + 1 if target in whole else None)
    assert served.ask(k=1, target=PHOTOS, **asked)["rank"] is None
    assert served.ask(k=1, **asked)["rank"] is None


def test_an_upload_is_the_row_of_the_same_file(served, index):
    photo = json.loads(served.request("GET", "/photo/3")[1])
    upload = (photo["name"], (index.parent / photo["path"]).read_bytes())
    by_row, by_file = served.ask(row=3, text="is red"), served.ask(upload, text="is red")
    assert rows(by_row) == rows(by_file)


def test_questions_that_come_together_are_answered_each(served):
    alone = {row: rows(served.ask(row=row, text=f"is red {row}")) for row in range(PHOTOS)}
    together = {}

    def ask(row: int) -> None:
        together[row] = rows(served.ask(row=row, text=f"is red {row}"))

    threads = [threading.Thread(target=ask, args=[row]) for row in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
    assert together == alone


# What it takes


def test_uploads_of_new_kinds_are_read(served):
    kinds = {"a.png": "PNG", "a.webp": "WEBP", "a.jpg": "JPEG"}
    if features.check("avif"):
        kinds["a.avif"] = "AVIF"
    for name, kind in kinds.items():
        content = encoded(Image.new("RGB", (60, 50), "teal"), kind)
        upload, small = served.upload(name, content)
        with Image.open(io.BytesIO(small)) as image:
            assert (image.format, image.size) == ("JPEG", (60, 50))
        sent = served.ask((name, content), text="is red")["results"]
        assert len(sent) == PHOTOS
        assert served.ask(upload=upload, text="is red")["results"] == sent


def test_bad_uploads_are_named_as_their_user_calls_them(served, tmp_path):
    for name, message in bad_uploads(tmp_path).items():
        body, headers = form((name, (tmp_path / name).read_bytes()), text="is red")
        for place in ("/search", "/upload"):
            text = served.refuses("POST", place, body, headers)
            if name == "large.jpg":
                assert "larger than 10 MiB" in text or "more than 10 MiB" in text
            else:
                assert message in text
                assert name in text
    assert served.files == []


def test_uploads_are_limited(served):
    small = png((9, 9))
    image = part('name="image"; filename="a.png"', small)
    for parts in ([image] * 5, [image] * 500, [image] * 2 + [part('name="k"', b"1")] * 2):
        served.refuses("POST", "/search", *joined([*parts, part('name="text"', b"x")]))
    served.refuses_to_ask(("large.png", b"\0" * (MOST_BYTES + guard.FRAME)), text="x")
    for parts in ([], [image] * 2):
        assert "send one file" in served.refuses("POST", "/upload", *joined(parts))
    body, headers = form(("a.png", small), text="x")
    for kind in (
        "",
        "text/plain",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "application/json",
    ):
        served.refuses("POST", "/search", body, {"Content-Type": kind})
    served.refuses("POST", "/search", body[: len(body) // 2], headers)
    assert served.files == []


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:1/x.png", "file:///etc/passwd", "/etc/passwd", "data:,x"]
)
def test_no_address_is_fetched_and_no_path_is_read(address, served):
    assert "URLs are not fetched" in served.refuses_to_ask(image=address, text="is red")
    served.refuses_to_ask((address, b""), text="is red")
    served.refuses_to_ask(row=address, text="is red")


def test_an_upload_that_breaks_off_leaves_nothing(served):
    body, headers = form(("a.png", b"\0" * 2**20))
    with socket.create_connection(("127.0.0.1", served.port)) as link:
        head = f"POST /search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
        head += f"Content-Type: {headers['Content-Type']}\r\n\r\n"
        link.sendall(head.encode() + body[: 2**19])
    assert served.request("GET", "/health")[0] == 200
    assert served.files == []


def peak(process: int) -> int:
    """Bytes that a process had in memory at most."""
    status = Path(f"/proc/{process}/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("size", [(1, 17_999), (17_999, 1), (3, 17_999)] if SOAK else [(1, 17_999)])
def test_a_long_image_takes_little_memory(size, served):
    before = peak(served.process.pid)
    assert len(rows(served.ask(("long.png", png(size)), text="is red"))) == PHOTOS
    assert peak(served.process.pid) - before < 150 * 2**20


@pytest.mark.parametrize("length", [MOST_CHARACTERS + 1, 100_000, 5_000_000])
def test_a_long_text_is_refused_shortly(length, served):
    text = served.refuses_to_ask(row=1, text="a" * length)
    assert f"at most {MOST_CHARACTERS:,}" in text or "maximum size" in text
    assert "aaaa" not in text


def test_examples_are_triplets_of_the_index(index, drawn, capsys):
    """Those of other images are refused before the page is served."""
    file = drawn / "triplets_dataset" / "val.jsonl"
    words = ["--index", index, "--device", "cpu", "--port", free_port(), "--examples", file]
    with pytest.raises(SystemExit) as stop:
        demo_app.main(list(map(str, words)))
    assert stop.value.code == 2
    assert (
        f"--examples {file}: none of its triplets has all images in the index"
        in capsys.readouterr().err
    )


def test_an_upload_that_is_not_kept_is_asked_for_again(served):
    status, text = served.request("POST", "/search", *form(upload="x" * 43, text="is red"))
    assert status == 410
    assert "upload it again" in text
    served.refuses_to_ask(upload="x", row=1, text="is red")


def test_what_cannot_be_asked_is_said(served):
    assert "no reference yet" in served.refuses_to_ask(text="is red")
    assert "the text is empty" in served.refuses_to_ask(row=1, text="  ")
    assert "without one" in served.refuses_to_ask(row=1, text="x", lean=0.5)
    assert "--filter is not supported" in served.refuses_to_ask(
        row=1, text="x", filter='path like "a%"'
    )
    note = served.ask(row=1, text="red " * 100)["note"]
    assert "more than 77 tokens" in note


@pytest.mark.parametrize(
    ("text", "is_known"),
    [
        ("is red, no sleeves — in a café", True),
        ("màu đỏ và không có tay áo", False),
        ("أحمر", False),
        ("红色", False),
    ],
)
def test_a_language_that_the_model_does_not_know_is_said(text, is_known, served):
    found = served.ask(row=1, text=text)
    assert len(rows(found)) == PHOTOS
    assert ("into single letters" in found["note"]) == (not is_known)


NONSENSE = [
    "None", "-1", str(-(2**70)), str(2**31), str(2**70), "1" * 5000, "1.5", "nan", "inf", "", "x", "\0", "é" * 9000,
    "[]", "{}", "[1", "true", "/etc/passwd", "http://127.0.0.1:1/x.png", "..", "<b>", "' or 1=1", "%00", "\r\nx: y",
    "{0}", "$HOME", "~", "%s",
]  # fmt: skip
FIELDS = [
    "row", "text", "k", "mix", "lean", "less_row", "without_reference", "distinct", "min_similarity", "target",
    "filter", "image", "server", "__class__", "_charset_", "",
]  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_forged_fields_end_in_an_answer_or_in_one_sentence(name, served):
    said = served.process.stderr
    whole = {"row": 1, "text": "is red", "k": 3}
    parts = [
        part(f'name="{field}"', str(whole[field]).encode()) for field in whole if field != name
    ]
    for value in NONSENSE:
        forged = part(f'name="{name}"', value.encode())
        forms = [[*parts, forged], [forged, forged, *parts], [forged]]
        for fields in forms if SOAK or value == NONSENSE[0] else forms[:1]:
            status, text = served.request("POST", "/search", *joined(fields))
            assert status in (200, 400, 404), (value, status, text[:SHORT])
            if status == 200:
                assert len(json.loads(text)["results"]) <= PHOTOS
            else:
                assert len(text) <= SHORT
            assert not LEAKS.search(text), text[:SHORT]
            CASES[KIND, "answered" if status == 200 else "refused"] += 1
    assert served.process.stderr == said  # no report in the terminal either


BODIES = [
    b"", b"[", b"[" * 100_000, b"null", b"\xff\xfe", b"--edge", b"--edge--", b"--edge\r\n\r\n", b"a=b&" * 9000,
]  # fmt: skip


@pytest.mark.parametrize(
    "kind", ["multipart/form-data; boundary=edge", "application/x-www-form-urlencoded"]
)
def test_what_is_no_form_is_refused(kind, served):
    for body in BODIES:
        served.refuses("POST", "/search", body, {"Content-Type": kind})


def test_the_page_still_serves(served):
    """After all that was tried on it."""
    assert len(rows(served.ask(row=3, text="is red"))) == PHOTOS
    assert "Traceback" not in served.process.stderr
    assert served.process.stdout == ""
    assert served.files == []


# What it withstands


@pytest.fixture(scope="module")
def hurried(searcher) -> Iterator[Page]:
    """A page in this process that decodes no image for long."""
    page = Page()
    with (
        contextlib.closing(Batcher(searcher.search)) as batcher,
        contextlib.closing(http_api.Service(searcher, 12, batcher, seconds=0.3)) as service,
        demo_app.bound_socket("127.0.0.1", 0) as bound,
        demo_app.served(guard.Guard(http_api.build(service, True), Hosts("127.0.0.1")), bound),
    ):
        page.port = bound.getsockname()[1]
        yield page


@pytest.fixture(scope="module")
def searcher(index):
    choice = PairChoice(combining_function=None, clip_path=None, combiner_path=None)
    return load_searcher(index, choice, torch.device("cpu"))


def scans(side: int, count: int) -> bytes:
    """A grey JPEG of side x side pixels whose last scan is there `count` times; each is decoded over all pixels."""
    whole = io.BytesIO()
    Image.new("L", (side, side), 128).save(whole, "JPEG", progressive=True)
    image = whole.getvalue()
    last = image[image.rindex(b"\xff\xda") : -2]
    return image[:-2] + last * count + image[-2:]


@functools.cache
def endless() -> bytes:
    """A JPEG of 250 KB that takes minutes to decode."""
    return scans(6000, 2500)


def fields_in(charset: str) -> tuple[bytes, dict[str, str]]:
    """A form whose text takes minutes to decode in an encoding that takes time."""
    body, headers = form(row=1, text="a" * 2 * 2**20)
    return body, {"Content-Type": f"{headers['Content-Type']}; charset={charset}"}


PLAIN = {"Content-Type": "application/x-www-form-urlencoded"}
HEAVY = {
    "scans": lambda: form(("a.jpg", endless())),
    "padding": lambda: form(("a.jpg", b"\xff\xd8" + b"\xff" * 9_900_000)),
    "punycode": lambda: fields_in("punycode"),
    "undefined": lambda: fields_in("undefined"),
    "idna": lambda: fields_in("idna"),
    "ampersands": lambda: (b"&" * 2_000_000, PLAIN),
    "pairs": lambda: (b"a=&" * 3_000_000, PLAIN),
    "half boundaries": lambda: form(("a.png", b"\r\n--edg" * 1_400_000)),
    "parts": lambda: joined([part('name="a"', b"")] * 150_000),
    "head": lambda: joined([part('name="a"\r\nX: ' + "y" * 9_000_000, b"")]),
    "heads": lambda: joined([b"--edge\r\n" + b"A: b\r\n" * 1_500_000 + b"\r\n\r\n"]),
    "quotes": lambda: joined([part('name="' + '\\"' * 2_000_000 + '"', b"")]),
}


@pytest.mark.parametrize("kind", HEAVY)
def test_a_request_that_takes_long_is_refused(kind, hurried):
    body, headers = HEAVY[kind]()
    hurried.refuses("POST", "/upload", body, headers)
    assert hurried.request("GET", "/health")[0] == 200


@pytest.mark.parametrize("length", [101, 500, 1997])
@pytest.mark.parametrize("letters", ["ab", "!?", "äö"])
def test_a_word_has_a_length(length, letters, served):
    """The time of a tokenizer grows with its square, in the thread that answers everybody."""
    text = letters * (length // 2) + letters[0] * (length % 2)
    assert "100 letters" in served.refuses_to_ask(row=1, text=f"is {text}")
    assert rows(served.ask(row=1, text="是红色的" * 20 + "， " + letters * 50))


# What it tells of the machine


def with_notes(note: str) -> dict[str, bytes]:
    """Images that hold a note, by their names."""
    image = Image.new("RGB", (40, 30), "teal")
    info = PngInfo()
    info.add_text("Comment", note)
    exif = Image.Exif()
    exif[0x9286] = exif[0x010E] = note
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + note.encode()
    every = {"exif": exif, "icc_profile": profile, "xmp": note.encode(), "comment": note.encode()}
    return {
        "a.jpg": encoded(image, "JPEG", **every),
        "a.gif": encoded(image, "GIF", comment=note.encode()),
        "a.png": encoded(image, "PNG", pnginfo=info, exif=exif, icc_profile=profile),
        "a.webp": encoded(image, "WEBP", **every),
        "a.tif": encoded(image, "TIFF", tiffinfo={270: note}, icc_profile=profile),
    }


NOTE = "taken at home in the garden"


def test_small_pictures_hold_pixels_alone(served):
    for name, content in with_notes(NOTE).items():
        assert NOTE.encode() in content
        _, small = served.upload(name, content)
        with Image.open(io.BytesIO(small)) as image:
            assert set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
        assert NOTE.encode() not in small


@pytest.fixture(scope="module")
def worn(drawn, tmp_path_factory):
    """A page whose images have changed since they were indexed: damaged, gone, pipes, folders, with notes."""
    folder = tmp_path_factory.mktemp("worn")
    index = made_index(folder, drawn)
    files = images(folder / "photos", PHOTOS)
    for file in files:
        file.unlink()
    files[0].write_bytes(b"no image")
    files[1].write_bytes(png((9, 9))[:50])
    os.mkfifo(files[2])
    files[3].mkdir()
    files[4].symlink_to("/dev/zero")
    files[5].write_bytes(with_notes(NOTE)["a.jpg"])
    files[6].write_bytes(scans(300, 2))
    files[6].chmod(0)
    with socket.socket(socket.AF_UNIX) as there:
        link = folder / "s"
        there.bind(str(link))
        link.rename(files[7])
    served = Served(index, folder)
    yield served
    served.process.end()


ODD = [
    "0",
    "-1",
    "99",
    "a",
    "",
    "%00",
    "../..",
    "[]",
    "1e9",
    "' or 1",
    "{0}",
    "$HOME",
    "~",
    "%s",
    "é",
]
WAYS = ["/image/", "/photo/", "/some?count=", "/image/0?size=", "/", "/search?row="]


def test_no_answer_tells_of_the_machine(worn, served):
    """Every address with odd values, and questions with each image as it is now."""
    secrets = [str(Path(worn.temporary.parent)), "/tmp", "/home/", str(ROOT), NOTE, "site-packages"]
    answers = []
    for row in range(PHOTOS):
        for path in (f"/image/{row}", f"/image/{row}?size=large", f"/photo/{row}"):
            answers.append(worn.answer("GET", path))
        for fields in ({"text": "is red"}, {"mix": 0}, {"text": "x", "filter": "connect == 1"}):
            answers.append(worn.answer("POST", "/search", *form(row=row, **fields)))
    for value in map(quote, ODD):
        for way in WAYS:
            answers.append(worn.answer("GET", way + value))
    for way in WAYS:
        for method in ("POST", "HEAD", "PUT"):
            answers.append(worn.answer(method, f"{way}0"))
    whole = png((9, 9))
    uploads = [(f"{value}.png", whole[:40]) for value in ODD]
    uploads += [("a.png", content) for content in (b"", b"x", whole)]
    uploads += [("a.jpg", whole[:40]), ("a", whole[:40])]
    for upload in uploads:
        answers.append(worn.answer("POST", "/upload", *form(upload)))
    for path in ("/", "/health", "/some?count=100", "/page.js"):
        answers.append(worn.answer("GET", path))
    for path in ("/docs", "/docs?x=0", "/openapi.json"):
        answers.append(served.answer("GET", path))
    for status, headers, content in answers:
        assert status < 500 or status == 503, worn.process.stderr
        told = content.decode(errors="replace") + str(headers)
        for secret in secrets:
            assert secret not in told, told[:SHORT]
        assert "server" not in {name.lower() for name in headers}
        CASES[KIND, "refused" if status >= 400 else "answered"] += 1
    assert "Traceback" not in worn.process.stderr


def test_an_image_that_is_no_file_any_more_is_asked_with_by_its_features(worn):
    """A pipe is never opened, which would wait for ever; what is damaged cannot be asked with."""
    for row, photo in (
        (row, json.loads(worn.request("GET", f"/photo/{row}")[1])) for row in range(PHOTOS)
    ):
        number = int(Path(photo["name"]).stem)
        if number in (0, 1):
            assert "can no longer be decoded" in worn.refuses_to_ask(row=row, text="is red")
        elif number != 6:
            assert rows(worn.ask(row=row, text="is red"))


# The end


HALF = b"POST /search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n\r\n1234"


def test_the_page_ends_whatever_is_under_way(worn):
    """Images that take minutes, requests that never end, connections that say nothing; and no process is left."""
    process = worn.process
    body = form(("a.jpg", endless()))
    before = computed(process.pid)
    threads = []
    with contextlib.ExitStack() as links:
        for _ in range(10):
            worn.link(links)
            worn.link(links, HALF)
        for _ in range(4):
            threads.append(threading.Thread(target=attack_until_the_end, args=[worn, *body]))
            threads[-1].start()
        process.wait_for(
            lambda: sum(now - before[of] > 0.2 for of, now in computed(process.pid).items()) >= 2
        )
        family_of_it = family(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
        for thread in threads:
            thread.join(HANG)
    while any(state_of(member) != "Z" for member in family_of_it):
        time.sleep(0.01)
    assert worn.files == []
    assert "Traceback" not in process.stderr
    assert process.stderr.endswith("start it again with the same command\n")


def attack_until_the_end(page: Page, body: bytes, headers: dict[str, str]) -> None:
    with contextlib.suppress(OSError, http.client.HTTPException):
        page.request("POST", "/search", body, headers)


def computed(process: int) -> dict[int, float]:
    """For how many seconds each process below one has computed."""
    seconds: dict[int, float] = defaultdict(float)
    for member in family(process)[1:]:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{member}/stat").read_text().rsplit(")", 1)[1].split()
            seconds[member] = int(fields[11]) / os.sysconf("SC_CLK_TCK")
    return seconds


def test_a_port_in_use_is_said_before_an_address(served, index, start):
    words = ["--index", index, "--port", served.port, "--device", "cpu"]
    process = start(ROOT / "src" / "demo_app.py", *words)
    assert process.wait() == 2
    assert f"--port {served.port}: " in process.stderr
    assert "http://" not in process.stderr


def test_nothing_stays_on_the_disk(served):
    """Uploads are never there, also not after Ctrl+C."""
    served.ask(("mine.png", png((900, 900)) + b"\0" * 2**21), text="is red")
    assert served.files == []
    said = served.process.stderr
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait() == 130
    assert served.files == []
    assert {path.name.partition("_")[0] for path in served.temporary.iterdir()} <= {"torchinductor"}
    assert "Traceback" not in served.process.stderr
    assert served.process.stderr.count("\n") - said.count("\n") <= 1


def test_a_closed_terminal_ends_the_page_too(monkeypatch):
    """Unless `nohup` has it ignored."""
    assert set(interruption.heeded_endings()) == {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)
    assert interruption.heeded_endings() == []
