"""Targets for what node/ reads: requests and replies of peers, links, the web page's requests, and its own files.

A file that another program could have damaged must be refused in one sentence, as must what a person typed.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import hashlib
import json
import math
import tempfile
from collections.abc import Iterable
from pathlib import Path

import h11
from google.protobuf.message import DecodeError

from braniac.model.errors import DataError, ModelError
from braniac.node import bridge, costs, identity_file, log_view, logs, run_data, run_file, web
from braniac.node import control_pb2 as control_messages
from braniac.node.checkpoint import from_generation, to_content
from braniac.node.clock import FakeClock
from braniac.node.commands import json_text, message_dict
from braniac.node.config import DataSection, NodeConfig, StateSection
from braniac.node.control import PAUSE_S_MAX
from braniac.node.daily_meter import DailyMeter
from braniac.node.directory import Record, RecordValidator
from braniac.node.errors import ConfigError, IdentityFileError, NodeError, StateError
from braniac.node.exchange import BlobUnavailable
from braniac.node.generation import Generation, decode_manifest, encode_manifest
from braniac.node.join_link import link_for, parse_link
from braniac.node.replies import status_text
from braniac.node.run_example import EXAMPLE
from braniac.node.run_spec import manifest_of, read_spec
from braniac.node.settings_merge import load_config, render_toml
from braniac.node.store import Store
from braniac.node.transport import Unreachable, parse_address
from braniac.node.transport_memory import MemoryNetwork
from braniac.protocol import limits, wire
from braniac.protocol import messages_pb2 as pb
from braniac.protocol.errors import ManifestError, ProtocolError, WireError
from braniac.protocol.identity import PeerId, peer_id_text
from braniac.protocol.manifest import open_manifest, sign_manifest, to_json
from braniac.protocol.messages import Goodbye, Heartbeat
from tests.fuzz.files import file_of, folder
from tests.fuzz.target import Target
from tests.unit.exchange_nodes import Node
from tests.unit.node_harness import EPOCH_S, SETTINGS, identity, make_manifest, write_run
from tests.unit.test_directory import KEY, DhtRecord, address, packed

FOUNDER, PEER = identity(0), identity(1)
MANIFEST = make_manifest(FOUNDER)
BLOB = bytes(range(256)) * 40
ADDRESS = address(PEER.peer_id)


@functools.cache
def loop() -> asyncio.AbstractEventLoop:
    made = asyncio.new_event_loop()
    atexit.register(made.close)
    return made


# --- peers ---------------------------------------------------------------------------------------------------------


@functools.cache
def node() -> Node:
    """One that takes part in a run and holds a blob."""
    made = Node(MemoryNetwork(), folder(), 0)
    made.take_part()
    made.store.put(BLOB)
    atexit.register(made.store.close)
    return made


def request(data: bytes) -> bool:
    """A request is answered, whatever it is, and the answer fits into a message."""
    reply = pb.Reply.FromString(loop().run_until_complete(node().exchange.answer(PEER.peer_id, data)))
    assert reply.ByteSize() <= limits.MESSAGE_BYTES_MAX
    assert len(reply.chunk) <= limits.CHUNK_BYTES_MAX
    assert not reply.chunk or reply.chunk in BLOB
    return not reply.refusal


def request_seeds() -> Iterable[bytes]:
    digest = hashlib.sha256(BLOB).digest()
    yield pb.Request(chunk=pb.ChunkRequest(digest=digest, offset=256, length=4096)).SerializeToString()
    yield pb.Request(manifest=pb.ManifestRequest(protocol_version=1)).SerializeToString()
    yield pb.Request(dial_back=pb.DialBackRequest()).SerializeToString()
    for message in (Heartbeat(0, 1, 0, addresses=(ADDRESS,)), Goodbye(3)):
        yield pb.Request(envelope=wire.seal(PEER, MANIFEST.run_id, 7, message)).SerializeToString()


class OneReply:
    """A transport whose peer says the same to everything."""

    peer_id = FOUNDER.peer_id

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def call(self, peer: PeerId, request: bytes, *, timeout_s: float) -> bytes:
        return self._data


def reply(data: bytes) -> bool:
    """Whatever a peer replies to the three questions that we ask."""
    exchange, transport = node().exchange, OneReply(data)
    chunk = pb.ChunkRequest(digest=hashlib.sha256(BLOB).digest(), offset=0, length=4096)
    taken = False
    questions = (
        (exchange.ask_manifest(transport, PEER.peer_id), (Unreachable, ManifestError)),  # type: ignore[arg-type]
        (exchange.ask_chunk(transport, PEER.peer_id, chunk, len(BLOB), "blob"), (Unreachable, BlobUnavailable)),  # type: ignore[arg-type]
        (exchange.ask_dial_back(transport, PEER.peer_id), (Unreachable, WireError)),  # type: ignore[arg-type]
    )
    for question, refusals in questions:
        try:
            loop().run_until_complete(question)
            taken = True
        except refusals:
            pass
    assert math.isfinite(node().swarm_clock.now())
    return taken


def reply_seeds() -> Iterable[bytes]:
    body, signature = sign_manifest(MANIFEST, FOUNDER)
    signed = pb.SignedManifest(body=body, signature=signature).SerializeToString()
    yield pb.Reply(chunk=BLOB[:4096], blob_bytes=len(BLOB), swarm_time_s=EPOCH_S).SerializeToString()
    yield pb.Reply(manifest=signed).SerializeToString()
    yield pb.Reply(dial_back=pb.DialBack(answered=[ADDRESS])).SerializeToString()
    yield pb.Reply(refusal="stale").SerializeToString()


def run(data: bytes) -> bool:
    """A signed manifest, as far as a node looks at it before it downloads anything."""
    try:
        manifest = open_manifest(data, FOUNDER.sign(b"manifest", data))
        model, _ = bridge.model_of(manifest)
        run_data.run_data(manifest)
    except (ManifestError, NodeError, ModelError):
        return False
    assert len(costs.costs_of(manifest, model, SETTINGS, generations=3)) == manifest.tiers
    return True


def record(data: bytes) -> bool:
    """The value of a directory record that a peer has signed, and the same as a record without its frame."""
    clock = FakeClock()
    unsigned = DhtRecord(KEY, packed(PEER.peer_id), data, clock.wall() + 60)
    value = RecordValidator(PEER, KEY, clock).sign_value(unsigned)
    taken = RecordValidator(FOUNDER, KEY, clock).validate(DhtRecord(KEY, unsigned.subkey, value, clock.wall() + 60))
    try:
        found = Record.decode(PEER.peer_id, data)
    except (ValueError, ConfigError):
        return taken
    assert Record.decode(PEER.peer_id, found.encode()) == found
    return True


def record_seeds() -> Iterable[bytes]:
    data = Record((ADDRESS, address(PEER.peer_id, 9)), tier=2, version=1).encode()
    return [packed(data), data, Record((), 0, 0).encode()]


# --- what people type or click -------------------------------------------------------------------------------------


def link(data: bytes) -> bool:
    """A link has one spelling."""
    text = data.decode("utf-8", errors="surrogateescape")
    try:
        found = parse_link(text)
    except ConfigError:
        return False
    assert str(found) == text.strip()
    assert len(found.addresses) <= limits.ADDRESSES_MAX
    return True


def link_seeds() -> Iterable[bytes]:
    run_id = MANIFEST.run_id.hex()
    relay = (
        f"/dns4/relay.example/tcp/443/p2p/{peer_id_text(FOUNDER.peer_id)}/p2p-circuit/p2p/{peer_id_text(PEER.peer_id)}"
    )
    for addresses in ([ADDRESS], [ADDRESS, relay]):
        yield str(link_for(run_id, addresses)).encode()


def peer_address(data: bytes) -> bool:
    """A multiaddr, as people type it and peers send it."""
    text = data.decode("utf-8", errors="surrogateescape")
    try:
        peer, before = parse_address(text)
    except ConfigError:
        return False
    assert f"{before}/p2p/{peer_id_text(peer)}" == text
    return True


def settings(data: bytes) -> bool:
    """A file of settings. What it amounts to is written and read back unchanged."""
    try:
        config = load_config(NodeConfig, file_of("node.toml", data), {}, [], {})
    except ConfigError:
        return False
    again = load_config(NodeConfig, file_of("again.toml", render_toml(config).encode()), {}, [], {})
    assert again == config
    return True


def settings_seeds() -> Iterable[bytes]:
    places = StateSection(dir=Path("/var/lib/braniac")), DataSection(cache_dir=Path("/var/cache/braniac"))
    everything = NodeConfig(state=places[0], data=places[1])
    return [render_toml(everything).encode(), b"[train]\nbatch = 4\n"]


def spec(data: bytes) -> bool:
    """The description of a run in YAML; whoever founds it gets a manifest that everybody else takes."""
    try:
        manifest, body, signature = manifest_of(read_spec(file_of("run.yaml", data)), FOUNDER, EPOCH_S)
    except (ConfigError, DataError):
        return False
    assert open_manifest(body, signature) == manifest
    return True


class Watched:
    """A daemon that only notes what it is told."""

    def __init__(self) -> None:
        self.pauses: list[float] = []

    def status(self, since_slot: int) -> control_messages.StatusReply:
        assert 0 <= since_slot < 1 << 64
        return control_messages.StatusReply(state="training")

    def pause(self, seconds: float, finish: bool) -> None:
        self.pauses.append(seconds)

    def resume(self) -> control_messages.ResumeReply:
        return control_messages.ResumeReply()


class Sink:
    """The writing end of a connection that nobody reads."""

    def __init__(self) -> None:
        self.written = b""

    def write(self, data: bytes) -> None:
        self.written += data

    async def drain(self) -> None:
        pass

    def close(self) -> None:
        pass

    async def wait_closed(self) -> None:
        pass


def page(data: bytes) -> bool:
    """Bytes on a connection to the web page, then its end."""

    async def exchange() -> tuple[Watched, bytes]:
        source, sink = Watched(), Sink()
        server = web.WebServer(source, 80, watch_s=0.0, new_secret=lambda: "secret")  # type: ignore[arg-type]
        reader = asyncio.StreamReader(limit=1 << 13)
        reader.feed_data(data)
        reader.feed_eof()
        with contextlib.suppress(TimeoutError, ConnectionError):  # which BoundedServer expects
            await server._exchange(reader, sink)  # type: ignore[arg-type]
        return source, sink.written

    source, written = loop().run_until_complete(exchange())
    assert all(0 <= seconds <= PAUSE_S_MAX for seconds in source.pauses)
    if not written:
        return False
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="GET", target="/", headers=[("Host", "any")]))
    client.receive_data(written)
    response = client.next_event()
    assert isinstance(response, h11.Response)
    return response.status_code == 200


def page_seeds() -> Iterable[bytes]:
    head = "Host: 127.0.0.1:80\r\n"
    for path in ("/", "/api/status?since_slot=7", "/api/watch"):
        yield f"GET {path} HTTP/1.1\r\n{head}\r\n".encode()
    own = f"{head}Origin: http://127.0.0.1:80\r\nContent-Type: application/json\r\nX-Braniac-Token: secret\r\n"
    for path, body in (("/api/pause", '{"seconds": 60, "finish": true}'), ("/api/resume", "{}")):
        yield f"POST {path} HTTP/1.1\r\n{own}Content-Length: {len(body)}\r\n\r\n{body}".encode()


def control(data: bytes) -> bool:
    """A daemon's reply on the control socket, as commands print it."""
    try:
        found = control_messages.StatusReply.FromString(data)
    except DecodeError:
        return False
    status_text(found).encode()
    assert isinstance(json.loads(json_text(message_dict(found))), dict)
    return True


