"""Settings from keywords, a dict, YAML or JSON: ``config`` knows the names, ``values`` checks the
values, ``files`` reads files.
"""

from fusedclip.config.config import ClipConfig

__all__ = ["ClipConfig"]
