"""The values of a configuration: each function checks one that was found at a place, such as
``train_args.max_grad_norm``, and returns it in normal form.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fusedclip.checks import checked_norm_type
from fusedclip.policies import POLICIES, Policy


def suggestion(word: object, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(word), known, n=1, cutoff=0.7)
    return f"; did you mean {close[0]!r}?" if close else ""


def number(place: str, value: Any) -> float:
    """>= 0; strings too, because YAML 1.1 reads ``1e-3`` as one."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError(f"{place}: expected a number, got {value!r}")
    try:
        result = float(value)
    except ValueError:
        raise ValueError(f"{place}: expected a number, got {value!r}") from None
    if not result >= 0:
        raise ValueError(f"{place}: expected a number >= 0, got {value!r}")
    return result


def threshold(place: str, value: Any) -> float | Policy:
    """Of fusedclip's own name: a number > 0 or a policy."""
    if isinstance(value, Policy):
        return value
    if isinstance(value, Mapping) or (isinstance(value, str) and not _is_number(value)):
        return _policy(place, value)
    limit = 0.0 if value is None else number(place, value)
    if limit == 0:
        raise ValueError(
            f"{place}: expected a number > 0 or a policy, got {value!r}; for no clipping write "
            "inf, which measures only (0 and null mean that under the frameworks' names, such as "
            "max_grad_norm; to clip_ a threshold of 0 means that every gradient becomes 0)"
        )
    return limit


def skip_above(place: str, value: Any) -> float | Policy | None:
    """A number > 0, a policy that leaves out steps, or nothing."""
    if value is None:
        return None
    limit = threshold(place, value)
    if isinstance(limit, Policy) and not limit.may_skip:
        skipping = tuple(name for name, kind in POLICIES.items() if kind.may_skip)
        raise ValueError(
            f"{place}: expected a number > 0 or a policy that leaves out steps {skipping}, got "
            f"{type(limit).__name__}, which clips; give it as max_norm"
        )
    return limit


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _policy(place: str, value: str | Mapping[str, Any]) -> Policy:
    """``zclip``, or ``{zclip: {z: 2.5}}``."""
    section = {value: None} if isinstance(value, str) else value
    if len(section) != 1:
        raise ValueError(
            f"{place}: expected a number or one policy such as {{zclip: {{z: 2.5}}}}, got "
            f"{dict(section)!r}"
        )
    [(name, arguments)] = section.items()
    if name not in POLICIES:
        raise ValueError(
            f"{place}: expected a number or one of the policies {tuple(POLICIES)}, got "
            f"{name!r}{suggestion(name, tuple(POLICIES))}"
        )
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise TypeError(f"{place}.{name}: expected its arguments as a mapping, got {arguments!r}")
    kinds = {f.name: f.type for f in dataclasses.fields(POLICIES[name]) if f.init}
    for key in arguments:
        if key not in kinds:
            raise ValueError(
                f"{place}.{name}: unknown argument {key!r}"
                + (suggestion(key, tuple(kinds)) or f"; known: {', '.join(kinds)}")
            )
    checked: dict[str, Any] = {
        key: number(f"{place}.{name}.{key}", x) if kinds[key] is float else x
        for key, x in arguments.items()
    }
    try:
        return POLICIES[name](**checked)
    except ValueError as error:
        raise ValueError(f"{place}.{name}.{error}") from None


def norm_type(place: str, value: Any) -> float:
    try:
        return checked_norm_type(value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{place}{str(error).removeprefix('norm_type')}") from None


def choice(*options: str) -> Callable[[str, Any], str]:
    def check(place: str, value: Any) -> str:
        if not isinstance(value, str) or value not in options:
            raise ValueError(
                f"{place}: expected one of {options}, got {value!r}{suggestion(value, options)}"
            )
        return value

    return check


def flag(place: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{place}: expected true or false, got {value!r}")
    return value


def count(place: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{place}: expected an integer >= 1, got {value!r}")
    return value


def plain(value: Any) -> Any:
    """A policy as ``{"zclip": {…}}``, everything else as it is."""
    for name, kind in POLICIES.items():
        if isinstance(value, kind):
            return {
                name: {f.name: getattr(value, f.name) for f in dataclasses.fields(kind) if f.init}
            }
    return value
