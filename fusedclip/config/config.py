"""``ClipConfig``: the settings of a ``Clipper``, from keywords, a dict, YAML or JSON, under the
names that training frameworks have for them.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fusedclip.backends import select
from fusedclip.clipper import NONFINITE, SCOPES, Clipper
from fusedclip.config import files, values
from fusedclip.monitor import Monitor
from fusedclip.parameters import Parameters
from fusedclip.policies import Policy

# Where 0 and null mean "do not clip": Transformers, TRL and ms-swift; Lightning and older ms-swift;
# DeepSpeed; Megatron and timm (for whom only null does, and 0 would zero the gradients).
_FRAMEWORK_NAMES = ("max_grad_norm", "gradient_clip_val", "gradient_clipping", "clip_grad")

# The threshold of these frameworks (Lightning, timm) is that of another function for some values.
_ALGORITHM_NAMES = ("gradient_clip_algorithm", "clip_mode")
_OTHER_FUNCTIONS = {"value": "fusedclip.clip_grad_value_", "agc": "fusedclip.agc_"}

# Parts of a file that may hold them: ms-swift, Transformers, LightningCLI, accelerate, TRL.
_SECTIONS = ("train_args", "training_args", "trainer", "deepspeed_config", "deepspeed")
_OWN_SECTION = "fusedclip"

# Of each field: checks a value found at a place and returns it in normal form.
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "max_norm": values.threshold,
    "norm_type": values.norm_type,
    "nonfinite": values.choice(*NONFINITE),
    "scope": values.choice(*SCOPES),
    "monitor": values.flag,
    "monitor_window": values.count,
    "backend": values.choice("auto", *select.NAMES),
    "skip_above": values.skip_above,
}
_IN_ANY_FILE = ("max_norm", *_FRAMEWORK_NAMES, *_ALGORITHM_NAMES)
_KNOWN = (*_CHECKS, *_FRAMEWORK_NAMES, *_ALGORITHM_NAMES, *_SECTIONS, _OWN_SECTION)


@dataclass(frozen=True, kw_only=True, eq=False)
class ClipConfig:
    """The settings of a ``Clipper``.

    Args:
        max_norm: the threshold, a number > 0 (``inf`` measures without clipping), or a policy:
            ``AutoClip(…)``, ``ZClip(…)``, ``AdaGC(…)``, ``SkipSpikes(…)``, in files ``zclip`` or
            ``{zclip: {z: 2.5}}``. Each Clipper that is built begins with a memory of its own.
        norm_type, nonfinite, scope, backend: as in ``Clipper``.
        monitor: give the Clipper a ``Monitor``, which remembers ``monitor_window`` steps.
        skip_above: as in ``Clipper``: a number > 0 or a policy, in files as ``max_norm``; null
            leaves out nothing.

    Numbers may be strings, as YAML 1.1 reads ``1e-3``.

    Raises:
        TypeError, ValueError: a setting is wrong; the message says which, where and what is
            expected.

    >>> clipper = ClipConfig(max_norm=1.0).build(model, optimizer)
    >>> clipper = ClipConfig.from_file("run.yaml").build(model, optimizer)
    """

    max_norm: float | Policy
    norm_type: float = 2.0
    nonfinite: str = "propagate"
    scope: str = "global"
    monitor: bool = False
    monitor_window: int = 512
    backend: str = "auto"
    skip_above: float | Policy | None = None

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClipConfig) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(repr(self))

    @classmethod
    def from_dict(
        cls, settings: Mapping[str, Any], *, ignore_unknown: bool = False
    ) -> "ClipConfig":
        """From a mapping, with this class's names or those of a framework.

        The threshold is ``max_norm``, ``max_grad_norm`` (Transformers, TRL, ms-swift),
        ``gradient_clip_val`` (Lightning, older ms-swift), ``gradient_clipping`` (DeepSpeed) or
        ``clip_grad`` (Megatron, timm). Under the frameworks' names 0 and null mean no clipping, as
        they do there, and become ``inf``. It may stand in a section ``train_args``,
        ``training_args``, ``trainer``, ``deepspeed_config`` or ``deepspeed``; everything may stand
        in a section ``fusedclip``.

        ``gradient_clip_algorithm`` (Lightning) and ``clip_mode`` (timm) must be ``norm``.

        Args:
            settings: the mapping.
            ignore_unknown: for a framework's own configuration, most of which is about other
                things: only the names of the threshold and of the algorithm are read, there and in
                the sections above. Other settings (``backend`` there is not ours) must stand in the
                section ``fusedclip``, whose keys are checked as ever.

        Raises:
            TypeError, ValueError: a bad value; an unknown key, with the nearest known one; two
                names of one setting with different values; no threshold at all.
        """
        found: dict[str, tuple[str, Any]] = {}  # field: where it was, value in normal form
        undecided: dict[str, Any] = {}  # thresholds that are null or "auto", by place
        for place, key, value in _ours(settings, "", ignore_unknown):
            if key in _FRAMEWORK_NAMES and (value is None or value == "auto"):
                undecided[place] = value
                continue
            name, checked = _checked(place, key, value)
            before = found.setdefault(name, (place, checked))
            if values.plain(before[1]) != values.plain(checked):
                raise ValueError(
                    f"{before[0]} and {place} are the same setting with different values, "
                    f"{values.plain(before[1])!r} and {values.plain(checked)!r}; keep one of them"
                )
        if "max_norm" not in found:
            found["max_norm"] = ("", _undecided(undecided, settings))
        _check_algorithm(found.pop("algorithm", None), found["max_norm"][1])
        return cls(**{name: value for name, (_, value) in found.items()})

    @classmethod
    def from_kwargs(cls, **settings: Any) -> "ClipConfig":
        """``from_dict`` of the keywords: ``ClipConfig.from_kwargs(max_grad_norm=0.5)``."""
        return cls.from_dict(settings)

    @classmethod
    def from_file(cls, path: str | Path, *, ignore_unknown: bool = False) -> "ClipConfig":
        """``from_dict`` of a YAML (``.yaml``, ``.yml``; needs PyYAML) or JSON (``.json``) file.

        For a framework's own file, such as DeepSpeed's JSON or dumped TrainingArguments, say
        ``ignore_unknown=True``.

        Raises:
            TypeError, ValueError: as ``from_dict``; the message begins with the path.
            ModuleNotFoundError: a YAML file without PyYAML.
        """
        settings = files.read(Path(path), _KNOWN)
        try:
            if not isinstance(settings, Mapping):
                raise TypeError(
                    f"expected a mapping of settings at the top, got {type(settings).__name__}"
                )
            return cls.from_dict(settings, ignore_unknown=ignore_unknown)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for YAML or JSON; ``from_dict`` gives an equal ClipConfig back."""
        return {name: values.plain(getattr(self, name)) for name in _CHECKS}

    def build(
        self,
        model: Parameters,
        optimizer: torch.optim.Optimizer,
        *,
        process_group: Any = None,
        allow_sync: bool = False,
    ) -> Clipper:
        """A ``Clipper`` that is attached: ``optimizer.step()`` clips from now on.

        Args:
            model: whose gradients make up the norm; with ``scope="group"`` those of the optimizer
                do, whose groups are the scopes.
            optimizer: what to attach to.
            process_group: as in ``Clipper``.
            allow_sync: as in ``Clipper.attach``, for what leaves out steps.

        Raises:
            ValueError, RuntimeError: as ``Clipper`` and its ``attach``.
        """
        limit = self.max_norm
        watched = limit if isinstance(limit, float) else math.inf  # a policy's come with each step
        clipper = Clipper(
            optimizer if self.scope == "group" else model,
            _own(limit),
            norm_type=self.norm_type,
            nonfinite=self.nonfinite,
            scope=self.scope,
            monitor=Monitor(watched, self.monitor_window) if self.monitor else False,
            process_group=process_group,
            backend=self.backend,
            skip_above=None if self.skip_above is None else _own(self.skip_above),
        )
        clipper.attach(optimizer, allow_sync=allow_sync)
        return clipper


