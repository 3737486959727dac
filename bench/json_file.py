"""A JSON file that holds a whole result at every moment. Needs no torch."""

import json
import os
from pathlib import Path
from typing import Any


def write_whole(result: Any, path: Path) -> None:
    """Beside the file, then in its place: who is ended in the middle leaves the last one."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(beside, path)
