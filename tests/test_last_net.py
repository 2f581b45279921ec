"""However a script ends, it says so in one line, with the exit code that belongs to it; a traceback is for --debug."""

import builtins
import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import utils
from conftest import CASES, ROOT, SOAK, one_of_each_kind
from forks import hear_ctrl_c
from test_light_start import SCRIPTS
from test_light_start import run as run_jobs
from utils import REMEDIES, SIGNS, Stopped, UserError, command, printable

SRC = ROOT / "src"


def raised_by_python() -> list[type[BaseException]]:
    """Every exception of Python's own that can be made of a text alone, but for what ends a program on purpose."""
    kinds = [UnicodeError]
    for kind in vars(builtins).values():
        if isinstance(kind, type) and issubclass(kind, Exception):
            takes_more = issubclass(kind, UnicodeError) or kind.__name__ == "ExceptionGroup"
            if not takes_more:
                kinds.append(kind)
    return kinds


@pytest.fixture
def ending(capsys, tmp_path, monkeypatch):
    """Run a script that ends in an exception; returns what it says, and its exit code."""
    monkeypatch.setattr(utils.tempfile, "tempdir", str(tmp_path))

    def ending(error: BaseException, *words: str) -> tuple[str, int]:
        @command
        def main(argv: list[str] | None = None) -> None:
            raise error

        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(list(words))
        return capsys.readouterr().err, stop.value.code

    return ending


TEXTS = ["", "one", "two\nlines", "\x1b[31m", "x" * 10_000]
EXCEPTIONS = [(kind, text) for kind in raised_by_python() for text in TEXTS]


def is_told_as(case: tuple[type[BaseException], str]) -> object:
    """Of one kind, ValueError, every text; of each other kind one."""
    kind, _ = case
    return case if kind is ValueError else kind


@pytest.mark.parametrize(("kind", "text"), one_of_each_kind(EXCEPTIONS, is_told_as))
def test_any_exception_is_one_line(kind, text, ending):
    err, code = ending(kind(text))
    assert len(err.splitlines()) == 1
    assert err.rstrip("\n").isprintable()
    assert len(err) < 1000
    assert code in (1, 2)
    CASES["exceptions", "told in one line"] += 1


@pytest.mark.parametrize(
    "number", one_of_each_kind(sorted(errno.errorcode), lambda number: REMEDIES.get(number))
)
def test_every_refusal_of_the_operating_system_names_its_file(number, ending):
    err, code = ending(OSError(number, os.strerror(number), "/some/file"))
    assert "error: /some/file: " in err
    assert code == 2
    assert REMEDIES.get(number, "check that it exists") in err
    assert len(err.splitlines()) == 1
    CASES["refusals of the operating system", "told in one line"] += 1


MACHINE = [
    MemoryError(),
    MemoryError("Unable to allocate 7.45 TiB for an array"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"
    ),
    RuntimeError("can't start new thread"),
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
    OSError(errno.EMFILE, "Too many open files"),
    FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"),
    OSError(errno.ENOSPC, "No space left on device"),
    BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
    RuntimeError("Could not determine home directory."),
    KeyError("getpwuid(): uid not found: 54321"),
]


@pytest.mark.parametrize("error", MACHINE, ids=lambda error: f"{type(error).__name__} {error}"[:40])
def test_a_limit_of_the_machine_has_a_remedy(error, ending):
    err, code = ending(error)
    assert code == 2
    assert any(remedy in err for remedy in [*REMEDIES.values(), *SIGNS.values()])


def test_a_fault_is_written_down_in_full_without_what_was_typed(ending, tmp_path):
    err, code = ending(KeyError("lost"), "--api-key", "secret-1", "--api-key=secret-2", "secret-3")
    assert code == 1
    (report,) = tmp_path.glob("clip4cir-fault-*.txt")
    assert str(report) in err
    assert "KeyError" in err
    text = report.read_text()
    assert "Traceback" in text
    assert "KeyError: 'lost'" in text
    assert "--api-key" in text
    assert "secret" not in text


def test_debug_shows_the_traceback(ending):
    assert "Traceback" not in ending(KeyError("lost"))[0]
    err, code = ending(KeyError("lost"), "--debug")
    assert "Traceback" in err
    assert code == 1
    err, code = ending(UserError("the file"), "--debug")
    assert "Traceback" in err
    assert err.splitlines()[-1].endswith("error: the file")
    assert code == 2


def test_without_a_temporary_folder_a_fault_is_still_one_line(ending, tmp_path, monkeypatch):
    monkeypatch.setattr(utils.tempfile, "tempdir", str(tmp_path / "nowhere"))
    err, code = ending(KeyError("lost"))
    assert len(err.splitlines()) == 1
    assert "--debug" in err
    assert code == 1


def test_ctrl_c_that_a_package_took_for_something_else(ending):
    for wrapped in (ImportError("numpy.core.multiarray failed to import"), RuntimeError("x")):
        wrapped.__context__ = ValueError()
        wrapped.__context__.__cause__ = KeyboardInterrupt()
        assert ending(wrapped)[1] == 130
    assert ending(KeyboardInterrupt())[1] == 130
    assert ending(Stopped("SIGTERM"))[1] == 0


