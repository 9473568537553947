"""Reading a JSON file at the edge: every way it can be wrong becomes one InputError that says where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from rtp_sim.errors import InputError

Shape = TypeVar("Shape", bound=BaseModel)


def read_json_object(path: Path) -> dict[str, Any]:
    """The object that the file holds.

    Raises InputError with the file (and, for text that is no JSON, line and column) if it cannot be read.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}); is the file complete?"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}, byte {error.start}: not UTF-8 text; expected a JSON file") from None
    except RecursionError:
        raise InputError(f"{path}: nested too deeply; expected a JSON object such as {{...}}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a {type(value).__name__}; expected a JSON object such as {{...}}")
    return value


def validated(shape: type[Shape], data: dict[str, Any], path: Path, parts: tuple[type[BaseModel], ...] = ()) -> Shape:
    """`data` as a `shape`. `parts` are the shapes nested in it, whose field descriptions messages may quote.

    Raises InputError naming the file, the first wrong key, its value and what was expected.
    """
    try:
        return shape.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{path}: {_complaint(error, (shape, *parts))}") from None


def _complaint(error: ValidationError, shapes: tuple[type[BaseModel], ...]) -> str:
    """The first error as: which key, what it is, what was expected."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    expected = _expected(shapes, first["loc"])
    if first["type"] == "missing":
        return f"key {key!r} is missing; expected {expected}"
    if first["type"] == "extra_forbidden":
        return f"key {key!r} is not known here; remove it or check its spelling"
    if first["type"] == "union_tag_invalid":
        tag, tags = first["ctx"]["tag"], first["ctx"]["expected_tags"]
        return f"key {key!r}: {first['ctx']['discriminator']} is {tag!r}; expected one of {tags}"
    got = json.dumps(first["input"], default=str)[:80]
    if first["type"] == "union_tag_not_found":
        # The discriminator is a key in quotes, or the name of a function, which would tell the user nothing.
        tag = first["ctx"]["discriminator"]
        lacks = f", without {tag}" if tag.startswith("'") else ""
        return f"key {key!r} is {got}{lacks}; expected {expected}"
    return f"key {key!r} is {got}; expected {expected} ({first['msg']})"


def _expected(shapes: tuple[type[BaseModel], ...], place: tuple[int | str, ...]) -> str:
    """The description of the innermost key of `place` that has one."""
    for key in reversed(place):
        for shape in shapes:
            field = shape.model_fields.get(str(key))
            if field is not None and field.description:
                return field.description
    return "another value"
