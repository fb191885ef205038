"""What can be set about a node: frozen pydantic models, one per section, with units in the names.

`settings_merge.load_config` fills them from flags, `--set`, the environment and a TOML file; nothing else builds one
from what a person typed. A section is frozen, so the daemon can hand it to any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal, get_args

import platformdirs
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from braniac.model.config import Device, Precision
from braniac.node import schedule
from braniac.node.hub import checked_name, is_hub_name
from braniac.protocol.limits import FRAGMENTS_MAX, TILE_SIZE_MAX


def default_state_dir() -> Path:
    """Where a node keeps its key and checkpoints when nobody says otherwise, e.g. ~/.local/share/braniac."""
    return platformdirs.user_data_path("braniac")


def default_config_file() -> Path:
    """The settings that are read when nobody names another file, e.g. ~/.config/braniac/node.toml."""
    return platformdirs.user_config_path("braniac") / "node.toml"


def default_cache_dir() -> Path:
    """Where the tokens of texts are kept when nobody says otherwise, e.g. ~/.cache/braniac."""
    return platformdirs.user_cache_path("braniac")


def control_socket_path(state_dir: Path) -> Path:
    """The unix socket on which the daemon of this state directory answers `status`, `peers` and `leave`."""
    return state_dir / "control.sock"


def _digits_to_int(value: object) -> object:
    return int(value) if isinstance(value, str) and value in {"0", "1", "2", "3"} else value


Preset = Literal["tiny", "small", "tiny-llama", "small-llama", "nano-124m", "nano-1b"]
Tier = Annotated[Literal["auto", 0, 1, 2, 3], BeforeValidator(_digits_to_int)]


def _whole(path: Path) -> Path:
    """Absolute, because libp2p's daemon takes a socket's path apart at its first slash."""
    return path.expanduser().absolute()


def _checked_hours(text: str) -> str:
    schedule.parse_window(text)
    return text


def _whole_hours(value: object) -> object:
    """A list whose text was cut at its commas, as on the command line, put together again."""
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return schedule.join_days(value)
    return value


def _path_or_hub(value: object) -> object:
    """A name on the hub stays text: as a path it would lose one of its slashes."""
    if isinstance(value, str):
        return checked_name(value) if is_hub_name(value) else Path(value).expanduser()
    return value


Hours = Annotated[str, AfterValidator(_checked_hours)]
UserPath = Annotated[Path, AfterValidator(Path.expanduser)]
DataPath = Annotated[Path | str, BeforeValidator(_path_or_hub)]
StatePath = Annotated[Path, AfterValidator(_whole)]


class Section(BaseModel):
    """Named settings that belong together."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value: object, info: ValidationInfo) -> object:
        # Python calls True an int; a person who writes `batch = true` made a mistake.
        if isinstance(value, bool) and info.field_name:
            annotation = cls.model_fields[info.field_name].annotation
            if bool not in (annotation, *get_args(annotation)):
                raise ValueError("a value that is not true or false")
        return value


class Root(Section):
    """All that can be set for one kind of command: sections, and nothing beside them."""

    ENVIRONMENT_PREFIX: ClassVar[str]
    """An environment variable of this prefix and `section__key` sets that key."""
    SHOWN_BY: ClassVar[str]
    """The command that lists all settings."""
    SYSTEMD_FOLDERS: ClassVar[Mapping[str, tuple[str, str]]] = {}
    """Section and key of the folders that systemd's variables decide, by variable."""
    DEFAULT_FILE: ClassVar[Callable[[], Path] | None] = None
    """Which file is read, if it is there, when none is named."""


class NetworkSection(Section):
    """Whom to reach, and how to be reached."""

    peers: tuple[str, ...] = ()
    """Multiaddrs to join through, each ending in /p2p/<peer id>, or @FILE of them; empty: found or resume a run."""
    listen: tuple[str, ...] = Field(default=("/ip4/0.0.0.0/tcp/0",), min_length=1)
    """Multiaddrs to listen on; port 0 means any free port."""
    announce: tuple[str, ...] = ()
    """Multiaddrs to tell others instead of the ones found, e.g. behind a port forward."""
    address_file: UserPath | None = None
    """Write this node's own multiaddrs into this file, for peers that join through @FILE; not set: nowhere."""
    run_id: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """Refuse to join any run but this one (64 hex digits)."""
    nat: bool = False
    """Whether this device sits behind a router: ask it for a port, use relays, punch holes."""
    relay_service: bool = False
    """Whether to pass on what others send to peers behind routers; for nodes that everybody can dial."""
    call_timeout_s: float = Field(default=10.0, ge=0.1, le=600)
    """Deadline of one call to a peer."""


