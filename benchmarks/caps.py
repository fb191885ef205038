"""Whether the caps on rate and quota hold on the wire: two real libp2p peers in two network namespaces.

    sudo .venv/bin/python benchmarks/caps.py --json

A veth pair joins the namespaces; one peer serves blobs, the other downloads them as fast as its caps allow, and both
send messages meanwhile. What the kernel counted on the interface, headers and acknowledgements included, is compared
with the cap. Segmentation offload is off, so that the counters see the packets that a real wire would carry.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import structlog

from braniac.node import identity_file
from braniac.node.blobs import Blobs
from braniac.node.clock import SwarmClock, SystemClock
from braniac.node.config import CapsSection, RunSection
from braniac.node.daily_meter import DailyMeter
from braniac.node.exchange import BlobUnavailable, Exchange
from braniac.node.founding import found_run
from braniac.node.metrics import Metrics
from braniac.node.p2pd import P2pdOptions
from braniac.node.store import Store
from braniac.node.throttle import Throttle
from braniac.node.transport_libp2p import LibP2PTransport
from braniac.protocol.engine import Engine
from braniac.protocol.history import History
from braniac.protocol.identity import Identity, peer_id_text

_HOSTS = ("10.99.7.1", "10.99.7.2")
_PORT = 4001
_BLOB_BYTES = 3_000_000
_MESSAGE_BYTES = 2_000  # a heartbeat of a run with 24 fragments
_MESSAGE_S = 1.0


@dataclass(frozen=True)
class Case:
    """What is bounded, and on which side."""

    name: str
    upload_kib_per_s: float = 0.0  # of the peer that serves
    download_kib_per_s: float = 0.0  # of the peer that downloads
    daily_mib: float = 0.0  # of the peer that downloads
    seconds: float = 30.0

    @property
    def rate_bytes_per_s(self) -> float:
        """0 without one."""
        return 1024 * (self.upload_kib_per_s or self.download_kib_per_s)

    @property
    def blobs(self) -> int:
        """Enough for all that may be moved, and a few more."""
        return 3 + int(max(self.rate_bytes_per_s * self.seconds, self.daily_mib * (1 << 20)) / _BLOB_BYTES)


CASES = (
    Case("upload 64 KiB/s", upload_kib_per_s=64),
    Case("upload 512 KiB/s", upload_kib_per_s=512),
    Case("download 256 KiB/s", download_kib_per_s=256),
    Case("download 2048 KiB/s", download_kib_per_s=2048),
    Case("daily 20 MiB", daily_mib=20),
)


class Peer:
    """One end: transport and exchange, in a namespace of its own as one process."""

    def __init__(self, root: Path, transport: LibP2PTransport, identity: Identity, caps: CapsSection) -> None:
        clock = SystemClock()
        self.identity = identity
        self.transport = transport
        self.store = Store.open(root / "state")
        self.meter = DailyMeter(None, clock)
        metrics, throttle = Metrics("benchmark", 1), Throttle(caps, clock, self.meter)
        self.exchange = Exchange(self.store, metrics, clock, SwarmClock(clock), 20.0, throttle)
        self.blobs = Blobs(self.store, self.exchange, metrics, clock)

    @classmethod
    async def start(cls, root: Path, host: str, caps: CapsSection) -> Peer:
        identity = identity_file.load_or_create(root / "identity.key")
        options = P2pdOptions(listen=(f"/ip4/{host}/tcp/{_PORT}",))
        transport = await LibP2PTransport.start(root / "identity.key", options)
        peer = cls(root, transport, identity, caps)
        await transport.serve(peer.exchange.answer)
        return peer


async def serve(root: Path, host: str, caps: CapsSection, blobs: int) -> None:
    """Put blobs into a store, tell their names, serve them until stdin ends."""
    peer = await Peer.start(root, host, caps)
    manifest, _, _ = found_run(RunSection(), peer.identity, time.time())
    peer.exchange.engine = Engine(manifest, peer.identity, 0, incarnation=1, now=time.time(), history=History(manifest))
    print(json.dumps({"address": f"/ip4/{host}/tcp/{_PORT}/p2p/{peer_id_text(peer.transport.peer_id)}"}), flush=True)
    blob = bytearray(secrets.token_bytes(_BLOB_BYTES))
    for number in range(blobs):
        blob[:8] = number.to_bytes(8)
        peer.store.put(bytes(blob))
        if number == 0:
            (root / "blob").write_bytes(blob)
    print("{}", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await peer.transport.close()


async def download(root: Path, caps: CapsSection, server: Path, address: str, case: Case) -> None:
    """Fetch one blob after the other; print what came of it."""
    peer = await Peer.start(root, _HOSTS[1], caps)
    holder = await peer.transport.connect(address, timeout_s=10)
    blob = bytearray((server / "blob").read_bytes())
    got, refused = 0, ""
    print("{}", flush=True)
    await asyncio.to_thread(sys.stdin.readline)

    def count(more: int) -> None:
        nonlocal got
        got += more

    async def chatter() -> None:
        while True:
            await peer.exchange.send(peer.transport, holder, bytes(_MESSAGE_BYTES))
            await asyncio.sleep(_MESSAGE_S)

    talk = asyncio.create_task(chatter())
    try:
        async with asyncio.timeout(case.seconds):
            for number in range(case.blobs):
                blob[:8] = number.to_bytes(8)
                digest = hashlib.sha256(blob).digest()
                await peer.blobs.fetch(peer.transport, digest, len(blob), [holder], "blob", count)
    except TimeoutError:
        pass
    except BlobUnavailable as error:
        refused = str(error)
    print(json.dumps({"payload_bytes": got, "ended": refused, "counted_bytes": peer.meter.used_bytes()}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    talk.cancel()
    await peer.transport.close()


def shell(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


@contextlib.contextmanager
def namespaces() -> Iterator[tuple[str, str]]:
    """Two namespaces, joined by a veth pair, removed at the end."""
    names = tuple(f"caps{os.getpid()}{side}" for side in "ab")
    made: list[str] = []
    try:
        for name in names:
            shell("ip", "netns", "add", name)
            made.append(name)
        shell("ip", "link", "add", "v0", "netns", names[0], "type", "veth", "peer", "name", "v0", "netns", names[1])
        for name, host in zip(names, _HOSTS, strict=True):
            shell("ip", "-n", name, "addr", "add", f"{host}/24", "dev", "v0")
            shell("ip", "-n", name, "link", "set", "v0", "gso_max_segs", "1", "gso_max_size", "1514")
            shell("ip", "-n", name, "link", "set", "v0", "up")
            shell("ip", "-n", name, "link", "set", "lo", "up")
        yield names[0], names[1]
    finally:
        for name in made:
            shell("ip", "netns", "del", name)


def wire(namespace: str) -> tuple[int, int]:
    """(sent, received) bytes on the interface, with Ethernet headers."""
    stats = json.loads(shell("ip", "-n", namespace, "-s", "-j", "link", "show", "dev", "v0"))[0]["stats64"]
    return stats["tx"]["bytes"], stats["rx"]["bytes"]


def start(namespace: str, *arguments: str) -> subprocess.Popen[str]:
    command = ("ip", "netns", "exec", namespace, sys.executable, __file__, *arguments)
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def heard(process: subprocess.Popen[str]) -> dict[str, object]:
    """The next line that a peer prints."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit("a peer ended without an answer: see its error above")
    told: dict[str, object] = json.loads(line)
    return told


