"""Scripts as processes of their own: fresh ones, or forked from one that has the packages loaded.

A fork costs a tenth of a second, where a fresh process loads packages for four. It has a process group, an environment,
signals and an exit code of its own like a fresh one, and torchrun's workers are its children.
"""

import contextlib
import gc
import importlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path

from reports import run_page

ROOT = Path(__file__).parent.parent
SOURCES = [str(ROOT / "tests"), str(ROOT / "src")]
HANG = (
    900  # seconds after which a test gives up on what must happen; how busy a machine is takes less
)
PACKAGES = ["torch", "torchvision", "clip", "pandas", "torch.distributed.run"]
SCRIPTS = ["clip_fine_tune", "combiner_train", "validate", "cirr_test_submission"]
LOADED_BY_SCRIPTS = ["evaluation.submit", "training.stage1", "training.stage2", "training.trainer"]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([*PACKAGES, *SCRIPTS, *LOADED_BY_SCRIPTS, "kills"])


def warm_up() -> None:
    """Start what processes are forked from, if it is not there yet. It loads, and computes nothing."""
    before = os.environ.copy()
    os.environ |= {
        "PYTHONPATH": os.pathsep.join(SOURCES),
        "OMP_NUM_THREADS": "1",
    }  # for that process, and no fresh one
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def cool_down() -> None:
    """End what processes are forked from, so that what they cost is known to who started the tests."""
    server = forkserver._forkserver
    if server._forkserver_pid is not None:
        os.kill(server._forkserver_pid, signal.SIGTERM)
        server._stop()


def forked(target: Callable, *args: object) -> multiprocessing.Process:
    """A started fork that calls a function."""
    warm_up()
    process = CONTEXT.Process(target=target, args=args)
    process.start()
    return process


class Script:
    """A command of Python as the leader of a process group, its output in files.

    Args:
        words: what follows `python` on a command line.
        folder: where the files of its output lie.
        fresh: whether nothing is loaded when it begins.
        hold: an epoch at which a forked training waits until it is killed or told to stop.
    """

    def __init__(
        self, words: list[object], folder: Path, fresh: bool = False, hold: int | None = None
    ) -> None:
        self.files = [folder / "stdout", folder / "stderr"]
        for file in self.files:
            file.touch()
        words, outputs = list(map(str, words)), list(map(str, self.files))
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if fresh:
            assert hold is None
            with contextlib.ExitStack() as stack:
                out, err = (stack.enter_context(open(file, "wb")) for file in outputs)
                self._process = subprocess.Popen(
                    [sys.executable, *words],
                    cwd=ROOT,
                    stdout=out,
                    stderr=err,
                    env=environment,
                    start_new_session=True,
                    preexec_fn=hear_ctrl_c,
                )
        else:
            environment |= {} if hold is None else {HOLD: str(hold)}
            self._process = forked(lead, words, environment, outputs)
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, or minus the signal that it died of; None while it runs."""
        return (
            self._process.poll()
            if isinstance(self._process, subprocess.Popen)
            else self._process.exitcode
        )

    @property
    def stdout(self) -> str:
        return self.files[0].read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return self.files[1].read_text(errors="replace")

    def wait(self) -> int:
        """Until it ends; its exit code."""
        if isinstance(self._process, subprocess.Popen):
            return self._process.wait(HANG)
        self._process.join(HANG)
        assert self.returncode is not None, f"it does not end: {self.stderr[-3000:]}"
        return self.returncode

    def wait_for(self, happened: Callable[[], bool]) -> None:
        """Until something has happened, which must be before it ends."""
        deadline = time.monotonic() + HANG
        while not happened():
            assert self.returncode is None, self.stderr[-3000:]
            assert time.monotonic() < deadline, f"nothing happens: {self.stderr[-3000:]}"
            time.sleep(0.02)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def end(self) -> None:
        """Kill it with its group and all that it started, if any of them still run."""
        for member in family(self.pid) if self.returncode is None else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(member, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()


def hear_ctrl_c() -> None:
    """What a shell starts in the background ignores it, and so would all that this starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


