"""``fusedclip.integrations.seams``: all functions as known are replaced, or none; and put back."""

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from fusedclip.integrations.seams import Seam, Seams

_FUNCTIONS = "framework.functions"
_ENGINE = "framework.engine"


def _hidden(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator that does not say what it wraps."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapped


class _Engine:
    @_hidden
    def step(self, scale: float = 1.0) -> str:
        return f"step {scale}"


def norm(tensors: Any, order: float = 2) -> str:
    """The framework's own."""
    return f"norm {order}"


@pytest.fixture(autouse=True)
def framework(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """A package of three modules, one of which imported ``norm`` by name; and somebody else's."""
    names = ("framework", _FUNCTIONS, _ENGINE, "framework.optimizer", "elsewhere")
    made = {name: ModuleType(name) for name in names}
    made["framework"].__path__ = []
    made["framework"].__version__ = "1.2"
    made[_FUNCTIONS].norm = norm
    made[_ENGINE].Engine = type("Engine", (), dict(vars(_Engine)))
    made["framework.optimizer"].imported_norm = norm
    made["elsewhere"].norm = norm
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield made


def _louder(original: Callable[..., Any]) -> Callable[..., Any]:
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return f"{original(*args, **kwargs)}!"

    return replacement


def _seams(*more: Seam) -> Seams:
    own = (
        Seam(_FUNCTIONS, "norm", ("tensors", "order"), _louder),
        Seam(_ENGINE, "Engine.step", ("self", "scale"), _louder),
    )
    return Seams("test.integration", [*own, *more])


def _state(framework: dict[str, ModuleType]) -> list[Any]:
    return [
        framework[_FUNCTIONS].norm,
        framework["framework.optimizer"].imported_norm,
        framework["elsewhere"].norm,
        vars(framework[_ENGINE].Engine)["step"],
    ]


def test_functions_methods_and_imported_names(framework: dict[str, ModuleType]) -> None:
    before = _state(framework)
    engine = framework[_ENGINE].Engine()
    seams = _seams()
    with seams.patch():
        assert framework[_FUNCTIONS].norm([], order=3) == "norm 3!"
        assert framework["framework.optimizer"].imported_norm([]) == "norm 2!"
        assert engine.step(4) == "step 4!"  # an instance that was there before
        assert framework["elsewhere"].norm is norm, "not the framework's"
        assert framework[_FUNCTIONS].norm.__name__ == "norm"
        assert framework[_FUNCTIONS].norm.__doc__ == "The framework's own."
    assert _state(framework) == before


def test_twice_is_once(framework: dict[str, ModuleType]) -> None:
    before = _state(framework)
    seams = _seams()
    with seams.patch():
        once = _state(framework)
        with seams.patch():
            assert _state(framework) == once
        assert _state(framework) == once
    assert _state(framework) == before
    seams.patch()
    seams.patch()
    seams.unpatch()
    seams.unpatch()
    assert _state(framework) == before


def test_an_exception_undoes_it(framework: dict[str, ModuleType]) -> None:
    before = _state(framework)
    with pytest.raises(KeyError), _seams().patch():
        raise KeyError
    assert _state(framework) == before


def test_a_name_imported_while_patched(framework: dict[str, ModuleType]) -> None:
    with _seams().patch():
        framework["framework.optimizer"].another = framework[_FUNCTIONS].norm
    assert framework["framework.optimizer"].another is norm


@pytest.mark.parametrize(
    ("seam", "complaint"),
    [
        (Seam("framework.gone", "norm", (), _louder), "framework.gone.norm (not found: No module"),
        (Seam(_FUNCTIONS, "scale", (), _louder), "framework.functions.scale (not found: 'scale')"),
        (Seam(_ENGINE, "Trainer.step", ("self",), _louder), "Trainer.step (not found: module"),
        (Seam(_FUNCTIONS, "norm", ("tensors",), _louder),
         "norm (takes (tensors, order), not (tensors))"),
        (Seam(_ENGINE, "Engine.step", ("self",), _louder),
         "Engine.step (takes (self, scale), not (self))"),
        (Seam(_FUNCTIONS, "norm", ("tensors", "order"), _louder, needs=("group_of",)),
         "norm (not found: module 'framework.functions' has no attribute 'group_of')"),
    ],
    ids=["module", "function", "class", "parameters", "hidden parameters", "what it needs"],
)  # fmt: skip
def test_one_unknown_function_and_nothing_is_replaced(
    framework: dict[str, ModuleType], seam: Seam, complaint: str
) -> None:
    before = _state(framework)
    seams = _seams(seam)

    def patch() -> Seams:  # as an integration's patch() calls it
        return seams.patch()

    with pytest.warns(UserWarning) as caught, patch():
        assert _state(framework) == before
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "test.integration: nothing was patched, this framework 1.2 clips by itself" in message
    assert complaint in message
    assert caught[0].filename == __file__
    assert _state(framework) == before
