"""Recipes as TOML: found, overridden, checked with one sentence for what is wrong, and written out resolved."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from ivcore.errors import ConfigError
from train.recipe import STAGES, Recipe, Table
from train.row import Stage

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_FOLDER = Path(__file__).parent / "recipes"
_BARE_WORD = re.compile(r"[A-Za-z_][\w./-]*")
_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "a text in quotes",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
}


def builtin_recipes() -> list[str]:
    """The names of the recipes that come with this package, such as `8b-cpt` and `tiny/base`."""
    return sorted(file.relative_to(_FOLDER).with_suffix("").as_posix() for file in _FOLDER.rglob("*.toml"))


def read_recipe(name_or_path: str | Path, overrides: Sequence[str] = (), *, stage: Stage | None = None) -> Recipe:
    """The recipe of a file, or of a built-in name such as `8b-cpt`, with `key=value` overrides.

    stage: what it must be a recipe for. Raises ConfigError with one sentence on what is wrong.
    """
    source = str(name_or_path)
    try:
        content = tomllib.loads(_text(name_or_path))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source} is not valid TOML: {error}.") from None
    for override in overrides:
        _merge(content, _parse_override(override), override)
    recipe = parse_recipe(content, source)
    if stage is not None and recipe.stage != stage:
        raise ConfigError(f"{source} is a recipe for {recipe.stage}, not for {stage}; name another one.")
    return recipe


def parse_recipe(content: Mapping[str, Any], source: str = "The recipe") -> Recipe:
    """The recipe that a TOML document says, `steps` being the sum of its phases' where it has only those.

    Raises ConfigError where it is none.
    """
    stage = content.get("stage")
    model = next((model for name, model in STAGES.items() if name == stage), None)
    if model is None:
        raise ConfigError(f"{source}: stage is {stage!r}; it must be one of {', '.join(STAGES)}.")
    phases = content.get("phases")
    if "steps" not in content and isinstance(phases, list):
        steps = [phase.get("steps") for phase in phases if isinstance(phase, dict)]
        content = {**content, "steps": sum(each for each in steps if isinstance(each, int))}
    try:
        # As JSON, because strictly read Python lists are no tuples.
        return model.model_validate_json(json.dumps(content, default=str))
    except ValidationError as error:
        # A misspelt key first: it is why another one is missing. Then what is deepest, which the sums follow from.
        first = min(error.errors(), key=lambda each: (each["type"] != "extra_forbidden", -len(each["loc"])))
        raise ConfigError(f"{source}: {_sentence(first, model)}.") from None


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """All values of a recipe; what is left to the checkpoint is left out."""
    return {"stage": recipe.stage, **recipe.model_dump(mode="json", exclude_none=True)}


def to_toml(recipe: Recipe) -> str:
    """The recipe with every value, as TOML that `read_recipe` reads back to the same."""
    return "\n".join(_lines(to_dict(recipe))).strip() + "\n"


def _text(name_or_path: str | Path) -> str:
    path = Path(name_or_path)
    builtin = builtin_recipes()
    try:
        if not path.exists() and str(name_or_path) in builtin:
            return (_FOLDER / f"{name_or_path}.toml").read_text(encoding="utf-8")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = get_close_matches(path.stem, builtin, 1)
        hint = f"the nearest built-in one is {near[0]}" if near else f"the built-in ones are {', '.join(builtin)}"
        raise ConfigError(f"There is no recipe {name_or_path}; {hint}.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"The recipe {name_or_path} cannot be read ({error}); check the path.") from None


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text} is not of the form key=value, as in --set learning_rate.peak=1e-4.")
    word = value.strip()
    quoted = json.dumps(word) if _BARE_WORD.fullmatch(word) and word not in ("true", "false", "inf", "nan") else value
    try:
        parsed = tomllib.loads(f"{key} = {quoted}")
    except tomllib.TOMLDecodeError:
        raise ConfigError(f"--set {text} has no TOML value; a text with other signs stands in quotes.") from None
    if len(parsed) != 1:
        raise ConfigError(f"--set {text} sets more than one value; give --set for each.")
    return parsed


def _merge(target: dict[str, Any], override: Mapping[str, Any], text: str) -> None:
    """Put an override's value where its key says; a number in the key is a place in a list of tables."""
    for key, value in override.items():
        if not isinstance(value, dict):
            target[key] = value
            continue
        inner = target.setdefault(key, {})
        while isinstance(inner, list):
            place, value = next(iter(value.items()))
            if not place.isdigit() or int(place) >= len(inner):
                raise ConfigError(f"--set {text}: {key} is a list of {len(inner)}, counted from 0.")
            inner = inner[int(place)]
            if not isinstance(value, dict):
                raise ConfigError(f"--set {text}: {key}.{place} is a table; name a value of it.")
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {text}: {key} is a value, not a table.")
        _merge(inner, value, text)


def _sentence(error: ErrorDetails, model: type[Table]) -> str:
    where, value = ".".join(str(part) for part in error["loc"]), error["input"]
    context = error.get("ctx", {})
    match error["type"]:
        case "extra_forbidden":
            known = _fields_at(model, error["loc"][:-1])
            near = get_close_matches(str(error["loc"][-1]), known, 1, 0.5)
            hint = f"the nearest is {near[0]}" if near else f"there are {', '.join(known)}"
            return f"{where} is not a key of a recipe for {model.__name__.removesuffix('Recipe').lower()}; {hint}"
        case "missing":
            return f"{where} is missing"
        case "value_error":
            return f"{where}: {context['error']}" if where else str(context["error"])
        case "greater_than":
            expected = f"above {context['gt']:g}"
        case "greater_than_equal":
            expected = f"at least {context['ge']:g}"
        case "less_than":
            expected = f"below {context['lt']:g}"
        case "less_than_equal":
            expected = f"at most {context['le']:g}"
        case "literal_error":
            expected = context["expected"]
            if error["loc"][-1] == "[key]":
                where = ".".join(str(part) for part in error["loc"][:-2])
                return f"{where} has the key {value}, which must be {expected}"
        case kind:
            expected = _EXPECTED.get(kind, "")
            if not expected:
                return f"{where}: {error['msg']}"
    return f"{where} is {json.dumps(value, default=str)[:60]} but must be {expected}"


def _fields_at(model: Any, where: Sequence[str | int]) -> list[str]:
    """The fields of the table that a path of keys and indices leads to."""
    for part in where:
        if isinstance(part, str):
            annotation = model.model_fields[part].annotation
            candidates = (annotation, *get_args(annotation))
            model = next(each for each in candidates if isinstance(each, type) and issubclass(each, Table))
    return list(model.model_fields)


def _lines(table: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The lines of a table: its values, then its tables, then its lists of tables."""
    tables = {key: value for key, value in table.items() if isinstance(value, dict)}
    lists = {
        key: value
        for key, value in table.items()
        if isinstance(value, list) and value and all(isinstance(each, dict) for each in value)
    }
    for key, value in table.items():
        if key not in tables and key not in lists:
            yield f"{_key(key)} = {_value(value)}"
    for key, value in tables.items():
        yield from ("", f"[{prefix}{_key(key)}]", *_lines(value, f"{prefix}{_key(key)}."))
    for key, value in lists.items():
        for each in value:
            yield from ("", f"[[{prefix}{_key(key)}]]", *_lines(each, f"{prefix}{_key(key)}."))


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _value(key)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's strings are TOML's but for DEL
