"""A run as its founder describes it, in a YAML or TOML file, and the manifest that it amounts to.

Whatever the file says is enforced: by the protocol (slots, fragments, codec, merge), by every node that joins (the
recipe in the manifest's `data`, see run_data.py), or it is refused. Nothing is read and ignored.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator

from braniac.model.config import PRESETS, ModelConfig
from braniac.model.errors import ConfigError as ModelConfigError
from braniac.model.fragments import fragment_table, layout_digest
from braniac.model.tokenizer import BYTES, Tokenizer
from braniac.node import bridge
from braniac.node.config import DataSection, Section
from braniac.node.errors import ConfigError
from braniac.node.founding import RECIPES, TURNS, check_vocabulary
from braniac.node.run_data import OptimizerSpec, RunData, Text
from braniac.node.settings_merge import expected_text, shown_text
from braniac.node.text import given_tokenizer
from braniac.protocol.codec import CodecRules
from braniac.protocol.errors import ManifestError
from braniac.protocol.identity import Identity
from braniac.protocol.limits import FRAGMENTS_MAX, MAGNITUDE_BITS_MAX, TILE_SIZE_MAX, TURNS_MAX
from braniac.protocol.manifest import Manifest, MergeRules, open_manifest, sign_manifest

FILE_BYTES_MAX = 1 << 20


class DirectionSpec(Section):
    """The codec in one direction."""

    per_tile: int | None = Field(default=None, ge=1, le=TILE_SIZE_MAX)
    magnitude_bits: int | None = Field(default=None, ge=1, le=MAGNITUDE_BITS_MAX)


class UpSpec(DirectionSpec):
    """The codec of contributions."""

    turns: int = Field(default=TURNS, ge=1, le=TURNS_MAX)
    """Who missed turns may send the values of so many at once; 1: of one, as always."""


class CodecSpec(Section):
    """What travels."""

    up: UpSpec = UpSpec()
    down: DirectionSpec = DirectionSpec()


def _half(value: float) -> float:
    if value not in (0.0, 0.5, 1.0):
        raise ValueError("0, 0.5 or 1")
    return value


class MergeSpec(Section):
    """How contributions become one update."""

    step: float = Field(default=1.0, ge=1 / 64, le=4)
    coverage: Annotated[float, AfterValidator(_half)] = 0.5
    margin_percent: int = Field(default=25, ge=0, le=100)


class DataSpec(Section):
    """What the model reads."""

    tokenizer: str = BYTES
    """Or the path of a tokenizer.json."""
    text: Text | None = None


class AdmissionSpec(Section):
    """Who may take part, and how much one may weigh: no more than the protocol enforces."""

    who: Literal["anybody"] = "anybody"
    weight_cap: int = Field(default=1, ge=1, le=8)


class RunSpec(Section):
    """The whole file."""

    name: Annotated[Text, Field(max_length=64)]
    model: dict[str, Any]
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    slot_s: float | None = Field(default=None, ge=0.1, le=3600)
    fragments: int | None = Field(default=None, ge=4, le=FRAGMENTS_MAX)
    codec: CodecSpec = CodecSpec()
    merge: MergeSpec = MergeSpec()
    data: DataSpec = DataSpec()
    optimizer: OptimizerSpec = OptimizerSpec()
    admission: AdmissionSpec = AdmissionSpec()

    @model_validator(mode="after")
    def _paced(self) -> RunSpec:
        if "preset" not in self.model:
            given = {
                "slot_s": self.slot_s,
                "fragments": self.fragments,
                "codec.up.per_tile": self.codec.up.per_tile,
                "codec.down.per_tile": self.codec.down.per_tile,
            }
            if missing := [key for key, value in given.items() if value is None]:
                raise ValueError(f"{', '.join(missing)}, because without a model.preset there are no defaults for them")
        return self


def read_spec(path: Path) -> RunSpec:
    """The description in a file. Raises ConfigError."""
    return parse_spec(_read(path), str(path))


def parse_spec(content: object, origin: str) -> RunSpec:
    """A description from the plain values of a file, which `origin` names in messages. Raises ConfigError."""
    if not isinstance(content, Mapping):
        raise ConfigError(f"{origin} does not describe a run: see `braniac-node init --example`")
    try:
        spec = RunSpec.model_validate(content)
    except ValidationError as error:
        raise ConfigError(_sentence(error, origin)) from None
    tokenizer_of(spec, model_of(spec))
    return spec


def model_of(spec: RunSpec) -> ModelConfig:
    """The model: the preset's, with what differs. Raises ConfigError."""
    values = dict(spec.model)
    preset = values.pop("preset", None)
    if preset is not None and (not isinstance(preset, str) or preset not in PRESETS):
        raise ConfigError(f"model.preset = {shown_text(preset)} is no preset: choose one of {', '.join(PRESETS)}")
    base = PRESETS[preset].to_dict() if preset is not None else {}
    try:
        model = ModelConfig.from_dict({**base, **values})
    except ModelConfigError as error:
        raise ConfigError(f"the run's model cannot be used: {error}") from None
    return model


