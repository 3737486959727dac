"""The compiled kernels with every Triton that the backend takes beside the pinned one.

Their compilers lay tiles out and exchange sums in other ways, so that registers may suffice with
one and not with the other. Each version is installed apart, into a folder of the environment: the
oldest by ``make test``, the others by ``make tritons``.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fusedclip.triton_kernels import interpreted

from fusedclip.backends.triton import OLDEST

_ROOT = Path(__file__).parent.parent
_VERSIONS = [f"{OLDEST[0]}.{OLDEST[1]}", "3.7", "3.8"]

# All targets in one process. A Triton from elsewhere must not pass for it.
_RUN = """
import sys, pytest, triton
assert triton.__version__.startswith(sys.argv[1] + "."), (triton.__version__, triton.__file__)
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", sys.argv[2]]))
"""


@pytest.mark.skipif(interpreted(), reason="the interpreter does not compile")
@pytest.mark.timeout(900)  # one process compiles for all targets
@pytest.mark.parametrize("version", _VERSIONS)
def test_the_compiled_kernels(version: str) -> None:
    folder = Path(sys.prefix) / f"triton-{version}"
    if not folder.exists():
        installs = "make test" if version == _VERSIONS[0] else "make tritons"
        pytest.skip(f"{folder} is missing: {installs} installs it")
    command = [sys.executable, "-c", _RUN, version, "tests/test_triton_compiled.py"]
    done = subprocess.run(
        command,
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