def end(process: subprocess.Popen[str]) -> None:
    """A peer ends when its stdin does."""
    try:
        process.communicate(timeout=20)
    finally:
        process.kill()


def measure(case: Case) -> dict[str, object]:
    """One case in namespaces of its own."""
    with namespaces() as (a, b), tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as ends:
        roots = [Path(folder) / name for name in "ab"]
        for root in roots:
            root.mkdir()
        told = json.dumps(asdict(case))
        server = start(a, "--serve", str(roots[0]), "--case", told)
        ends.callback(end, server)
        address = str(heard(server)["address"])
        heard(server)
        client = start(b, "--fetch", str(roots[1]), "--from", f"{roots[0]},{address}", "--case", told)
        ends.callback(end, client)
        heard(client)
        before, began = wire(b), time.monotonic()
        assert client.stdin is not None
        client.stdin.write("\n")
        client.stdin.flush()
        outcome = heard(client)
        seconds = time.monotonic() - began
        after = wire(b)
    sent, received = after[0] - before[0], after[1] - before[1]
    return judge(case, sent, received, seconds) | outcome


def judge(case: Case, sent: int, received: int, seconds: float) -> dict[str, object]:
    """What was bounded against what the interface carried."""
    if case.daily_mib:
        allowed, measured = case.daily_mib * (1 << 20), float(sent + received)
    else:
        allowed, measured = (
            case.rate_bytes_per_s * seconds,
            float(received),
        )  # the download of one is the upload of the other
    return {
        "case": case.name,
        "seconds": round(seconds, 2),
        "allowed_bytes": round(allowed),
        "wire_bytes": round(measured),
        "ratio": round(measured / allowed, 4),
        "within_5_percent": abs(measured / allowed - 1) <= 0.05,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare the caps on traffic with what the interface carries.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--seconds", type=float, default=30.0, help="length of each transfer under a rate")
    parser.add_argument("--only", default="", help="run only the cases whose name has this in it")
    parser.add_argument("--case", type=lambda text: Case(**json.loads(text)), help=argparse.SUPPRESS)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--fetch", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--from", dest="source", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))  # stdout is for answers
    if arguments.serve:
        caps = CapsSection(upload_kib_per_s=arguments.case.upload_kib_per_s)
        asyncio.run(serve(arguments.serve, _HOSTS[0], caps, arguments.case.blobs))
        return 0
    if arguments.fetch:
        case = arguments.case
        caps = CapsSection(download_kib_per_s=case.download_kib_per_s, daily_mib=case.daily_mib)
        folder, address = arguments.source.split(",")
        asyncio.run(download(arguments.fetch, caps, Path(folder), address, case))
        return 0
    if sys.platform != "linux" or os.geteuid() != 0:
        print(json.dumps({"skipped": "network namespaces need Linux and root: run it with sudo"}))
        return 0
    cases = [case for case in CASES if arguments.only in case.name]
    results = [measure(Case(**(asdict(case) | {"seconds": arguments.seconds}))) for case in cases]
    if arguments.json:
        print(json.dumps({"cases": results}))
    else:
        for result in results:
            figures = f"{result['wire_bytes']:>12,} of {result['allowed_bytes']:>12,} bytes"
            print(f"{result['case']:22} {figures}  x{result['ratio']}")
    return 0 if all(result["within_5_percent"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