def control_seeds() -> Iterable[bytes]:
    full = control_messages.StatusReply(
        state="training", slot=3, train_loss=2.5, refused={"stale": 1}, peers_by_tier={2: 1}
    )
    full.reasons.add(code="manual", sentence="paused", until_s=3.5)
    full.slots.add(slot=3, outcome="merged")
    return [full.SerializeToString()]


# --- its own files -------------------------------------------------------------------------------------------------


def generation(data: bytes) -> bool:
    """The manifest of a generation. It has one spelling."""
    try:
        found = decode_manifest(7, data)
    except ValueError:
        return False
    assert encode_manifest(found) == data
    return True


def content_of_generation(data: bytes) -> bool:
    """What a generation says, under a hash that matches: another version of this program may have written it."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return False
    if not isinstance(document, dict):
        return False
    try:
        saved = from_generation(Generation(7, document, ()))
    except StateError:
        return False
    once = to_content(saved, saved.history.to_json())
    again = from_generation(Generation(7, json.loads(json.dumps(once)), ()))
    assert to_content(again, again.history.to_json()) == once
    return True


@functools.cache
def a_generation() -> Generation:
    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        identity_file_of(root / "identity.key")
        write_run(root, 1000, epoch_s=EPOCH_S)
        found = Store.look(root).recover()
    assert found is not None
    return found


def identity_file_of(path: Path) -> None:
    path.write_bytes(identity_file.encode(FOUNDER))
    path.chmod(0o600)


def generation_seeds() -> Iterable[bytes]:
    yield encode_manifest(Generation(7, {"deep": {"a": [None, True, 1e-9, "é"]}, "step": 3}, (bytes(32),)))
    yield encode_manifest(Generation(7, {}, ()))


def key(data: bytes) -> bool:
    """A key file. It has one spelling."""
    try:
        found = identity_file.load(file_of("identity.key", data))
    except IdentityFileError:
        return False
    assert identity_file.encode(found) == data
    return True


def signed_run(data: bytes) -> bool:
    """A run file, as founders hand it out."""
    try:
        manifest, signed = run_file.read(file_of("run.braniac", data))
    except (ConfigError, ProtocolError):
        return False
    assert open_manifest(*signed) == manifest
    return True


def signed_run_seeds() -> Iterable[bytes]:
    yield json.dumps({"braniac_run": 1, **to_json(*sign_manifest(MANIFEST, FOUNDER))}).encode()


def traffic(data: bytes) -> bool:
    """The day's traffic: what cannot be read counts as nothing."""
    meter = DailyMeter(file_of("traffic.json", data), FakeClock())
    assert 0 <= meter.used_bytes() < 1 << 62
    return meter.used_bytes() > 0


