"""The search page as a server, over HTTP: whom it answers, what it takes and gives out, and what stays on the disk.

One page is launched for the whole file as a user launches it, in an environment that is set against it.
"""

import contextlib
import http.client
import io
import json
import re
import signal
import socket
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import search
from conftest import CASES, ROOT
from forks import HANG, Script, free_port
from image_search import guard
from image_search.dialogue import MOST_BYTES
from image_search.guard import Hosts, drop_settings, tidy
from image_search.searcher import MOST_CHARACTERS
from test_dialogue import bad_uploads
from test_search import images

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed"),
    pytest.mark.skipif(sys.platform == "win32", reason="signals"),
]
SHORT = 500  # characters of an answer that refuses
KIND = "requests to the page"
LEAKS = re.compile(r"Traceback|File \"|/tmp/|site-packages|Error\(|<_io")


def gradio_sources() -> str:
    folder = Path(find_spec("gradio").origin).parent
    return "\n".join(file.read_text(errors="replace") for file in folder.rglob("*.py"))


def read_of_environment() -> set[str]:
    """The names that Gradio reads from the environment, found in its code."""
    return set(re.findall(r"(?:environ(?:\.get\(|\[)|getenv\()\s*\"(\w+)\"", gradio_sources()))


HOSTILE = {
    "GRADIO_ALLOWED_PATHS": "/,/etc,/tmp",
    "GRADIO_SHARE": "True",
    "GRADIO_MCP_SERVER": "True",
    "GRADIO_SSR_MODE": "True",
    "GRADIO_SERVER_NAME": "0.0.0.0",
    "GRADIO_ROOT_PATH": "http://evil.example",
    "GRADIO_NUM_WORKERS": "2",
    "GRADIO_TEMP_DIR": "/",
    "GRADIO_ANALYTICS_ENABLED": "True",
}


