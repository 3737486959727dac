"""YAML and JSON files of settings, by suffix. A setting that stands twice in one place is an error:
both formats would silently take the last.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any


def read(path: Path, names: Collection[str]) -> Any:
    """What the file holds; ``names`` may not be repeated in a mapping.

    Raises:
        ValueError: another suffix, not valid, or a name that is repeated; begins with the path.
        ModuleNotFoundError: a YAML file without PyYAML.
    """
    suffix = path.suffix.lower()
    if suffix not in (".yaml", ".yml", ".json"):
        raise ValueError(f"{path}: expected a file named .yaml, .yml or .json")
    text = path.read_text(encoding="utf-8")
    return _json(path, text, names) if suffix == ".json" else _yaml(path, text, names)


def _json(path: Path, text: str, names: Collection[str]) -> Any:
    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _check_once(path, [key for key, _ in pairs], names)
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=mapping)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None


def _yaml(path: Path, text: str, names: Collection[str]) -> Any:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path}: reading YAML needs PyYAML: pip install 'fusedclip[config]'", name=error.name
        ) from None

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            _check_once(path, [key.value for key, _ in node.value], names)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None


def _check_once(path: Path, keys: list[Any], names: Collection[str]) -> None:
    for name in names:
        if keys.count(name) > 1:
            raise ValueError(f"{path}: {name} stands twice in the same place; keep one of them")
