"""See what clipping does: norms over time, which parameters are large, what to do about it.

``Monitor`` takes the norms as the training makes them (``readback`` brings them to the host without
waiting, ``history`` keeps the last of them), ``summary`` counts, ``advice`` judges, ``picture``
draws, ``sinks`` are where log lines go.
"""

from fusedclip.monitor.advice import Advice, Finding
from fusedclip.monitor.monitor import Monitor
from fusedclip.monitor.summary import Contributor, Scope, Summary

__all__ = ["Advice", "Contributor", "Finding", "Monitor", "Scope", "Summary"]