def log_line(data: bytes) -> bool:
    """A line of a log file on a terminal: no control character but the line's own colours and breaks gets there."""
    text = data.decode("utf-8", errors="replace")
    shown = logs.render_line(text, colors=False)
    assert all(character.isprintable() or character == "\n" for character in shown), shown
    path = file_of("node.log", text.encode() + b"\n")
    return bool(list(log_view.lines(path, 5, "info")))


TARGETS = {
    "request": Target(request, request_seeds),
    "reply": Target(reply, reply_seeds, 8192),
    "run": Target(run, lambda: [sign_manifest(MANIFEST, FOUNDER)[0]]),
    "record": Target(record, record_seeds, 1200),
    "link": Target(link, link_seeds, 3000),
    "address": Target(peer_address, lambda: [ADDRESS.encode()], 300),
    "settings": Target(settings, settings_seeds, 16384),
    "spec": Target(spec, lambda: [EXAMPLE.encode(), b"name: mine\nmodel: {preset: tiny}\n"]),
    "page": Target(page, page_seeds, 16384),
    "control": Target(control, control_seeds),
    "generation": Target(generation, generation_seeds),
    "content_of_generation": Target(content_of_generation, lambda: [json.dumps(a_generation().content).encode()], 8192),
    "key": Target(key, lambda: [identity_file.encode(FOUNDER)], 80),
    "signed_run": Target(signed_run, signed_run_seeds),
    "traffic": Target(
        traffic,
        lambda: [b'{"day": "2023-11-15", "sent_bytes": 5, "received_bytes": 7}'],
        256,
    ),
    "log_line": Target(
        log_line,
        lambda: [b'{"event": "slot 3", "level": "info", "timestamp": "2026-01-01T00:00:00Z", "slot": 3}'],
        2048,
    ),
}
