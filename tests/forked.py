"""Python processes that find torch imported: forks of one that has done it.

``python("-m", "fusedclip", "doctor")`` runs what ``[sys.executable, "-m", "fusedclip", "doctor"]``
does, some seconds sooner: the import of torch takes longer than what most tests start a process
for. A test of what happens before or during that import starts a Python of its own, and so does one
command of each kind, as a user's does. Variables that are read as torch is loaded (``OMP_…``) are
those of the tests.

The origin of the forks is started when it is first asked, once for each process of pytest, and ends
with it. It has one thread of Python, which forks, waits for the fork and says how it ended.
"""

import atexit
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parent.parent


class Origin:
    """A process that has imported ``modules`` and forks.

    Args:
        modules: imported in this order.
        environment: of the process and, unless they are given another, of its forks; by default
            that of the tests.
    """

    def __init__(self, *modules: str, environment: Mapping[str, str] | None = None) -> None:
        self.environment = os.environ if environment is None else environment
        self._modules = modules
        self._process: subprocess.Popen[str] | None = None
        atexit.register(self.end)

    def python(
        self,
        *arguments: str | Path,
        cwd: str | Path = _ROOT,
        env: Mapping[str, str] | None = None,
        check: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """As ``subprocess.run([sys.executable, *arguments], capture_output=True, text=True, …)``.

        The options ``-u`` and ``-W ignore`` are known, then ``-c``, ``-m`` or a file.
        """
        words = [str(word) for word in arguments]
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            request = {
                "arguments": words, "cwd": str(cwd),
                "environment": {**(self.environment if env is None else env)},
                "out": str(out), "err": str(err),
            }  # fmt: skip
            code = self._ask(request)
            texts = [file.read_text(errors="replace") for file in (out, err)]
        done = subprocess.CompletedProcess([sys.executable, *words], code, *texts)
        if check:
            done.check_returncode()
        return done

    def end(self) -> None:
        """End the process, and with it a fork that still runs."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        if process.poll() is None and not _ends_soon(process):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _ask(self, request: Mapping[str, Any]) -> int:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.forked", *self._modules],
                cwd=_ROOT, env=self.environment, text=True, start_new_session=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            return int(self._process.stdout.readline())
        except BaseException:  # pytest's limit, for one: the next test gets another process
            self.end()
            raise


def _ends_soon(process: subprocess.Popen[str]) -> bool:
    try:
        process.wait(1.0)
    except subprocess.TimeoutExpired:
        return False
    return True


python = Origin("torch").python


def _serve() -> dict[str, Any] | None:
    """Fork for each request; returns the request in the fork, and None at the end."""
    gc.freeze()  # a fork that ends would otherwise copy nearly every page
    for line in sys.stdin:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of native threads, which torch has and does not use
            fork = os.fork()
            if fork == 0:
                return dict(json.loads(line))
        _, status = os.waitpid(fork, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


def _become(request: Mapping[str, Any]) -> None:
    """What a new Python has: folder, variables, standard streams; then the program."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for number, (file, mode) in enumerate(
        [(os.devnull, os.O_RDONLY), (request["out"], os.O_WRONLY), (request["err"], os.O_WRONLY)]
    ):
        opened = os.open(file, mode | (os.O_CREAT if number else 0))
        os.dup2(opened, number)
        os.close(opened)
    words = list(request["arguments"])
    while words[0] in ("-u", "-W"):
        if words.pop(0) == "-W":
            warnings.simplefilter(words.pop(0))
    _run(*words)


def _run(kind: str, *words: str) -> None:
    own_path = sys.path[1:]  # without this program's folder
    if kind == "-m":
        sys.argv, sys.path = [*words], [os.getcwd(), *own_path]
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv, sys.path = ["-c", *words[1:]], ["", *own_path]
        exec(compile(words[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv, sys.path = [kind, *words], [str(Path(kind).parent.resolve()), *own_path]
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    for module in sys.argv[1:]:
        __import__(module)
    request = _serve()
    if request is not None:  # the fork: it ends as any program does, at the end of this file
        _become(request)