class RunSection(Section):
    """A new run, written into its manifest by the founder; a node that joins takes the manifest as it is."""

    name: str = Field(default="braniac", min_length=1, max_length=64)
    """What people call the run."""
    preset: Preset = "tiny"
    """Which model: tiny has half a million parameters, small 11 to 13 million, nano-124m and nano-1b are for .bin
    shards of tokens; -llama ones export as stock Llama."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Seed of the initial weights and of who reads which text."""
    slot_s: float | None = Field(default=None, ge=0.1, le=3600)
    """Length of a slot: one fragment is averaged per slot; not set: the preset's own."""
    fragments: int | None = Field(default=None, ge=4, le=FRAGMENTS_MAX)
    """Into how many fragments the parameters are cut, all of them once is a window; not set: the preset's own."""
    up_per_tile: int | None = Field(default=None, ge=1, le=TILE_SIZE_MAX)
    """Values a peer sends of each 64x64 tile; not set: the preset's own."""
    down_per_tile: int | None = Field(default=None, ge=1, le=TILE_SIZE_MAX)
    """Values the merged update holds of each 64x64 tile; not set: the preset's own."""
    file: UserPath | None = None
    """Signed run file of `braniac-node init`: found that run, or join no other; then nothing else of this section."""


class TrainSection(Section):
    """How this device trains."""

    tier: Tier = "auto"
    """How much of the model to hold: 0 is all, each further tier halves the FFN; auto takes the largest that fits."""
    batch: int = Field(default=8, ge=1, le=4096)
    """Sequences per step."""
    learning_rate: float | None = Field(default=None, gt=0, le=10)
    """Step size of the inner optimizer; not set: the run's own."""
    precision: Precision | None = None
    """fp32, or lean: bfloat16 weights and a fraction of the memory; not set: lean from 100 million parameters on."""
    kept_layers: int | None = Field(default=None, ge=0)
    """Of so many last layers keep all that the backward pass needs, and compute the others twice: memory for time; not
    set: all of them in fp32, none in lean."""
    device: Device = "auto"
    """cpu, cuda, or auto for a GPU if torch sees one."""
    threads: int = Field(default=1, ge=1, le=256)
    """CPU threads for training."""
    nice: int = Field(default=5, ge=0, le=19)
    """By how much the training thread yields to others. Above 5 the node answers late on a busy machine: make the whole
    process yield instead (`nice -n 10 braniac-node join`, systemd's CPUWeight)."""


class DataSection(Section):
    """The text to train on."""

    paths: tuple[DataPath, ...] = ()
    """Files, folders, or hf://NAME[/CONFIG][:SPLIT][@REVISION]; empty: the code of the Python standard library."""
    tokenizer: UserPath | None = None
    """A tokenizer.json of Hugging Face; not set: the run's or the checkpoint's own, and bytes for what is new."""
    bad_shards: Literal["refuse", "skip"] = "refuse"
    """What to do about a .bin shard that is damaged or has tokens beyond the vocabulary: refuse to start or skip it."""
    hub_tokens: int = Field(default=100_000_000, ge=1)
    """How many tokens to take of each hf:// dataset, from its beginning."""
    cache_dir: UserPath = Field(default_factory=default_cache_dir)
    """Where texts are kept as tokens; any number of nodes may share it."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The paths that are on this machine."""
        return tuple(path for path in self.paths if isinstance(path, Path))

    @property
    def hub(self) -> tuple[str, ...]:
        """The others."""
        return tuple(path for path in self.paths if isinstance(path, str))


class StateSection(Section):
    """What survives a restart."""

    dir: StatePath = Field(default_factory=default_state_dir)
    """Folder with the key and the checkpoints; one node at a time."""
    keep_generations: int = Field(default=3, ge=1, le=100)
    """Checkpoints to keep; one is made with every contribution."""


