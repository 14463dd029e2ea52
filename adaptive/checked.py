"""Dataclasses that check themselves, filled from YAML and then from flags; `--help` prints their `Attributes:`."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import math
import re
import types
from collections.abc import Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be used; `problems` holds one line for each fault."""

    def __init__(self, name: str, problems: list[str]):
        super().__init__(f"`{name}` has {len(problems)} problem(s):\n" + "\n".join(f"- {line}" for line in problems))
        self.problems = problems


class Checked:
    """A dataclass that refuses wrong types and whatever its own `problems()` finds, as soon as it is made."""

    def __post_init__(self) -> None:
        ready, found = _typed(type(self), vars(self))
        vars(self).update(ready)
        if found := found or self.problems():
            raise ConfigError(type(self).__name__, found)

    def _below(self, least: float, *names: str) -> list[str]:
        """A line for each of these fields that is set and below `least`."""
        values = {name: getattr(self, name) for name in names}
        return [f"`{n}` is {v}; it must be {least} or more" for n, v in values.items() if v is not None and v < least]


def load_config(cls: type[T], argv: Sequence[str] | None = None) -> T:
    """The configuration a command line asks for: `--config x.yaml` sets, flags override (`--exits.depths 12,18,24`).

    Args:
        cls: the dataclass to fill; its `Attributes:` block is the help text.
        argv: words of the command line; None = those of this process.

    Raises:
        ValueError: unknown keys (with what was probably meant), wrong types, missing and faulty values, all at once.
    """
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--config FILE] [--FIELD VALUE ...]", description=cls.__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of the fields below; flags override it")
    fields = _flat_fields(cls)
    for name, (annotation, text) in fields.items():
        parser.add_argument(f"--{name}", nargs="+", metavar="", help=f"{text} ({inspect.formatannotation(annotation)})")
    given, unknown = parser.parse_known_args(argv)
    try:
        values = (yaml.safe_load(Path(given.config).read_text()) if given.config else None) or {}
        if not isinstance(values, dict):
            raise yaml.YAMLError("it holds no `name: value` lines")
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"`--config` is {given.config!r}, which is no readable YAML file: {error}") from error
    # A word that no flag claims is the value of a misspelt flag, unless there is none.
    flags = [word.split("=")[0] for word in unknown if word.startswith("--")] or unknown
    problems = [f"`{word}` is no flag{_meant(word, [f'--{name}' for name in ('config', *fields)])}" for word in flags]
    for name, (annotation, _) in fields.items():
        if getattr(given, name) is not None:
            *parents, leaf = name.split(".")
            target = values
            for parent in parents:
                target[parent] = target[parent] if isinstance(target.get(parent), dict) else {}
                target = target[parent]
            target[leaf] = _from_words(getattr(given, name), annotation)
    return build(cls, values, problems)


def build(cls: type[T], values: dict[str, Any], problems: list[str]) -> T:
    """A `cls` dataclass filled from `values`, nested mappings included; ConfigError with all `problems` and its own."""
    hints, ready = get_type_hints(cls), {}
    unknown = [key for key in values if key not in hints]
    problems = problems + [f"`{key}` is no field of {cls.__name__}{_meant(str(key), list(hints))}" for key in unknown]
    required = {f.name for f in dataclasses.fields(cls) if f.default is MISSING and f.default_factory is MISSING}
    asked = [name for name in hints if name in values or name in required]
    for name in asked:
        nested = dataclasses.is_dataclass(hints[name])
        value = values.get(name, {} if nested else MISSING)
        if value is MISSING:
            problems.append(f"`{name}` is missing; give it a value ({inspect.formatannotation(hints[name])})")
        elif nested and isinstance(value, dict):
            try:
                ready[name] = build(hints[name], value, [])
            except ConfigError as error:
                problems += [line.replace("`", f"`{name}.", 1) for line in error.problems]
        else:
            ready[name] = value
    ready, wrong = _typed(cls, ready)
    problems += wrong
    if len(ready) == len(asked):
        try:
            made = cls(**ready)
            if not problems:
                return made
        except ConfigError as error:
            problems += error.problems
    raise ConfigError(cls.__name__, problems)


def _typed(cls: type, values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """`values` as the types that the fields of `cls` ask for, and a line for each that is something else."""
    ready, wrong, hints = {}, [], get_type_hints(cls)
    for name, value in values.items():
        try:
            ready[name] = _read(value, hints[name])
        except ValueError:
            wrong.append(f"`{name}` is {value!r}; allowed: {inspect.formatannotation(hints[name])}")
    return ready, wrong


def _read(value: Any, annotation: Any) -> Any:
    """`value` as the type that `annotation` names; ValueError when it is not one."""
    origin, options = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        for option in options:
            try:
                return _read(value, option)
            except ValueError:
                continue
    elif origin is list and isinstance(value, (list, tuple)):
        return [_read(item, options[0]) for item in value]
    elif origin is Literal and value in options:
        return value
    elif annotation is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        # Text too: YAML 1.1 reads `1e-4` as text, it wants `1.0e-4`.
        if not math.isnan(float(value)):
            return float(value)
    elif type(value) is annotation:
        return value
    raise ValueError


def _from_words(words: list[str], annotation: Any) -> Any:
    """The words behind a flag as the plain value that YAML would have given; `_read` then judges it."""
    options = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    items = [get_args(option)[0] for option in options if get_origin(option) is list]
    single = [option for option in options if get_origin(option) is not list]
    text = ",".join(words)
    if text.lower() in ("none", "null") and types.NoneType in single:
        return None
    if items and (set(single) <= {types.NoneType} or "," in text):
        parts = text.removeprefix("[").removesuffix("]").split(",")
        return [_from_words([part.strip()], items[0]) for part in parts if part.strip()]
    if bool in single and text.lower() in ("true", "false"):
        return text.lower() == "true"
    return int(text) if int in single and re.fullmatch(r"[+-]?\d+", text) else text


def _flat_fields(cls: type, prefix: str = "") -> dict[str, tuple[Any, str]]:
    """`name.of.field -> (annotation, help text)` for a dataclass and those nested in it."""
    texts = dict(re.findall(r"^ +(\w+): (.+)$", inspect.getdoc(cls), re.MULTILINE))
    found, hints = {}, get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            found |= _flat_fields(hints[field.name], f"{prefix}{field.name}.")
        else:
            default = "" if field.default is MISSING else f"; default {field.default}".lower()
            found[prefix + field.name] = (hints[field.name], f"{texts.get(field.name, '')}{default}".replace("%", "%%"))
    return found


def _meant(word: str, names: list[str]) -> str:
    """What was probably meant, else what there is."""
    close = difflib.get_close_matches(word, names, n=1)
    return f"; did you mean `{close[0]}`?" if close else f"; there are: {', '.join(names)}"