def _own(limit: float | Policy) -> float | Policy:
    """A policy remembers norms, so each Clipper gets one of its own."""
    return limit if isinstance(limit, float) else dataclasses.replace(limit)


def _ours(
    settings: Mapping[str, Any], where: str, ignore_unknown: bool
) -> Iterator[tuple[str, str, Any]]:
    """(place, key, value) of what is for us, sections included."""
    for key, value in settings.items():
        place = f"{where}{key}"
        if key == _OWN_SECTION or key in _SECTIONS:
            if isinstance(value, Mapping):
                ignore = ignore_unknown and key != _OWN_SECTION
                yield from _ours(value, f"{place}.", ignore)
            elif key == _OWN_SECTION or not ignore_unknown:
                raise TypeError(f"{place}: expected a section with settings, got {value!r}")
        elif key in (_IN_ANY_FILE if ignore_unknown else _KNOWN):
            yield place, key, value
        elif not ignore_unknown:
            raise ValueError(
                f"{place}: unknown setting"
                + (values.suggestion(key, _KNOWN) or f"; known are {', '.join(_KNOWN)}.")
                + " For a framework's own configuration say ignore_unknown=True"
            )


def _checked(place: str, key: str, value: Any) -> tuple[str, Any]:
    """The field that a key is for, and the value in normal form."""
    if key in _ALGORITHM_NAMES:
        return "algorithm", "norm" if value is None else value
    if key in _FRAMEWORK_NAMES:
        return "max_norm", values.number(place, value) or math.inf
    return key, _CHECKS[key](place, value)


def _undecided(places: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
    """The threshold where none was given as a value: ``inf`` when it was given as null."""
    for place, value in places.items():
        if value == "auto":
            raise ValueError(
                f"{place}: 'auto' is filled in by Transformers, from its max_grad_norm, when it "
                "starts DeepSpeed; write the number here"
            )
    if places:
        return math.inf
    names = ("max_norm", *_FRAMEWORK_NAMES)
    hints = (difflib.get_close_matches(name, map(str, settings), n=1, cutoff=0.8) for name in names)
    close = next((hint[0] for hint in hints if hint), None)
    raise ValueError(
        f"no threshold: expected one of {', '.join(names)}"
        + (f"; is {close!r} meant to be one of them?" if close else "")
    )


def _check_algorithm(found: tuple[str, Any] | None, max_norm: Any) -> None:
    """What a framework would do with the threshold must be what a Clipper does."""
    if found is None or found[1] == "norm" or max_norm == math.inf:
        return
    place, algorithm = found
    function = _OTHER_FUNCTIONS.get(algorithm) if isinstance(algorithm, str) else None
    if function is None:
        raise ValueError(f"{place}: expected 'norm', 'value' or 'agc', got {algorithm!r}")
    raise ValueError(
        f"{place}: {algorithm!r} is not clipping by norm, which is what a Clipper does; call "
        f"{function} before optimizer.step() instead"
    )