def test_printable_is_what_a_terminal_shows():
    assert printable("é 中 x") == "é 中 x"
    assert (
        printable("a\nb\r\x1b[0m\udcff\u2028\u202e\x00") == r"a\nb\r\x1b[0m\udcff\u2028\u202e\x00"
    )


def test_names_in_logs_stay_in_their_line(capsys, caplog):
    record = utils.logging.LogRecord("x", 20, "", 0, "read %s, %d", (Path("a\nb\x1b"), 3), None)
    assert utils.OneLine().format(record) == r"read a\nb\x1b, 3"


def run(*words: str, env: dict[str, str] | None = None, **more) -> subprocess.CompletedProcess:
    """A script in a fresh process."""
    return subprocess.run(
        [sys.executable, *words], env=os.environ | (env or {}), capture_output=True, **more
    )


def into_a_closed_pipe(*words: object) -> subprocess.CompletedProcess:
    """As with `| head`, but closed before the script starts, so that it does not matter which is faster."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, *map(str, words)], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    return done


# What a script's end says is `command`'s, which all have.
@pytest.mark.parametrize("script", SCRIPTS if SOAK else ["validate.py"])
def test_help_that_nobody_reads(script):
    done = into_a_closed_pipe(SRC / script, "--help")
    assert done.stderr == ""
    assert done.returncode in (0, 141)  # argparse itself says nothing of what it cannot print


def test_a_reader_that_is_gone_ends_a_script_quietly(drawn):
    done = into_a_closed_pipe(SRC / "check_dataset.py", "--data-root", drawn, "--num-workers", 0)
    assert done.stderr == ""
    assert done.returncode == 141


ALL_HELP = """
import contextlib, importlib, sys
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    with contextlib.suppress(SystemExit):
        importlib.import_module(script.removesuffix(".py")).main()
        raise AssertionError(script)
    print(script, "is done")
"""


def test_without_docstrings_and_in_ascii():
    env = {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(SRC)}
    done = run("-OO", "-c", ALL_HELP, *SCRIPTS, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""
    told = done.stdout.decode("ascii")
    for script in SCRIPTS:
        assert f"usage: {script} " in told
        assert f"{script} is done" in told


def test_what_an_encoding_lacks_is_spelled_out(tmp_path):
    name = str(tmp_path / "größe-中")
    done = run(str(SRC / "compare.py"), name, env={"PYTHONIOENCODING": "latin-1"})
    assert done.returncode == 2
    assert "größe".encode("latin-1") + rb"-\u4e2d" in done.stderr


def test_a_full_device_as_stdout():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, SRC / "validate.py", "--help"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 2
    assert done.stderr.startswith("validate.py: error: No space left on device")


def test_a_closed_stderr_changes_no_refusal(tmp_path):
    line = 'exec "$@" 2>&-'
    words = ["bash", "-c", line, "-", sys.executable, SRC / "compare.py", "nowhere"]
    refused = subprocess.run(words, cwd=tmp_path, capture_output=True)
    assert refused.returncode == 2
    assert refused.stdout == b""  # never among what a script gives


# As a shell closes streams or opens them for nothing: 2>&-, >&-, >&- 2>&-, <&- >&- 2>&-, 2>/dev/full, 2</dev/null
STREAMS = [
    {"stderr": None},
    {"stdout": None},
    {"stdout": None, "stderr": None},
    {"stdin": None, "stdout": None, "stderr": None},
    {"stderr": ("/dev/full", os.O_WRONLY)},
    {"stderr": ("/dev/null", os.O_RDONLY)},
]


def test_closed_streams_change_nothing_that_is_done(drawn, tmp_path):
    check = (
        f"check_dataset.py --dataset CIRR --unofficial --num-workers 1 --data-root {drawn}".split()
    )
    files = [tmp_path / f"{number}.json" for number in range(1 + len(STREAMS))]
    checks = [[[*check, "--write-exclusions", str(file)]] for file in files]
    refused = [[["compare.py", "nowhere"]]] * len(STREAMS)
    streams = [{}, *STREAMS, *STREAMS]
    jobs = run_jobs(tmp_path / "started", *checks, *refused, streams=streams)
    (known, *found), missing = jobs[: len(files)], jobs[len(files) :]
    for file, (done,), (refusal,), closed in zip(files[1:], found, missing, STREAMS, strict=True):
        assert done.code == known[0].code, closed
        assert file.read_bytes() == files[0].read_bytes(), closed
        assert refusal.code == 2, closed
        assert refusal.stdout == "", closed


@pytest.mark.slow
def test_ctrl_c_while_packages_load(tmp_path, drawn):
    """The script tells over a pipe that it begins to load one, and is interrupted there."""
    finder = tmp_path / "finder.py"
    finder.write_text(
        """
import importlib.abc, os, runpy, sys, time
class Tell(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("loading", flush=True)
            time.sleep(600)
sys.meta_path.insert(0, Tell())
sys.path.insert(0, os.path.dirname(sys.argv[1]))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    )
    words = ["--dataset", "CIRR", "--combining-function", "sum", "--data-root", str(drawn)]
    words += ["--clip-model-name", str(drawn / "tiny_clip_vit.pt")]
    process = subprocess.Popen(
        [sys.executable, finder, SRC / "validate.py", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_ctrl_c,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert re.fullmatch(r"validate\.py: interrupted.*\n", err)
