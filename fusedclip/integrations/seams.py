"""Replace functions inside another package: all of them as known, or none.

A ``Seam`` is one function that a framework clips with. Its parameters are compared with those that
the replacement was written for before anything is replaced, so that another version of the
framework keeps its own code, whole.
"""

import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType, ModuleType, TracebackType
from typing import Any

Function = Callable[..., Any]


@dataclass(frozen=True)
class Seam:
    """A function or method to replace, as it is known."""

    module: str
    name: str  # "function" or "Class.method"
    parameters: tuple[str, ...]  # the names of its parameters, in order
    replace: Callable[[Function], Function]  # the original → what takes its place
    needs: tuple[str, ...] = ()  # names in the same module that the replacement relies on
    # Replaced in every module of its package that holds it by name; False: at this place alone.
    everywhere: bool = True


class Seams:
    """What ``patch()`` of an integration returns; as a context manager it is undone at the end."""

    def __init__(
        self, integration: str, seams: Sequence[Seam], kept: frozenset[str] = frozenset()
    ) -> None:
        """``kept`` names references to originals, "module.name", that stay on purpose."""
        self._integration = integration
        self._seams = seams
        self._kept = kept
        self._replaced: list[tuple[Any, str, Function, Function]] = []  # owner, name, old, new
        self._depth = 0

    @property
    def active(self) -> bool:
        return bool(self._replaced)

    def patch(self) -> "Seams":
        """Replace all of them; a second time only the depth of contexts grows."""
        self._depth += 1
        if not self._replaced:
            found = [(seam, *_find(seam)) for seam in self._seams]
            unknown = [f"{seam.module}.{seam.name} ({why})" for seam, _, why in found if why]
            if unknown:
                package = self._seams[0].module.partition(".")[0]
                warnings.warn(
                    f"{self._integration}: nothing was patched, this {package} "
                    f"{_version(package)} clips by itself; not as known: {'; '.join(unknown)}",
                    stacklevel=3,
                )
                return self
            for seam, old, _ in found:
                assert old is not None
                new = seam.replace(old)
                # The public functions are known by their own names and texts.
                if new.__module__ != "fusedclip.functional":
                    new.__name__, new.__qualname__ = old.__name__, old.__qualname__
                    new.__doc__ = old.__doc__
                self._replace(seam, old, new)
        return self

    def stale(self) -> list[str]:
        """Where modules of any package still hold a replaced function: ``"module.attribute"``."""
        return [f"{module.__name__}.{name}" for module, name, _ in self._references()]

    def rebind(self) -> None:
        """Replace it there too."""
        for module, name, new in list(self._references()):
            self._put(module, name, new)

    def _references(self) -> Iterator[tuple[ModuleType, str, Function]]:
        originals = {id(old): new for _, _, old, new in self._replaced}
        for module in list(sys.modules.values()):
            # Only what is already in its dictionary: getattr could trigger lazy imports.
            if isinstance(module, ModuleType) and _package(module) != "fusedclip":
                for name, value in list(vars(module).items()):
                    if id(value) in originals and f"{module.__name__}.{name}" not in self._kept:
                        yield module, name, originals[id(value)]

    def unpatch(self) -> None:
        """Undo every ``patch()``, exactly."""
        self._depth = 0
        while self._replaced:
            owner, name, old, new = self._replaced.pop()
            setattr(owner, name, old)
            # Modules that were imported since hold the replacement by name.
            for module, own_name in _holders(owner, new):
                setattr(module, own_name, old)

    def __enter__(self) -> "Seams":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._depth = max(0, self._depth - 1)
        if self._depth == 0:
            self.unpatch()

    def _replace(self, seam: Seam, old: Function, new: Function) -> None:
        owner, name = _owner(seam.module, seam.name)
        places = [(owner, name), *(_holders(owner, old) if seam.everywhere else ())]
        for place, own_name in dict.fromkeys(places):
            self._put(place, own_name, new)

    def _put(self, owner: Any, name: str, new: Function) -> None:
        self._replaced.append((owner, name, vars(owner)[name], new))
        setattr(owner, name, new)


def _find(seam: Seam) -> tuple[Function | None, str]:
    """The function, or why it is not the one that is known."""
    try:
        owner, name = _owner(seam.module, seam.name)
        function = vars(owner)[name]
        for needed in seam.needs:
            _owner(seam.module, f"{needed}._")
    except (ImportError, AttributeError, KeyError) as error:
        return None, f"not found: {error}"
    parameters = _parameters(function)
    if parameters != seam.parameters:
        return None, f"takes ({', '.join(parameters)}), not ({', '.join(seam.parameters)})"
    return function, ""


def _owner(module: str, name: str) -> tuple[Any, str]:
    """What ``name`` is an attribute of, and the last part of it."""
    owner: Any = importlib.import_module(module)
    *outer, last = name.split(".")
    for part in outer:
        owner = getattr(owner, part)
    return owner, last


def _parameters(function: Any) -> tuple[str, ...]:
    """The names of its parameters; a decorator that hides them is looked through."""
    names = tuple(inspect.signature(function).parameters)
    if names == ("args", "kwargs"):
        cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
        inner = [content for content in cells if isinstance(content, FunctionType)]
        if len(inner) == 1:
            return _parameters(inner[0])
    return names


def _holders(owner: Any, function: Function) -> Iterator[tuple[ModuleType, str]]:
    """The modules of the owner's package that hold ``function`` by name."""
    if not isinstance(owner, ModuleType):
        return
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType) and _package(module) == _package(owner):
            for own_name, value in list(vars(module).items()):
                if value is function:
                    yield module, own_name


def _package(module: ModuleType) -> str:
    return module.__name__.partition(".")[0]


def _version(package: str) -> str:
    return str(getattr(sys.modules.get(package), "__version__", "of unknown version"))
