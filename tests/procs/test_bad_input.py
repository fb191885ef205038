"""What a person, a machine or a peer can get wrong: one sentence and an exit code, or the node goes on."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import resource
import shutil
import socket
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from braniac.node.control_pb2 import StatusReply
from braniac.node.p2pd import P2pdOptions
from braniac.node.transport import Unreachable
from braniac.node.transport_libp2p import LibP2PTransport
from braniac.protocol import messages_pb2 as pb
from braniac.protocol.identity import Identity, PeerId
from braniac.protocol.messages import Heartbeat
from braniac.protocol.wire import seal
from tests.procs.helpers import Node, Nodes, command, nodes_below, until

STRANGER = "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"
LOCAL = P2pdOptions(listen=("/ip4/127.0.0.1/tcp/0",))

pytestmark = pytest.mark.timeout(300)  # a busy machine needs longer than most tests may take


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    yield from nodes_below(tmp_path)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A daemon that founded a run and trains; whatever the tests do to it, it goes on and leaves cleanly."""
    for nodes in nodes_below(tmp_path_factory.mktemp("live")):
        node = nodes.make("a").start()
        node.training()
        yield node
        node.training()
        assert node.stop() == 0
        assert node.words() == []


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port on which somebody else listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


# --- what a person types ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["rubbish", "/ip4/127.0.0.1/tcp/4001"])
def test_a_wrong_address_is_refused(nodes: Nodes, address: str) -> None:
    assert repr(address) in nodes.make("a").start(peers=address).failed(2)


def test_an_unknown_setting_is_refused(nodes: Nodes) -> None:
    sentence = nodes.make("a").start("--set", "train.bacth=4").failed(2)
    assert "did you mean" in sentence
    assert "train.batch" in sentence


def test_a_missing_text_is_refused_even_before_the_run_is_found(nodes: Nodes, tmp_path: Path) -> None:
    nobody = f"/ip4/127.0.0.1/tcp/9/p2p/{STRANGER}"
    sentence = nodes.make("a").start("--data", tmp_path / "nowhere", peers=nobody).failed(2)
    assert f"{tmp_path / 'nowhere'} does not exist" in sentence


def test_a_text_shorter_than_a_batch_is_refused(nodes: Nodes, tmp_path: Path) -> None:
    nodes.data = tmp_path / "short.txt"
    nodes.data.write_text("too short")
    assert "short.txt" in nodes.make("a").start().failed(2)


def test_ports_in_use_are_named(nodes: Nodes, taken_port: int) -> None:
    sentence = nodes.make("metrics").start("--metrics-port", taken_port).failed(7)
    assert str(taken_port) in sentence
    assert "--metrics-port" in sentence
    assert str(taken_port) in nodes.make("listen").start(listen=f"/ip4/127.0.0.1/tcp/{taken_port}").failed(7)


def test_a_state_directory_is_for_one_node(live: Node) -> None:
    second = command("join", "--state-dir", live.state_dir, "--data", live.data)
    assert second.returncode == 4
    assert second.stderr.splitlines() == [
        f"braniac-node: {live.state_dir} is held by process {live.pid}: stop it, or choose another --state-dir"
    ]


# --- peers that are not there, or not the right ones -----------------------------------------------------------------


