"""Settings from keywords, a dict, YAML or JSON: ``config`` knows the names, ``values`` checks what
is said under them, ``files`` reads.
"""

from fusedclip.config.config import ClipConfig

__all__ = ["ClipConfig"]
