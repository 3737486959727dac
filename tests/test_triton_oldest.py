"""The compiled kernels with the oldest Triton that the backend takes.

Its compiler lays tiles out and exchanges sums in other ways than the pinned one, so that registers
may suffice with one and not with the other. ``make test`` installs it apart, into a folder of the
environment; any other version is checked likewise by hand:

    pip install --no-deps --target FOLDER triton==3.7.0
    PYTHONPATH=FOLDER python -m pytest tests/test_triton_compiled.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fusedclip.triton_kernels import interpreted

from fusedclip.backends.triton import OLDEST

_ROOT = Path(__file__).parent.parent
_VERSION = f"{OLDEST[0]}.{OLDEST[1]}"
_FOLDER = Path(sys.prefix) / f"triton-{_VERSION}"

# All targets in one process. A Triton from elsewhere must not pass for it.
_RUN = """
import sys, pytest, triton
assert triton.__version__.startswith(sys.argv[1] + "."), (triton.__version__, triton.__file__)
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", sys.argv[2]]))
"""


@pytest.mark.skipif(interpreted(), reason="the interpreter does not compile")
@pytest.mark.timeout(900)  # one process compiles for all targets
@pytest.mark.skipif(not _FOLDER.exists(), reason=f"{_FOLDER} is missing: make test installs it")
def test_the_compiled_kernels() -> None:
    command = [sys.executable, "-c", _RUN, _VERSION, "tests/test_triton_compiled.py"]
    done = subprocess.run(
        command,
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": str(_FOLDER)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