def test_an_unreachable_peer_is_tried_for_ever_and_named(nodes: Nodes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    address = f"/ip4/127.0.0.1/tcp/{port}/p2p/{STRANGER}"
    node = nodes.make("a").start(peers=address)
    status = node.until(lambda s: f"{address}: " in s.state_reason, "the address that fails")
    assert status.state == "joining"
    assert "0 peers" in status.state_reason
    shown = command("status", "--state-dir", node.state_dir)
    assert shown.returncode == 0
    assert "joining: 0 peers" in shown.stdout
    until(lambda: len(node.logged("degraded: 0 peers")) > 1, "a second attempt")
    assert node.stop() == 0
    assert node.words() == []


def test_the_wrong_run_is_refused(live: Node, nodes: Nodes) -> None:
    sentence = nodes.make("pinned").start("--run-id", "0" * 64, peers=live.address).failed(5)
    status = live.training()
    assert status.run_id[:12] in sentence
    other = nodes.make("other").start()
    other.until(lambda s: s.generation, "a generation")
    other.kill()
    before = len(other.logged("resuming"))
    sentence = other.start(peers=live.address).failed(5)
    assert status.run_id[:12] in sentence
    assert "--state-dir" in sentence
    assert len(other.logged("resuming")) == before + 1
    assert "000000000000" in other.start("--run-id", "0" * 64).failed(5)


async def test_another_protocol_version_is_refused(nodes: Nodes, tmp_path: Path) -> None:
    async def answer(peer: PeerId, request: bytes) -> bytes:
        body = json.dumps({"protocol": 999}).encode()
        signed_manifest = pb.SignedManifest(body=body, signature=bytes(64)).SerializeToString()
        return pb.Reply(manifest=signed_manifest).SerializeToString()

    future = await LibP2PTransport.start(tmp_path / "future.key", LOCAL)
    try:
        await future.serve(answer)
        node = nodes.make("a").start(peers=future.addresses()[0])
        sentence = await asyncio.to_thread(node.failed, 5)
    finally:
        await future.close()
    assert "999" in sentence
    assert "install" in sentence


def test_a_copy_of_a_state_directory_ends_one_of_the_two(live: Node, nodes: Nodes) -> None:
    original = nodes.make("original").start(peers=live.address)
    original.until(lambda s: s.state == "training" and s.generation and s.peers_live, "training")
    assert original.stop() == 0
    copy = nodes.make("copy")
    shutil.copytree(original.state_dir, copy.state_dir)
    original.start(peers=live.address).until(lambda s: s.state == "training" and s.peers_live, "the original")
    copy.start(peers=live.address)
    sentence = original.failed(6)  # the copy was started last, so peers listen to it
    assert "identity" in sentence
    before = live.training()
    after = live.until(lambda s: s.certificates > before.certificates + 2, "certificates as before")
    assert after.state == "training"
    copy.until(lambda s: s.peers_live and s.certificates, "the copy to take part")
    assert copy.stop() == 0


# --- a machine that fails --------------------------------------------------------------------------------------------


def test_a_full_disk_stops_checkpoints_and_not_training(nodes: Nodes) -> None:
    node = nodes.make("a").start()
    before = node.training()
    psutil.Process(node.pid).rlimit(psutil.RLIMIT_FSIZE, (64 * 1024, resource.RLIM_INFINITY))
    full = node.until(lambda s: s.state == "degraded" and "free some space" in s.state_reason, "the trouble to be told")
    later = node.until(lambda s: s.steps > full.steps + 5 and s.slot > full.slot + 2, "training to go on")
    assert later.generation <= full.generation
    assert sample(node, "braniac_checkpoint_failures_total") >= 1
    psutil.Process(node.pid).rlimit(psutil.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    well = node.until(
        lambda s: s.generation > full.generation and s.certificates > later.certificates, "new generations"
    )
    assert "free some space" not in well.state_reason
    assert well.certificates > before.certificates
    assert node.stop() == 0


def test_damaged_state_falls_back_generation_by_generation(nodes: Nodes) -> None:
    node = nodes.make("a").start()
    node.until(lambda s: s.generation >= 3, "three generations")
    node.kill()
    while share_weights(manifests := generations(node)):  # no step was done between two of them: damage would hit both
        at_least = 3 + int(manifests[-1].stem)
        node.start().until(lambda s, n=at_least: s.generation >= n, "three more generations")
        node.kill()
    newest, second = json.loads(manifests[-1].read_text()), json.loads(manifests[-2].read_text())
    manifests[-1].write_bytes(manifests[-1].read_bytes()[:-20])
    only_in_second = weights_of(second) - weights_of(newest)
    for digest in only_in_second:
        flip_bit(node.state_dir / "blobs" / digest[:2] / digest)
    status = node.start().training()
    passed = [entry["generation"] for entry in node.logged("passed over a damaged generation")]
    assert passed == [int(manifests[-1].stem), int(manifests[-2].stem)]
    assert node.logged("resuming")[-1]["generation"] == int(manifests[-3].stem)
    assert status.generation > int(manifests[-1].stem)
    node.kill()
    for path in (node.state_dir / "generations").glob("*.json"):
        flip_bit(path)
    sentence = node.start().failed(8)
    assert "--state-dir" in sentence
    assert list((node.state_dir / "blobs").iterdir())  # nothing was thrown away


def generations(node: Node) -> list[Path]:
    """The three newest manifests, the newest last."""
    return sorted((node.state_dir / "generations").glob("*.json"))[-3:]


def share_weights(manifests: list[Path]) -> bool:
    """Whether two of the generations hold the very same weights."""
    return len({json.loads(path.read_text())["content"]["weights"] for path in manifests}) < len(manifests)


def weights_of(manifest: dict[str, Any]) -> set[str]:
    """Digests of a generation's weights and optimizer state."""
    content = manifest["content"]
    return {content["weights"], content["optimizer"]}


def flip_bit(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# --- any bytes on the wire -------------------------------------------------------------------------------------------


async def test_any_bytes_on_the_wire_are_counted_and_refused(live: Node, tmp_path: Path) -> None:
    status = await asyncio.to_thread(live.training)
    before = counts(live)
    rng = random.Random(1)
    identity = Identity.from_seed(hashlib.sha256(b"a stranger").digest())
    run_id = bytes.fromhex(status.run_id)
    requests = [hostile_request(rng, identity, run_id, number) for number in range(400)]
    requests += [b"", bytes(1 << 20), seal_in_request(poisoned_heartbeat(identity, run_id, status))]
    answers: Counter[str] = Counter()
    stranger = await LibP2PTransport.start(tmp_path / "stranger.key", LOCAL)
    try:
        peer = await stranger.connect(status.addresses[0], timeout_s=10)
        for start in range(0, len(requests), 8):
            batch = [ask(stranger, peer, request) for request in requests[start : start + 8]]
            answers.update(await asyncio.gather(*batch))
    finally:
        await stranger.close()
    assert sum(answers.values()) == len(requests)
    assert answers["malformed"] > 50
    assert answers["bad_signature"] > 10
    assert set(answers) >= {"", "wrong_run"}
    after = counts(live)
    assert after["received"] - before["received"] >= answers["malformed"] + answers["bad_signature"]
    assert after["refused"] - before["refused"] >= answers["malformed"] + answers["bad_signature"]
    assert after["received"] == after["accepted"] + after["refused"]
    await asyncio.to_thread(live.until, lambda s: s.certificates > status.certificates + 1, "certificates as before")


def test_addresses_that_peers_made_up_do_not_survive_a_restart(live: Node) -> None:
    before = live.training()
    assert live.stop() == 0
    assert live.start().training().run_id == before.run_id


def hostile_request(rng: random.Random, identity: Identity, run_id: bytes, number: int) -> bytes:
    """Random bytes, mutated requests, and well-signed nonsense."""
    match number % 5:
        case 0:
            return rng.randbytes(rng.randrange(300))
        case 1:
            return mutated(rng, seal_in_request(seal(identity, run_id, number, Heartbeat(0, 3, -1, (), (), (), 0.0))))
        case 2:  # signed correctly, whatever is inside
            content = pb.Content(run_id=run_id, sender=identity.peer_id, sequence=number).SerializeToString()
            return signed(identity, mutated(rng, content) if number % 2 else content + rng.randbytes(60))
        case 3:
            other_run = rng.randbytes(32)
            return seal_in_request(seal(identity, other_run, number, Heartbeat(0, 3, -1, (), (), (), 0.0)))
        case _:
            digest = rng.randbytes(rng.choice((0, 31, 32)))
            chunk = pb.ChunkRequest(digest=digest, offset=rng.getrandbits(64), length=rng.getrandbits(32))
            return pb.Request(chunk=chunk).SerializeToString()


def mutated(rng: random.Random, data: bytes) -> bytes:
    """With a few bytes changed, or cut short."""
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 6)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed[: rng.randrange(1, len(changed) + 1)] if rng.random() < 0.3 else changed)


def signed(identity: Identity, content: bytes) -> bytes:
    """A request with an envelope whose signature is right."""
    envelope = pb.Envelope(content=content, signature=identity.sign(b"envelope", content))
    return seal_in_request(envelope.SerializeToString())


def seal_in_request(envelope: bytes) -> bytes:
    """A request that carries an envelope."""
    return pb.Request(envelope=envelope).SerializeToString()


def poisoned_heartbeat(identity: Identity, run_id: bytes, status: StatusReply) -> bytes:
    """A newcomer whose addresses are not addresses, or another peer's."""
    addresses = ("nonsense", f"/ip4/127.0.0.1/tcp/9/p2p/{STRANGER}", "/ip4/127.0.0.1/tcp/0")
    return seal(identity, run_id, 1 << 40, Heartbeat(status.slot, 3, -1, addresses, (), (), 0.0))


async def ask(transport: LibP2PTransport, peer: PeerId, request: bytes) -> str:
    """The refusal in the reply: empty if it was accepted, "dropped" if there was none."""
    try:
        return pb.Reply.FromString(await transport.call(peer, request, timeout_s=20)).refusal
    except Unreachable:
        return "dropped"


def page(node: Node) -> str:
    """A node's /metrics."""
    with urllib.request.urlopen(node.logged("serving metrics")[-1]["url"], timeout=20) as response:
        body: bytes = response.read()
    return body.decode()


def sample(node: Node, name: str) -> float:
    """The sum of a metric over its labels."""
    families = text_string_to_metric_families(page(node))
    return sum(sample.value for family in families for sample in family.samples if sample.name == name)


def counts(node: Node) -> dict[str, float]:
    """How many messages were received, accepted, refused; of one look."""
    found: dict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(page(node)):
        for each in family.samples:
            found[each.name] += each.value
    return {kind: found[f"braniac_messages_{kind}_total"] for kind in ("received", "accepted", "refused")}
