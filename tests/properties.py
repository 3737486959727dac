"""hypothesis, or, where it is not installed, something that skips the tests that use it.

A machine with a GPU may have no network to install it from; the other tests run there all the same.
"""

from collections.abc import Callable
from typing import Any

import pytest

try:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    # Deadlines measure the machine, not the code; the seed is printed on failure.
    settings.register_profile(
        "fusedclip", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    settings.load_profile("fusedclip")
except ImportError:

    class _Absent:
        """Answers every call and every name with itself."""

        def __getattr__(self, name: str) -> "_Absent":
            return self

        def __call__(self, *arguments: Any, **options: Any) -> "_Absent":
            return self

    def given(*strategies: Any, **named: Any) -> Callable[[Callable[..., None]], Any]:
        def skipping(test: Callable[..., None]) -> Any:
            def skipped() -> None:
                pytest.skip("hypothesis is not installed")

            skipped.__name__, skipped.__doc__ = test.__name__, test.__doc__
            return skipped

        return skipping

    def settings(**options: Any) -> Callable[[Any], Any]:
        return lambda test: test

    st = _Absent()

__all__ = ["given", "settings", "st"]
