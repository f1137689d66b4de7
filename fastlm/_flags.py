"""Command-line flags made from config dataclasses: one place where a setting is named, typed and explained."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any

import typer


def with_flags(*configs: type, skip: tuple[str, ...] = (), panel: dict[type, str] | None = None) -> Callable:
    """Decorator that gives a typer command one flag per field of `configs`.

    The command's `flags` parameter receives the flags that were given, as {field: value}; the others keep the value of the
    config file or the dataclass's default. Fields in `skip`, and those whose type no flag can hold, get none.
    """

    def decorate(command: Callable) -> Callable:
        own = inspect.signature(command, eval_str=True)
        parameters = [p for p in own.parameters.values() if p.name != "flags"]
        names: list[str] = []
        for config in configs:
            hints = typing.get_type_hints(config)
            for field in dataclasses.fields(config):
                annotation = _annotation(field, hints[field.name], (panel or {}).get(config))
                if field.name in skip or field.name in own.parameters or field.name in names or annotation is None:
                    continue
                names.append(field.name)
                parameters.append(
                    inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
                )

        @functools.wraps(command)
        def run(**values: Any) -> Any:
            flags = {name: values.pop(name) for name in names}
            return command(**values, flags={name: value for name, value in flags.items() if value is not None})

        kept = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        run.__signature__ = inspect.Signature(kept)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in kept}
        return run

    return decorate


def _annotation(field: dataclasses.Field, hint: Any, panel: str | None) -> Any:
    """The typer annotation of one field, or None where its type has no flag."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    optional = origin in (typing.Union, types.UnionType) and type(None) in args
    if optional:
        hint = next(a for a in args if a is not type(None))
        origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and len(args) == 2 and Ellipsis not in args:
        hint = tuple[args]
    elif origin is typing.Literal:
        hint = str
    elif hint not in (int, float, str, bool):
        return None
    default = field.default if field.default is not dataclasses.MISSING else ""
    choices = field.metadata.get("choices") or ()
    text = field.metadata.get("help", "")
    if choices:
        text += f" ({', '.join(choices)})"
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else "none" if default is None else default
    if shown != "":
        text += f" [default: {shown}]"
    flag = "--" + field.name.replace("_", "-")
    settings: dict[str, Any] = {"help": text, "show_default": False, "rich_help_panel": panel}
    if hint is bool:
        return Annotated[bool | None, typer.Option(f"{flag}/--no-{flag[2:]}", **settings)]
    return Annotated[hint | None, typer.Option(flag, **settings)]