def tokenizer_of(spec: RunSpec, model: ModelConfig) -> Tokenizer:
    """The tokenizer, whose tokens the model must know. Raises ConfigError, DataError."""
    data = DataSection(tokenizer=None if spec.data.tokenizer == BYTES else Path(spec.data.tokenizer))
    tokenizer = given_tokenizer(data)
    check_vocabulary(tokenizer, model)
    return tokenizer


def manifest_of(spec: RunSpec, founder: Identity, now: float) -> tuple[Manifest, bytes, bytes]:
    """The run whose first slot begins at `now` (Unix seconds), signed: (manifest, body, signature).

    Raises ConfigError if the parts do not fit each other.
    """
    model = model_of(spec)
    pace = RECIPES[spec.model.get("preset", "tiny")]  # without a preset every value is given
    fragments = spec.fragments or pace.fragments
    try:
        table = fragment_table(model, fragments)
    except ModelConfigError as error:
        raise ConfigError(f"the run's model cannot be cut: {error}") from None
    up, down = spec.codec.up, spec.codec.down
    data = RunData(tokenizer=tokenizer_of(spec, model).name, text=spec.data.text, optimizer=spec.optimizer)
    try:
        manifest = Manifest(
            name=spec.name,
            founder=founder.peer_id,
            epoch_ms=int(now * 1000),
            slot_ms=round((spec.slot_s or pace.slot_s) * 1000),
            seed=spec.seed,
            tiers=model.tiers,
            model=model.to_dict(),
            data=data.to_data(),
            layout_digest=layout_digest(model, fragments),
            fragments=bridge.fragment_specs(table),
            up=CodecRules(up.per_tile or pace.up_per_tile, up.magnitude_bits or 1, up.turns),
            down=CodecRules(down.per_tile or pace.down_per_tile, down.magnitude_bits or 2),
            merge=MergeRules(
                step_q16=round(spec.merge.step * (1 << 16)),
                coverage_halves=round(2 * spec.merge.coverage),
                weight_cap=spec.admission.weight_cap,
                margin_percent=spec.merge.margin_percent,
            ),
        )
        body, signature = sign_manifest(manifest, founder)
        open_manifest(body, signature)  # as everybody else will: what they would refuse is refused now
    except ManifestError as error:
        raise ConfigError(f"nobody could join this run: {error}; give it fewer fragments or shorter texts") from None
    return manifest, body, signature


def _read(path: Path) -> object:
    try:
        with path.expanduser().open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
        if len(data) > FILE_BYTES_MAX:
            raise ConfigError(f"{path} is longer than {FILE_BYTES_MAX} bytes: it is not the description of a run")
        text = data.decode()
        return tomllib.loads(text) if path.suffix == ".toml" else yaml.load(text, _Strict)
    except OSError as error:
        raise ConfigError(f"cannot read the run description {path} ({error.strerror}): check its path") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}; save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}; correct that line") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: a date that is none
        raise ConfigError(f"{path} is not valid YAML: {_yaml_trouble(error)}; correct that line") from None


class _Strict(yaml.SafeLoader):
    """YAML without keys given twice, of which all but one would be ignored."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[object, object]:
        keys = [key.value for key, _ in node.value if isinstance(key.value, str)]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", node.start_mark)
        found: dict[object, object] = super().construct_mapping(node, deep)
        return found


def _yaml_trouble(error: Exception) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    where = f" (at line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
    return " ".join(f"{problem or error or 'nested too deeply'}{where}".split())[:200]


def _sentence(error: ValidationError, origin: str) -> str:
    every = error.errors(include_url=False)
    # A misspelt key is both unknown and missing, and the former is what its writer wants to hear.
    first = next((each for each in every if each["type"] == "extra_forbidden"), every[0])
    path = [str(part) for part in first["loc"]]
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(path[-1], _known(path[:-1]), n=1) or _known(path[:-1])
        hint = f"did you mean {close[0]!r}?" if len(close) == 1 else f"known are {', '.join(close)}"
        return f"unknown key {key!r} (from {origin}): {hint}"
    if first["type"] == "missing":
        return f"{origin} lacks {key!r}: add it, as in `braniac-node init --example`"
    if not path:
        return f"{origin} lacks {expected_text(first)}: add what is missing"
    return f"{key} = {shown_text(first['input'])} (from {origin}) cannot be used: expected {expected_text(first)}"


def _known(path: list[str]) -> list[str]:
    """The keys below `path`."""
    model: type[BaseModel] = RunSpec
    for part in path:
        inner = model.model_fields[part].annotation
        assert isinstance(inner, type)
        assert issubclass(inner, BaseModel)
        model = inner
    return list(model.model_fields)
