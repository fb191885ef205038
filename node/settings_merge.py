"""Merge what was set in five places into one configuration, and say in one sentence what is wrong with it.

A flag wins over `--set key.path=value`, that over the environment (`BRANIAC_NODE__section__key=value` for a node), that
over the TOML file, that over the defaults. Text is read by the type of the setting it is for: `--set run.name=2026` is
a name. A list is a TOML array or items separated by commas, and `--set network.peers.1=ADDR` replaces one of its items.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from braniac.node.config import Root
from braniac.node.errors import ConfigError

_Root = TypeVar("_Root", bound=Root)

DEFAULTS = "the defaults"


@dataclass(frozen=True)
class Setting:
    """One value somebody set: `path` is (section, key) or (section, key, index)."""

    path: tuple[str, ...]
    value: object
    origin: str  # for messages: "--set", a file's name, a variable's name

    @property
    def key(self) -> str:
        return ".".join(self.path)


def load_config(
    root: type[_Root], file: Path | None, environ: Mapping[str, str], sets: Sequence[str], flags: Mapping[str, object]
) -> _Root:
    """Build a configuration of the given kind.

    `sets` are the arguments of `--set`; `flags` maps dotted keys to values, None meaning that the flag was not given.
    Raises ConfigError.
    """
    return load_with_origins(root, file, environ, sets, flags)[0]


def load_with_origins(
    root: type[_Root], file: Path | None, environ: Mapping[str, str], sets: Sequence[str], flags: Mapping[str, object]
) -> tuple[_Root, Mapping[tuple[str, ...], str]]:
    """The same, and who set each (section, key) that is not as by default."""
    settings = [*_from_systemd(root, environ)]
    if file is not None:
        settings += _from_file(root, file)
    settings += _from_environment(root, environ)
    settings += _from_sets(root, sets)
    settings += [Setting(tuple(key.split(".")), v, "the command line") for key, v in flags.items() if v is not None]
    tree: dict[str, dict[str, Any]] = {}
    origins: dict[tuple[str, ...], str] = {}
    for setting in settings:
        _apply(root, tree, setting)
        origins[setting.path[:2]] = setting.origin
    try:
        return root.model_validate(tree), origins
    except ValidationError as error:
        raise ConfigError(_sentence(error.errors(include_url=False)[0], origins)) from None


def _from_systemd(root: type[Root], environ: Mapping[str, str]) -> Iterator[Setting]:
    # It sets these for `StateDirectory=` and the like; several folders are separated by colons, the main one first.
    for variable, path in root.SYSTEMD_FOLDERS.items():
        if folder := environ.get(variable, "").split(":")[0]:
            yield Setting(path, folder, variable)


def _from_file(root: type[Root], file: Path) -> Iterator[Setting]:
    try:
        content = tomllib.loads(file.expanduser().read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file} is not valid TOML: {error}; correct that line") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}; save it as UTF-8") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, brackets nested a thousand times
        raise ConfigError(f"{file} holds a number or a list that is too long for any setting: correct it") from None
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {file}: {error.strerror}; check --config") from None
    for section, table in content.items():
        if not isinstance(table, dict):
            _refuse_path(root, (section,), str(file))
        for key, value in table.items():
            yield _checked(root, Setting((section, key), value, str(file)))


def _from_environment(root: type[Root], environ: Mapping[str, str]) -> Iterator[Setting]:
    for name in sorted(environ):  # sorted: an item of a list is set after the list
        if name.startswith(root.ENVIRONMENT_PREFIX):
            path = tuple(name.removeprefix(root.ENVIRONMENT_PREFIX).lower().split("__"))
            yield _from_text(root, path, environ[name], name)


def _from_sets(root: type[Root], sets: Sequence[str]) -> Iterator[Setting]:
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text!r} has no '=': write --set key.path=value, as in --set train.batch=4")
        yield _from_text(root, tuple(key.strip().split(".")), value.strip(), "--set")


def _from_text(root: type[Root], path: tuple[str, ...], text: str, origin: str) -> Setting:
    setting = _checked(root, Setting(path, text, origin))
    return Setting(path, _parse(text, into_list=_is_list(root, setting.path) and len(path) == 2), origin)


def _parse(text: str, *, into_list: bool) -> object:
    """Text as a value. Numbers and booleans stay text: pydantic reads them by the type of the field."""
    if text == "null":
        return None
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text
    if isinstance(value, list | dict) or (isinstance(value, str) and text.startswith(("'", '"'))):
        return value
    if into_list:
        return [item for item in (part.strip() for part in text.split(",")) if item]
    return text


def _sections(root: type[Root]) -> dict[str, Mapping[str, FieldInfo]]:
    sections: dict[str, Mapping[str, FieldInfo]] = {}
    for name, field in root.model_fields.items():
        assert isinstance(field.annotation, type)
        assert issubclass(field.annotation, BaseModel)
        sections[name] = field.annotation.model_fields
    return sections


def _is_list(root: type[Root], path: tuple[str, ...]) -> bool:
    return get_origin(_sections(root)[path[0]][path[1]].annotation) is tuple


def _checked(root: type[Root], setting: Setting) -> Setting:
    """The setting itself, if there is one of that name. Raises ConfigError."""
    section = _sections(root).get(setting.path[0])
    known = section is not None and len(setting.path) > 1 and setting.path[1] in section
    if not known or len(setting.path) > 3 or (len(setting.path) == 3 and not _is_list(root, setting.path)):
        _refuse_path(root, setting.path, setting.origin)
    return setting


def _refuse_path(root: type[Root], path: tuple[str, ...], origin: str) -> None:
    key = ".".join(path)
    sections = _sections(root)
    if key in sections:
        example = f"{key}.{next(iter(sections[key]))}"
        raise ConfigError(
            f"{key!r} (from {origin}) is a section, not a value: set one of its keys, such as {example!r}"
        )
    names = [f"{section}.{field}" for section, fields in sections.items() for field in fields]
    close = difflib.get_close_matches(key, names, n=1) or [name for name in names if name.split(".")[1] == path[-1]]
    hint = f"did you mean {close[0]!r}?" if close else f"`{root.SHOWN_BY}` lists all there are"
    raise ConfigError(f"unknown setting {key!r} (from {origin}): {hint}")


def _apply(root: type[Root], tree: dict[str, dict[str, Any]], setting: Setting) -> None:
    section, key, *index = setting.path
    if not index:
        tree.setdefault(section, {})[key] = setting.value
        return
    items = tree.get(section, {}).get(key)
    if items is None:
        items = getattr(getattr(root(), section), key)
    if not isinstance(items, list | tuple):
        raise ConfigError(f"{section}.{key} = {shown_text(items)} is not a list: give it as [item, item]")
    if not index[0].isdecimal() or int(index[0]) >= len(items):
        count = f"{len(items)} item{'' if len(items) == 1 else 's'}, counted from 0"
        hint = "" if items else ": set the whole list first, as in item,item"
        raise ConfigError(f"no {setting.key!r} (from {setting.origin}): {section}.{key} has {count}{hint}")
    tree.setdefault(section, {})[key] = [setting.value if i == int(index[0]) else item for i, item in enumerate(items)]


def _sentence(error: ErrorDetails, origins: Mapping[tuple[str, ...], str]) -> str:
    path = tuple(str(part) for part in error["loc"])
    origin = origins.get(path[:2], DEFAULTS)
    value = shown_text(error["input"])
    return f"{'.'.join(path)} = {value} (from {origin}) cannot be used: expected {expected_text(error)}"


def expected_text(error: ErrorDetails) -> str:
    """What pydantic wanted, as the end of a sentence."""
    match error["type"]:
        case "string_pattern_mismatch":
            return "64 hexadecimal digits in lower case"
        case "too_short":
            return f"at least {error['ctx']['min_length']} item"
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            return "a number " + error["msg"].removeprefix("Input should be ")
        case kind if kind.endswith(
            "_parsing"
        ):  # "Input should be a valid integer, unable to parse string as an integer"
            return error["msg"].removeprefix("Input should be ").split(", ")[0]
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return message.replace("valid tuple", "list").replace("String should have", "text of")


def shown_text(value: object) -> str:
    """A value as a message quotes it, not too long."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def render_toml(config: Root, origins: Mapping[tuple[str, ...], str] | None = None) -> str:
    """The whole configuration as a TOML file with a comment per key; reading it back gives the same configuration.

    With `origins`, each line also says where its value came from.
    """
    lines: list[str] = []
    for section, fields in _sections(type(config)).items():
        lines += [f"[{section}]"]
        for key, field in fields.items():
            value = getattr(getattr(config, section), key)
            lines.append(f"# {' '.join((field.description or '').split())}")
            # A JSON scalar or list of strings is also a TOML value, except that JSON leaves DEL as it is.
            text = json.dumps(value, default=str, ensure_ascii=False).replace("\x7f", "\\u007f")
            line = f"# {key} is not set" if value is None else f"{key} = {text}"
            lines.append(line if origins is None else f"{line}  # from {_origin(origins, section, key)}")
        lines.append("")
    return "\n".join(lines)


def values_and_origins(config: Root, origins: Mapping[tuple[str, ...], str]) -> dict[str, dict[str, object]]:
    """Every dotted key with its `value`, as plain JSON, and its `origin`."""
    plain = config.model_dump(mode="json")
    return {
        f"{section}.{key}": {"value": plain[section][key], "origin": _origin(origins, section, key)}
        for section, fields in _sections(type(config)).items()
        for key in fields
    }


def _origin(origins: Mapping[tuple[str, ...], str], section: str, key: str) -> str:
    return origins.get((section, key), DEFAULTS)
