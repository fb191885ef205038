"""What commands read from their arguments, and what they print on stdout: as JSON or for people."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from braniac.node.errors import ConfigError

if TYPE_CHECKING:  # protobuf loads only for the commands that talk to a daemon
    from google.protobuf.message import Message


def split_addresses(texts: Sequence[str] | None) -> list[str] | None:
    """Addresses from a repeated option whose values may hold several, separated by commas or spaces."""
    if texts is None:
        return None
    return [address for text in texts for address in re.split(r"[,\s]+", text) if address]


def whom_to_join(
    link: str | None, run_id: str | None, peers: Sequence[str] | None
) -> tuple[str | None, list[str] | None]:
    """Run id and addresses from a join link, `--run-id` and `--peers`. Raises ConfigError."""
    addresses = split_addresses(peers)
    if link is None:
        return run_id, addresses
    from braniac.node.join_link import with_link

    return with_link(link, run_id, addresses)


def parse_tiers(text: str) -> tuple[int, ...]:
    """Tiers written as "0,1,2,3". Raises ConfigError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part in {"0", "1", "2", "3"} for part in parts):
        raise ConfigError(f"--tiers {text!r} is not a list of tiers: write numbers from 0 to 3, as in --tiers 0,1,2,3")
    return tuple(int(part) for part in parts)


def parse_integers(option: str, text: str) -> tuple[int, ...]:
    """Positive whole numbers written as "64,128". Raises ConfigError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 0 < int(part) < 1 << 31 for part in parts):
        raise ConfigError(
            f"{option} {text!r} is not a list of positive whole numbers: write them as in {option} 64,128"
        )
    return tuple(int(part) for part in parts)


_UNIT_S = {"d": 86_400, "h": 3600, "m": 60, "s": 1}
_DURATION = re.compile(r"(?:([0-9]+)d)?(?:([0-9]+)h)?(?:([0-9]+)m)?(?:([0-9]+)s)?")
_DURATION_S_MAX = 366 * 86_400


def parse_duration_s(option: str, text: str) -> float:
    """Seconds in a time span written as "90s", "2h" or "1h30m". Raises ConfigError."""
    found = _DURATION.fullmatch(text.replace(" ", "").lower())
    counts = [int(count or 0) for count in found.groups()] if found and len(text) < 32 else []
    seconds = sum(count * unit_s for count, unit_s in zip(counts, _UNIT_S.values(), strict=False))
    if not 0 < seconds <= _DURATION_S_MAX:
        raise ConfigError(
            f"{option} {text!r} is not a time span of up to 366 days: write it as in {option} 90s, {option} 1h30m "
            f"or {option} 2d"
        )
    return float(seconds)


def json_text(content: object) -> str:
    """One JSON object on one line. Numbers that are not finite become null, because JSON has none."""
    return json.dumps(_finite(content), ensure_ascii=False, allow_nan=False)


def _finite(content: object) -> object:
    if isinstance(content, float) and not math.isfinite(content):
        return None
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return content


def message_dict(message: Message) -> dict[str, object]:
    """A protobuf message as plain values under its own field names, every field present.

    Unlike protobuf's JSON mapping, 64-bit integers stay numbers and bytes (digests, ids) are hexadecimal.
    """
    return {field.name: _field_value(message, field) for field in message.DESCRIPTOR.fields}


def _field_value(message: Message, field: Any) -> object:
    if field.has_presence and not message.HasField(field.name):
        return None
    value = getattr(message, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        item = field.message_type.fields_by_name["value"]
        return {str(key): _plain(value[key], item) for key in sorted(value)}
    return [_plain(item, field) for item in value] if field.is_repeated else _plain(value, field)


def _plain(value: Any, field: Any) -> object:
    if field.message_type is not None:
        return message_dict(value)
    if field.enum_type is not None:
        return field.enum_type.values_by_number[value].name
    return value.hex() if isinstance(value, bytes) else value


def fill_message(message: Message, values: Mapping[str, Any]) -> None:
    """Inverse of `message_dict`: fill an empty message. Raises ValueError, TypeError or KeyError for what is none."""
    for field in message.DESCRIPTOR.fields:
        value = values.get(field.name)
        if value is None:
            continue
        target = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            key = type(field.message_type.fields_by_name["key"].default_value)
            target.update({key(name): item for name, item in value.items()})
        elif field.message_type is not None:
            for item in value if field.is_repeated else [value]:
                fill_message(target.add() if field.is_repeated else target, item)
        elif field.is_repeated:
            target.extend(_value_in(item, field) for item in value)
        else:
            setattr(message, field.name, _value_in(value, field))


def _value_in(value: Any, field: Any) -> Any:
    return bytes.fromhex(value) if field.type == field.TYPE_BYTES else value


def aligned_text(content: Mapping[str, object]) -> str:
    """One line per entry, values in one column; an entry that is a table gets a line per entry of its own."""
    rows = [(key.replace("_", " "), _cell(value)) for key, value in _flat(content)]
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in rows)


def _flat(content: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key} ")
        else:
            yield f"{prefix}{key}", value


def _cell(value: object) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
        case int():
            return f"{value:,}"
        case None:
            return "-"
        case list() | tuple():
            return ", ".join(_cell(item) for item in value) or "none"
        case Mapping():
            return " ".join(f"{key}={_cell(item)}" for key, item in value.items()) or "none"
    return str(value)


def table_text(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    return "\n".join(line.rstrip() for line in lines)


def bytes_text(count: float) -> str:
    """A number of bytes for people: 812 B, 4.1 kB, 3.2 GB; a dash for one that is not finite."""
    if not math.isfinite(count):
        return "-"
    if count < 1000:
        return f"{int(count)} B"
    size = count / 1000
    for unit in ("kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def duration_text(seconds: float) -> str:
    """A time span for people: 42s, 3m 07s, 5h 12m, 2d 04h; a dash for one that is not finite."""
    if not math.isfinite(seconds):
        return "-"
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02}s"
    if whole < 86_400:
        return f"{whole // 3600}h {whole % 3600 // 60:02}m"
    return f"{whole // 86_400}d {whole % 86_400 // 3600:02}h"
