"""Puts the emulated module in the place of ``fusedclip._C``: ``pytest -p tests.emulator.plugin``.

To be imported before fusedclip. Then CPU tensors are what GPU tensors are elsewhere.
"""

import importlib.util
import os
import sys

_spec = importlib.util.spec_from_file_location(
    "fusedclip._C", os.environ["FUSEDCLIP_EMULATED_MODULE"]
)
assert _spec is not None and _spec.loader is not None
sys.modules["fusedclip._C"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["fusedclip._C"])