# In a fork

HOLD = "TEST_HOLDS_AT_EPOCH"


def lead(words: list[str], environment: dict[str, str], outputs: list[str]) -> None:
    """A new process group's leader, which runs a command of Python."""
    os.setsid()
    with open(outputs[0], "wb") as out, open(outputs[1], "wb") as err:
        redirect(out, err)
    become(words, environment)


def redirect(*files) -> None:
    """Write to files what goes to stdout and stderr."""
    for number, file in enumerate(files, start=1):
        if file is not None:
            os.dup2(file.fileno(), number)


def become(words: list[str], environment: dict[str, str]) -> None:
    """What `python WORDS` does in an environment."""
    gc.freeze()  # trainings collect often, and would go through all that is loaded each time
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    multiprocessing.set_start_method(
        None, force=True
    )  # a fresh process's own, which starts the workers of loaders
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run_page.can_draw = lambda: False  # as in tests that run in process, see conftest.py
    sys.stdout.reconfigure(line_buffering=True)  # torchrun wants its workers' output unbuffered
    if HOLD in environment:
        hold_at(int(environment[HOLD]))
    if words[:2] == ["-m", "torch.distributed.run"]:
        fork_workers()
        importlib.import_module(words[1]).main(words[2:])
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")


def hold_at(epoch: int) -> None:
    """A training waits at an epoch until it is killed or told to stop, however late that comes."""
    from training.trainer import Trainer

    real = Trainer.save_if_due

    def save_if_due(trainer, **kwargs):
        while trainer.progress.epoch >= epoch and not trainer.autosave.stop.signal_name():
            time.sleep(0.02)
        return real(trainer, **kwargs)

    Trainer.save_if_due = save_if_due


def fork_workers() -> None:
    """Let torchrun fork its workers, which it would start fresh."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    def start(handler: SubprocessHandler, args: tuple, environment: dict[str, str]) -> Worker:
        assert args[:2] == (sys.executable, "-u"), args
        return Worker(list(args[2:]), environment, handler._stdout, handler._stderr)

    assert hasattr(SubprocessHandler, "_popen")
    SubprocessHandler._popen = start


class Worker:
    """What torchrun uses of subprocess.Popen, of a fork of torchrun itself."""

    def __init__(self, words: list[str], environment: dict[str, str], stdout, stderr) -> None:
        self.args, self.returncode = words, None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(words, environment, stdout, stderr)

    def _run(self, words: list[str], environment: dict[str, str], *files) -> None:
        code = 1
        try:
            os.setsid()
            close_sockets()
            redirect(*files)
            become(words, environment)
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if found else None
        return self.returncode

    def wait(self, timeout: float = HANG) -> int:
        """Until it ends: ten times as long as torchrun says, whose half a minute may be short on a busy machine."""
        deadline = time.monotonic() + 10 * timeout
        while self.poll() is None:
            if time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        return self.returncode


def close_sockets() -> None:
    """Close the connections of the process that was forked, which a fresh one would not have."""
    for link in list(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(OSError):  # the listing's own
            if str(link.readlink()).startswith("socket:"):
                os.close(int(link.name))


# All processes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun(processes: int) -> list[str]:
    """Python's arguments before a script that several processes run."""
    return [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(processes),
        "--master-port",
        str(free_port()),
    ]


def state_of(process: int) -> str:
    """The letter of a process's state; Z, of one that only waits to be asked how it ended, where it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    return "Z"


def family(process: int) -> list[int]:
    """A process and all that descend from it and run."""
    parents = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it is gone
            state, parent = file.read_text().rsplit(")", 1)[1].split()[:2]
            parents[int(file.parent.name)] = int(parent) if state != "Z" else 0
    found = [process]
    for member in found:  # grows
        found += [child for child, parent in parents.items() if parent == member]
    return found