class Served:
    """A page that runs as a process."""

    def __init__(self, index: Path, folder: Path, script: Path = ROOT / "src" / "demo_app.py"):
        self.port = free_port()
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        words = [script, "--index", index, "--port", self.port, "--device", "cpu"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TMPDIR", str(self.temporary))
            for name in read_of_environment():
                if guard.SETTINGS.fullmatch(name):
                    patch.setenv(name, HOSTILE.get(name, "1"))
            self.process = Script(words, folder)
        self.process.wait_for(lambda: f"http://127.0.0.1:{self.port}" in self.process.stderr)

    @property
    def files(self) -> list[Path]:
        """Those that the page has on the disk."""
        return [file for file in self.temporary.rglob("*") if file.is_file()]

    def request(self, method: str, path: str, body=None, headers=(), host=None):
        """(status, text) of an answer. A header may be given twice."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=HANG)
        with contextlib.closing(connection):
            connection.putrequest(method, path, skip_host=True)
            for value in [f"127.0.0.1:{self.port}"] if host is None else host:
                connection.putheader("Host", value)
            for name, value in dict(headers).items():
                connection.putheader(name, value)
            if body is not None:
                connection.putheader("Content-Length", str(len(body)))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace")

    def refuses(self, *words, **how) -> str:
        """A request that is answered by an error, which is short and tells nothing of the machine."""
        status, text = self.request(*words, **how)
        assert 400 <= status < 500, (words, how, status, text[:SHORT])
        assert len(text) <= SHORT
        assert not LEAKS.search(text), text
        CASES[KIND, "refused"] += 1
        return text


class Visitor:
    """What a browser with the page does."""

    def __init__(self, served: Served, session: str = "visitor") -> None:
        self.served = served
        self.session = session
        config = json.loads(served.request("GET", "/config")[1])
        names = {c["id"]: c["props"].get("elem_id") or c["type"] for c in config["components"]}
        self.events = {}
        for event in config["dependencies"]:
            ((component, action),) = event["targets"]
            self.events[names.get(component, "page"), action] = event["id"]

    def message(self, event: tuple[str, str], data: list, selected: int | None = None) -> dict:
        said = {"data": data, "fn_index": self.events[event], "session_hash": self.session}
        if selected is not None:
            said["event_data"] = {"index": selected, "value": None}
        return said

    def send(self, message) -> tuple[int, str]:
        body = message if isinstance(message, bytes) else json.dumps(message).encode()
        return self.served.request(
            "POST", "/gradio_api/queue/join", body, {"Content-Type": "application/json"}
        )

    def results(self) -> list[dict]:
        """What the server says until the event is over."""
        text = self.served.request("GET", f"/gradio_api/queue/data?session_hash={self.session}")[1]
        return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]

    def does(self, *words, **how) -> dict:
        status, text = self.send(self.message(*words, **how))
        assert status == 200, text
        output = next(m["output"] for m in self.results() if m["msg"] == "process_completed")
        assert "data" in output, output
        CASES[KIND, "answered"] += 1
        return output

    def note(self, *words, **how) -> str:
        """The message that the page shows of what cannot be done."""
        return self.does(*words, **how)["data"][5]

    def load(self) -> None:
        self.does(("page", "load"), [])

    def choose(self, number: int = 0) -> dict:
        return self.does(("choice", "select"), [None, None], number)

    def ask(self, text: str) -> dict:
        return self.does(("search", "click"), [None, text])

    def upload(self, name: str, content: bytes) -> str:
        """Where the server put a file."""
        status, text = self.served.request("POST", "/gradio_api/upload", *form([(name, content)]))
        assert status == 200, text
        (path,) = json.loads(text)
        return path

    def use(self, path: str) -> dict:
        file = {"path": path, "orig_name": "x", "meta": {"_type": "gradio.FileData"}}
        return self.does(("upload", "upload"), [None, file])


def form(files: list[tuple[str, bytes]]) -> tuple[bytes, dict[str, str]]:
    """The body and the headers of an upload."""
    parts = []
    for name, content in files:
        head = f'--edge\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
        parts.append(head.encode() + content + b"\r\n")
    body = b"".join(parts) + b"--edge--\r\n"
    return body, {"Content-Type": "multipart/form-data; boundary=edge"}


def png(size: tuple[int, int], mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, 200 if mode == "L" else "teal").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def index(drawn, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    images(folder / "photos", 12)
    words = ["index", "--images", folder / "photos", "--output", folder / "index"]
    words += ["--clip-model-name", drawn / "tiny_clip_vit.pt", "--num-workers", 0]
    search.main(list(map(str, [*words, "--device", "cpu"])))
    return folder / "index"


@pytest.fixture(scope="module")
def served(index, tmp_path_factory):
    served = Served(index, tmp_path_factory.mktemp("page"))
    yield served
    served.process.end()


@pytest.fixture
def visitor(served) -> Visitor:
    visitor = Visitor(served)
    visitor.load()
    return visitor


# Whom it answers

FOREIGN = [
    "evil.example", "evil.example:7860", "localhost.evil.example", "127.0.0.1.evil.example", "127.0.0.1.",
    "evil@127.0.0.1", "127.0.0.1#evil", "127.0.0.1/evil", "10.1.2.3", "[::2]", "[::1", "2130706433", "0x7f000001",
    "127.1", "localhost:x", "local host", "",
]  # fmt: skip
PLACES = [("GET", "/"), ("GET", "/config"), ("POST", "/gradio_api/queue/join")]


@pytest.mark.parametrize("host", sorted(set(FOREIGN) - {"127.0.0.1."}))
def test_a_foreign_host_is_refused_everywhere(host, served):
    for method, place in [*PLACES, ("POST", "/gradio_api/upload"), ("OPTIONS", "/")]:
        served.refuses(method, place, host=[host])


def test_a_request_has_one_host(served):
    served.refuses("GET", "/", host=[])
    served.refuses("GET", "/", host=["127.0.0.1", "evil.example"])


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST.", "127.0.0.1", "[::1]"])
def test_the_pages_own_names_are_answered(host, served):
    for port in ("", f":{served.port}"):
        assert served.request("GET", "/config", host=[host + port])[0] == 200


@given(st.text() | st.from_regex(r"[a-z0-9.\[\]:-]{1,20}", fullmatch=True))
def test_no_other_name_is_the_pages(name):
    bare = re.sub(r":\d+$", "", name).lower().removesuffix(".")
    assert Hosts("127.0.0.1").holds(name) == (bare in {"localhost", "127.0.0.1", "[::1]"})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]"])
def test_a_page_for_other_machines_is_known_by_every_address_and_few_names(host):
    hosts = Hosts(host, ["Photos.example"])
    for name in (
        "192.168.1.9",
        "[fe80::1]:7860",
        "localhost",
        socket.gethostname(),
        "photos.example:80",
    ):
        assert hosts.holds(name), name
    for name in ("evil.example", "photos.example.evil", "2130706433", "127.1", "0x7f.1"):
        assert not hosts.holds(name), name


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "null",
        "",
        "http://127.0.0.1:1",
        "http://localhost",
        "http://[",
        "file://",
    ],
)
def test_a_request_of_another_page_is_refused(origin, served):
    for method, place in [*PLACES, ("POST", "/gradio_api/upload")]:
        served.refuses(method, place, headers={"Origin": origin})


def test_requests_of_the_page_itself_and_of_a_proxys_are_taken(served):
    own = {"Origin": f"http://127.0.0.1:{served.port}"}
    assert served.request("GET", "/config", headers=own)[0] == 200
    hosts = Hosts("127.0.0.1", ["photos.example"])
    assert hosts.is_own_origin("https://photos.example", "127.0.0.1:7860")
    assert not hosts.is_own_origin("https://localhost", "127.0.0.1:7860")


# What it gives out


def addresses_of_gradio() -> list[str]:
    found = re.findall(r"@(?:app|router)\.\w+\(\s*f?\"(/[^\"]*)\"", gradio_sources())
    assert len(found) > 40
    filled = {re.sub(r"{[^}]*}", "x", path) for path in found}
    return sorted(filled | {f"/gradio_api{path}" for path in filled})


def test_only_what_the_page_needs_is_there(served):
    for path in addresses_of_gradio():
        for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
            known = {"GET": guard.GETS, "POST": guard.POSTS}.get(method)
            if known is None or not known.fullmatch(path) or "file=" in path:
                served.refuses(method, path)
    for path in (
        "/docs",
        "/openapi.json",
        "/gradio_api/info",
        "/monitoring",
        "/gradio_api/call/ask",
    ):
        served.refuses("GET", path)


@pytest.mark.parametrize("way", ["/gradio_api/file=", "/static/", "/assets/", "/file=", "/"])
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


def test_what_is_shown_is_given_out(visitor, served):
    output = visitor.does(("more", "click"), [])
    for shown in output["data"][1]:
        assert served.request("GET", f"/gradio_api/file={shown['image']['path']}")[0] == 200


def test_gradio_is_set_by_nothing_in_the_environment(served, monkeypatch):
    harmless = {
        "BROWSER", "CI", "DISPLAY", "HF_TOKEN", "KAGGLE_KERNEL_RUN_TYPE", "PATH", "PYTEST_CURRENT_TEST",
        "SSH_CONNECTION", "SSH_TTY", "WAYLAND_DISPLAY", "HF_HUB_DISABLE_TELEMETRY", "OPENAI_API_KEY",
    }  # fmt: skip
    names = read_of_environment() - harmless
    assert {"GRADIO_ALLOWED_PATHS", "GRADIO_SHARE", "SPACE_ID"} <= names
    for name in names:
        monkeypatch.setenv(name, "1")
    assert names <= set(drop_settings())
    ignored = [line for line in served.process.stderr.splitlines() if "warning" in line]
    assert len(ignored) == 1
    assert "GRADIO_ALLOWED_PATHS" in ignored[0]


# What it takes


def test_an_upload_is_used_and_gone(visitor, served):
    path = visitor.upload("mine.png", png((60, 50)))
    assert Path(path) in served.files
    visitor.use(path)
    assert Path(path) not in served.files
    assert len(visitor.ask("is red")["data"][3]) == 12
    refused = visitor.send(visitor.message(("upload", "upload"), [None, {"path": path}]))
    assert refused == (400, "there is no such upload: upload it again")


def test_uploads_are_limited_before_they_reach_the_disk(served):
    before = sorted(served.files)
    small, nine = png((9, 9)), b"\0" * (9 * 2**20)
    too_many = [
        [(f"{number}.png", nine) for number in range(30)],
        [(f"{number}.png", small) for number in range(2)],
        [(f"{number}.png", small) for number in range(500)],
        [("large.png", b"\0" * (MOST_BYTES + guard.FRAME))],
        [],
    ]
    for files in too_many:
        body, headers = form(files)
        served.refuses("POST", "/gradio_api/upload", body, headers)
    body, headers = form([("a.png", small)])
    for kind in ("", "text/plain", "multipart/form-data", "multipart/form-data; boundary="):
        served.refuses("POST", "/gradio_api/upload", body, {"Content-Type": kind})
    served.refuses("POST", "/gradio_api/upload", body[: len(body) // 2], headers)
    assert sorted(served.files) == before


def test_an_upload_that_breaks_off_leaves_nothing(served):
    before = sorted(served.files)
    body, headers = form([("a.png", b"\0" * 2**20)])
    with socket.create_connection(("127.0.0.1", served.port)) as link:
        head = f"POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
        head += f"Content-Type: {headers['Content-Type']}\r\n\r\n"
        link.sendall(head.encode() + body[: 2**19])
    assert served.request("GET", "/config")[0] == 200
    assert sorted(served.files) == before


def test_bad_uploads_are_named_as_their_user_calls_them(visitor, served, tmp_path):
    names = bad_uploads(tmp_path)
    for name in sorted(set(names) - {"large.jpg"}):  # which does not arrive
        path = visitor.upload(name, (tmp_path / name).read_bytes())
        status, text = visitor.send(visitor.message(("upload", "upload"), [None, {"path": path}]))
        if status == 200:
            text = json.dumps(visitor.results())
            assert name in text
            assert not Path(path).exists()
        assert names[name].removeprefix("is ") in text
        assert not LEAKS.search(text), text
        CASES[KIND, "refused"] += 1


def peak(process: int) -> int:
    """Bytes that a process had in memory at most."""
    status = Path(f"/proc/{process}/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("size", [(1, 17_999), (17_999, 1), (3, 17_999)])
def test_a_long_image_takes_little_memory(size, visitor, served):
    before = peak(served.process.pid)
    visitor.use(visitor.upload("long.png", png(size)))
    assert len(visitor.ask("is red")["data"][3]) == 12
    assert peak(served.process.pid) - before < 150 * 2**20


@pytest.mark.parametrize("length", [MOST_CHARACTERS + 1, 100_000, 5_000_000])
def test_a_long_text_is_refused_shortly(length, visitor):
    visitor.choose()
    said = visitor.message(("search", "click"), [None, "a" * length])
    status, text = visitor.send(said)
    if status == 200:
        text = json.dumps(visitor.results())
        assert f"{MOST_CHARACTERS:,} at most" in text
        assert text.count("aaaa") == 0
    else:
        assert (status, "send less" in text) == (413, True)
        assert length > guard.MOST_MESSAGE
    CASES[KIND, "refused"] += 1


NONSENSE = [
    None, True, -1, -(2**70), 2**31, 2**70, 10**300, 1.5, float("nan"), float("inf"), "", "x", "0", "\0", "é" * 9000,
    [], [[]], [1], [0] * 999, {}, {"index": 0}, {"path": "/etc/passwd"}, {"path": "http://127.0.0.1:1/x.png"},
    {"path": 3}, {"path": "\0"}, {"path": "a" * 5000}, {"path": ".."}, {"path": "/"}, {"__type__": "update"},
    {"path": "/etc/passwd", "is_stream": True, "meta": {"_type": "gradio.FileData"}},
]  # fmt: skip
EVENTS = [
    (("page", "load"), [], None),
    (("more", "click"), [], None),
    (("choice", "select"), [None, None], 0),
    (("results", "select"), [None], 0),
    (("upload", "upload"), [None, {"path": "none"}], None),
    (("search", "click"), [None, "is red"], None),
    (("text", "submit"), [None, "is red"], None),
    (("undo", "click"), [None], None),
]


def forgeries(whole: dict) -> list[dict]:
    """A message with each of its fields, and each part of its data, replaced by nonsense, dropped or doubled."""
    forged = []
    for value in NONSENSE:
        forged += [{**whole, name: value} for name in (*whole, "event_data", "trigger_id")]
        for place in range(len(whole["data"])):
            data = [*whole["data"]]
            data[place] = value
            forged.append({**whole, "data": data})
        forged.append({**whole, "data": [*whole["data"], value]})
        if "event_data" in whole:
            forged.append({**whole, "event_data": {"index": value, "value": value}})
    return forged + [{key: whole[key] for key in whole if key != name} for name in whole]


def test_every_event_is_forged(visitor):
    assert {event for event, _, _ in EVENTS} == set(visitor.events)


@pytest.mark.parametrize(("event", "data", "selected"), EVENTS)
def test_forged_messages_end_in_one_sentence(event, data, selected, visitor, served):
    said = served.process.stderr
    for message in forgeries(visitor.message(event, data, selected)):
        status, text = visitor.send(message)
        if status == 200:  # what it says is possible, as another text
            session = message["session_hash"]
            text = json.dumps(
                Visitor.results(visitor if session == visitor.session else other(visitor, session))
            )
            assert '"process_completed"' in text
            assert '"error"' not in text or "Invalid file type" in text
        else:
            assert status in (400, 413), (message, text)
            assert len(text) <= SHORT
        assert not LEAKS.search(re.sub(r"/tmp/[^\"]*\.webp", "", text)), (message, text[:SHORT])
        CASES[KIND, "answered" if status == 200 else "refused"] += 1
    assert served.process.stderr == said  # no report in the terminal either


def other(visitor: Visitor, session: str) -> Visitor:
    return Visitor(visitor.served, session)


@pytest.mark.parametrize(
    "body", [b"", b"[", b"[" * 100_000, b"null", b"\xff\xfe", b'{"a":' * 50_000, b"NaN"]
)
def test_what_is_no_message_is_refused(body, visitor):
    assert visitor.send(body)[0] == 400
    CASES[KIND, "refused"] += 1


def test_the_page_still_serves(visitor, served):
    """After all that was tried on it."""
    visitor.choose(3)
    assert len(visitor.ask("is red")["data"][3]) == 12
    assert "Traceback" not in served.process.stderr
    assert served.process.stdout == ""


# The end


def test_a_port_in_use_is_said_before_an_address(served, index, tmp_path, start):
    words = ["--index", index, "--port", served.port, "--device", "cpu"]
    process = start(ROOT / "src" / "demo_app.py", *words)
    assert process.wait() == 2
    assert f"--port {served.port}: " in process.stderr
    assert "http://" not in process.stderr


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 0), ("SIGINT", 130), ("SIGHUP", 0)])
def test_nothing_stays_on_the_disk(name, code, index, tmp_path):
    """Uploads and thumbnails go after use, beyond a size, and at every end."""
    bounded = tmp_path / "bounded.py"
    bounded.write_text(
        "import demo_app\n"
        "demo_app.MOST_KEPT, demo_app.TIDIED_EVERY = 200_000, 0.05\n"
        "demo_app.main()\n"
    )
    served = Served(index, tmp_path, script=bounded)
    try:
        visitor = Visitor(served)
        visitor.load()
        visitor.choose()
        for number in range(4):
            visitor.ask(f"is red {number}")
            visitor.does(("undo", "click"), [None])
        visitor.upload("never_used.png", png((50, 50)))
        served.process.wait_for(
            lambda: sum(guard.EMPTY_FILE + file.stat().st_size for file in served.files) <= 200_000
        )
        assert served.files
        served.process.send_signal(getattr(signal, name))
        assert served.process.wait() == code
        assert list(served.temporary.iterdir()) == []
        assert "Traceback" not in served.process.stderr
        assert served.process.stderr.count("\n") <= 3
    finally:
        served.process.end()


def test_the_oldest_files_go_first(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    for number in range(5):
        file = tmp_path / str(number) / "image.webp"
        file.parent.mkdir()
        file.write_bytes(b"\0" * 10_000)
        while file.stat().st_ctime_ns == max(
            (f.stat().st_ctime_ns for f in tmp_path.glob("*/*") if f != file), default=0
        ):
            file.touch()
    tidy(tmp_path, 2 * (10_000 + guard.EMPTY_FILE), 3600)
    assert sorted(f.parent.name for f in tmp_path.glob("*/*")) == ["3", "4"]
    monkeypatch.setattr(guard, "NEW", -1)
    tidy(tmp_path, 2**30, 3600)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["3", "4"]
    tidy(tmp_path, 2**30, -1)
    assert list(tmp_path.glob("*/*")) == []
