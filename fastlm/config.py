"""Configuration: frozen dataclasses beside their consumer, filled from a YAML or TOML file with flags over it."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from fastlm.errors import UserError

T = TypeVar("T")


def option(default: Any, help: str, *, choices: tuple[str, ...] = ()) -> Any:
    """A documented dataclass field. Its help text becomes the help of the command-line flag of the same name."""
    metadata = {"help": help, "choices": choices}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Reads a .yaml, .yml, .toml or .json file that holds one mapping.

    Raises UserError for a missing file, an unknown extension, a syntax error, or anything that is no mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"config file {path} does not exist")
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix in (".yaml", ".yml"):
            import yaml

            data = yaml.safe_load(text) or {}
        elif path.suffix == ".toml":
            try:
                import tomllib
            except ImportError:  # Python 3.10
                import tomli as tomllib
            data = tomllib.loads(text)
        elif path.suffix == ".json":
            data = json.loads(text)
        else:
            raise UserError(f"config file {path}: extension must be .yaml, .toml or .json, got {path.suffix!r}")
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"config file {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise UserError(f"config file {path} must hold a mapping of names to values, got {type(data).__name__}")
    return data


def build(cls: type[T], *layers: dict[str, Any], where: str = "config") -> T:
    """Builds a config dataclass from mappings, later ones over earlier ones.

    Raises UserError for an unknown key (with the nearest valid name) and for a value of the wrong type.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            if key not in fields:
                raise UserError(f"{where}: unknown key {key!r}; {nearest(key, fields)}")
            choices = fields[key].metadata.get("choices")
            if choices and value not in choices:
                raise UserError(f"{where}: {key} must be one of {', '.join(choices)}, got {value!r}")
            values[key] = _checked(value, hints[key], f"{where}: {key}")
    return cls(**values)


def nearest(name: str, valid: Iterable[str]) -> str:
    """The end of an error line about an unknown name: the nearest valid one, or all of them."""
    valid = list(valid)
    near = difflib.get_close_matches(name, valid, n=1)
    return f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(sorted(valid))}"


def _checked(value: Any, hint: Any, what: str) -> Any:
    """The value, converted only where nothing is lost (1 -> 1.0, "3e-4" -> 0.0003, list -> tuple)."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        errors = []
        for arg in (a for a in args if a is not type(None)):
            try:
                return _checked(value, arg, what)
            except UserError as error:
                errors.append(str(error))
        raise UserError(errors[0])
    if origin in (list, tuple) and isinstance(value, (list, tuple)):
        return origin(_checked(v, args[0], what) if args else v for v in value)
    if origin is dict or origin is typing.Literal or hint is Any:
        return value
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 3e-4 as a string
        except ValueError:
            pass
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    expected = getattr(origin or hint, "__name__", str(hint))
    raise UserError(f"{what} must be {expected}, got {value!r}")


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain data, ready for JSON or YAML."""
    return dataclasses.asdict(config)