class PolicySection(Section):
    """When to rest. A gate whose sensor is missing never rests the node."""

    on_battery: bool = True
    """Whether to train while the device runs on its battery."""
    battery_min_percent: float = Field(default=30.0, ge=0, le=100)
    """On battery, rest below this charge, until it is `battery_margin_percent` higher."""
    battery_margin_percent: float = Field(default=5.0, ge=0, le=50)
    """How far above the minimum the charge must be to go on."""
    battery_max_celsius: float = Field(default=42.0, ge=20, le=80)
    """Rest above this battery temperature, until it is `celsius_margin` lower."""
    cpu_max_celsius: float = Field(default=90.0, ge=40, le=120)
    """Rest above this processor temperature, until it is `celsius_margin` lower."""
    celsius_margin: float = Field(default=3.0, ge=0, le=20)
    """How far below a maximum a temperature must be to go on."""
    only_idle: bool = False
    """Whether to rest while somebody uses the device."""
    idle_s: float = Field(default=180.0, ge=1, le=86_400)
    """Nobody uses the device if there was no input for this long."""
    others_cpu_max_percent: float = Field(default=100.0, ge=1, le=100)
    """Rest while other programs use more than this share of all cores; 100: never."""
    metered: bool = True
    """Whether to work over a connection that is paid by the byte."""
    schedule: Annotated[tuple[Hours, ...], BeforeValidator(_whole_hours)] = ()
    """Local hours to work in, e.g. "mon-fri 20:00-06:00"; empty: always."""
    dwell_s: float = Field(default=60.0, ge=0, le=86_400)
    """Least time between resting and going on, and between going on and resting again."""
    sample_s: float = Field(default=5.0, ge=0.1, le=600)
    """Time between two looks at the sensors."""


class CapsSection(Section):
    """How much to use at most; 0 means no bound."""

    duty_percent: float = Field(default=100.0, ge=1, le=100)
    """Share of the time in which the training threads may compute."""
    memory_mib: int = Field(default=0, ge=0)
    """Resident memory: a tier that needs more is not chosen, and the node rests above it."""
    disk_mib: int = Field(default=0, ge=0)
    """Size of the state directory."""
    disk_free_min_mib: int = Field(default=256, ge=0)
    """Rest when less than this is free on the state directory's file system."""
    upload_kib_per_s: float = Field(default=0.0, ge=0)
    """Bytes sent to peers, on average over some seconds."""
    upload_pace: float = Field(default=0.0, ge=0)
    """How fast contributions and updates go out, in times of what slots ask for on average: 1.5 is even. 0: at once."""
    download_kib_per_s: float = Field(default=0.0, ge=0)
    """Bytes received from peers, on average over some seconds."""
    daily_mib: float = Field(default=0.0, ge=0)
    """Bytes exchanged with peers per local day; the node rests until midnight when they are used up."""


class WebSection(Section):
    """A page for people, on this machine only."""

    enabled: bool = False
    """Whether to serve it; `join --web` does."""
    port: int = Field(default=0, ge=0, le=65535)
    """Port on the loopback address; 0 takes any free one and logs it."""


class MetricsSection(Section):
    """The Prometheus endpoint."""

    enabled: bool = True
    """Whether to serve /metrics, /healthz and /readyz."""
    host: str = Field(default="127.0.0.1", min_length=1)
    """Address to serve on; loopback by default, because metrics are nobody else's business."""
    port: int = Field(default=0, ge=0, le=65535)
    """Port to serve on; 0 takes any free one and logs it."""


class LogSection(Section):
    """What the node writes to stderr."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least important messages to show."""
    format: Literal["auto", "console", "json"] = "auto"
    """console: readable lines; json: one object per line; auto: readable, coloured on a terminal only."""
    file: bool = True
    """Whether to write it as JSON to `logs/node.log` in the state directory too, for `braniac-node logs`."""
    file_mib: float = Field(default=5.0, gt=0, le=1024)
    """Size at which that file is set aside and a new one begun."""
    files_kept: int = Field(default=3, ge=1, le=100)
    """How many of them to keep."""


class NodeConfig(Root):
    """Everything that can be set about a node."""

    ENVIRONMENT_PREFIX: ClassVar[str] = "BRANIAC_NODE__"
    SHOWN_BY: ClassVar[str] = "braniac-node config show"
    SYSTEMD_FOLDERS: ClassVar[Mapping[str, tuple[str, str]]] = {
        "STATE_DIRECTORY": ("state", "dir"),
        "CACHE_DIRECTORY": ("data", "cache_dir"),
    }
    DEFAULT_FILE: ClassVar[Callable[[], Path] | None] = default_config_file

    network: NetworkSection = NetworkSection()
    run: RunSection = RunSection()
    train: TrainSection = TrainSection()
    data: DataSection = Field(default_factory=DataSection)
    state: StateSection = Field(default_factory=StateSection)
    policy: PolicySection = PolicySection()
    caps: CapsSection = CapsSection()
    web: WebSection = WebSection()
    metrics: MetricsSection = MetricsSection()
    log: LogSection = LogSection()

    @property
    def control_socket(self) -> Path:
        """Where `status`, `peers` and `leave` reach this node's daemon."""
        return control_socket_path(self.state.dir)
