"""The caps: rates and quota in virtual time, the duty cycle of the trainer, the tier that memory allows."""

from __future__ import annotations

import asyncio
import errno
import itertools
import json
import queue
from collections.abc import Callable
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from braniac.model.config import PRESETS
from braniac.model.trainer import StepResult, TrainSettings, memory_bytes_needed
from braniac.node.blobs import Blobs
from braniac.node.clock import FakeClock, SwarmClock
from braniac.node.config import CapsSection, Tier
from braniac.node.daily_meter import DailyMeter
from braniac.node.errors import ResourceError
from braniac.node.exchange import BlobUnavailable, Exchange
from braniac.node.files import Files
from braniac.node.memory import choose_tier, memory_left_bytes
from braniac.node.metrics import Metrics
from braniac.node.store import Store
from braniac.node.throttle import Throttle, TokenBucket, ack_bytes, wire_bytes
from braniac.node.trainer_thread import TrainerThread
from braniac.node.transport_memory import MemoryNetwork
from braniac.protocol import limits
from braniac.protocol import messages_pb2 as pb
from braniac.protocol.engine import Engine
from braniac.protocol.history import History
from tests.unit.node_harness import CONFIG, EPOCH_S, PATIENCE_S, SETTINGS, identity, make_manifest, make_trainer, until

KIB, MIB = 1 << 10, 1 << 20
NOON = datetime(2026, 11, 22, 12, tzinfo=UTC).timestamp()
DAY_S = 86_400.0


def utc(wall_s: float) -> datetime:
    return datetime.fromtimestamp(wall_s, UTC)


def passing(clock: FakeClock) -> Callable[[float], asyncio.Future[None]]:
    """A sleep during which the clock goes on, and nothing else."""

    async def sleep(seconds: float) -> None:
        clock.advance(seconds)
        await asyncio.sleep(0)

    return lambda seconds: asyncio.ensure_future(sleep(seconds))


# Rates


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    rate=st.floats(1000, 1e7),
    calls=st.lists(
        st.tuples(st.floats(0, 5), st.sampled_from(["bulk", "urgent", "charge"]), st.floats(0, 1)), max_size=40
    ),
)
def test_a_rate_holds_over_any_time(rate: float, calls: list[tuple[float, str, float]]) -> None:
    clock = FakeClock()
    bucket = TokenBucket(rate, clock, passing(clock))
    passed: list[tuple[float, float]] = []

    async def run() -> None:
        for gap, kind, share in calls:
            clock.advance(gap)
            count = share * rate / 2
            if kind == "bulk":
                await bucket.take_bulk(count)
            elif kind == "urgent":
                await bucket.take_urgent(count)
            elif share < 0.2:  # bytes that came unasked, less than the rate
                clock.advance(share)
                bucket.charge(count)
            passed.append((clock.monotonic(), count if kind != "charge" or share < 0.2 else 0.0))

    asyncio.run(run())
    for first in range(len(passed)):
        moved = 0.0
        for at_s, count in passed[first:]:
            moved += count
            # A burst at the beginning, what messages may borrow, and what was under way.
            assert moved <= rate * (at_s - passed[first][0] + 0.25 + 2.0 + 0.5) * 1.001


async def test_bulk_alone_gets_the_whole_rate_and_no_more() -> None:
    clock = FakeClock()
    bucket = TokenBucket(1000.0, clock, passing(clock))
    for _ in range(60):
        await bucket.take_bulk(500.0)
    assert clock.monotonic() - 1000.0 == pytest.approx(29.5, abs=0.01)


async def test_messages_go_ahead_of_blobs_and_are_paid_by_them() -> None:
    clock = FakeClock()
    bucket = TokenBucket(1000.0, clock, passing(clock))
    await bucket.take_bulk(500.0)
    await bucket.take_urgent(800.0)
    await bucket.take_urgent(700.0)
    assert clock.monotonic() == 1000.0
    assert bucket.delay_s() == pytest.approx(2.0)
    await bucket.take_urgent(1.0)  # the limit of what may be borrowed
    assert clock.monotonic() == pytest.approx(1000.0)
    await bucket.take_urgent(1.0)
    assert clock.monotonic() == pytest.approx(1000.001)
    await bucket.take_bulk(1.0)
    assert clock.monotonic() == pytest.approx(1002.002)


async def test_without_a_cap_nothing_waits() -> None:
    async def never(seconds: float) -> None:
        raise AssertionError(seconds)

    bucket = TokenBucket(0.0, FakeClock(), never)
    await bucket.take_bulk(1e12)
    await bucket.take_urgent(1e12)
    assert (bucket.delay_s(), bucket.piece_bytes()) == (0.0, limits.CHUNK_BYTES_MAX)


@pytest.mark.parametrize(
    ("rate", "piece"), [(100, limits.PIECE_BYTES_MIN), (64 * KIB, 32 * KIB), (1 << 30, limits.CHUNK_BYTES_MAX)]
)
def test_pieces_take_half_a_second(rate: float, piece: int) -> None:
    assert TokenBucket(rate, FakeClock()).piece_bytes() == piece


async def test_a_cancelled_wait_leaves_no_trace() -> None:
    clock = FakeClock()

    async def forever(seconds: float) -> None:
        await asyncio.Event().wait()

    bucket = TokenBucket(1000.0, clock, forever)
    bucket.charge(1000.0)
    waiting = [asyncio.ensure_future(bucket.take_bulk(5000.0)) for _ in range(3)]
    await asyncio.sleep(0)
    assert bucket.delay_s() == pytest.approx(16.0)
    for one in waiting:
        one.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert bucket.delay_s() == pytest.approx(1.0)


def test_a_wire_carries_more_than_the_payload() -> None:
    assert wire_bytes(0) > 0
    assert 1.03 < wire_bytes(256 * KIB) / (256 * KIB) < 1.08
    assert 0.01 < ack_bytes(256 * KIB) / (256 * KIB) < 0.03


# The exchange


class Node:
    """A peer in a run, with a store and an exchange under caps."""

    def __init__(self, network: MemoryNetwork, root: Path, number: int, clock: FakeClock, caps: CapsSection) -> None:
        self.identity = identity(number)
        self.peer = self.identity.peer_id
        self.store = Store.open(root / f"n{number}")
        swarm_clock = SwarmClock(clock)
        self.meter = DailyMeter(None, clock, local=utc)
        self.throttle = Throttle(caps, clock, self.meter, passing(clock))
        metrics = Metrics("test", 1)
        self.exchange = Exchange(self.store, metrics, clock, swarm_clock, PATIENCE_S, self.throttle)
        self.blobs = Blobs(self.store, self.exchange, metrics, clock)
        manifest = make_manifest(self.identity)
        self.exchange.engine = Engine(manifest, self.identity, 0, incarnation=1, now=EPOCH_S, history=History(manifest))
        self.transport = network.join(self.peer)

    async def fetch(self, blob: bytes, holder: Node) -> list[int]:
        """The sizes of the pieces in which it came."""
        pieces: list[int] = []
        digest = holder.store.put(blob)
        await self.blobs.fetch(self.transport, digest, len(blob), [holder.peer], on_bytes=pieces.append)
        assert self.store.get(digest) == blob
        return pieces


class Pair:
    """One that asks and one that answers, in one virtual time."""

    def __init__(self, root: Path, *, asker: CapsSection | None = None, holder: CapsSection | None = None) -> None:
        self.clock = FakeClock(wall_s=NOON)
        network = MemoryNetwork()
        self.asker = Node(network, root, 0, self.clock, asker or CapsSection())
        self.holder = Node(network, root, 1, self.clock, holder or CapsSection())

    async def __aenter__(self) -> Pair:
        await self.asker.transport.serve(self.asker.exchange.answer)
        await self.holder.transport.serve(self.holder.exchange.answer)
        return self

    async def __aexit__(self, *failure: object) -> None:
        self.asker.store.close()
        self.holder.store.close()

    @property
    def elapsed_s(self) -> float:
        return self.clock.monotonic() - 1000.0


def blob_of(size: int) -> bytes:
    return bytes(i * 31 % 251 for i in range(1000)) * (size // 1000) + bytes(size % 1000)


@pytest.mark.parametrize("side", ["holder", "asker"])
async def test_a_blob_takes_the_time_that_the_cap_says(tmp_path: Path, side: str) -> None:
    rate = 64 if side == "holder" else 128
    caps = CapsSection(**{"upload_kib_per_s" if side == "holder" else "download_kib_per_s": rate})
    size = 1_000_000
    async with Pair(tmp_path, **{side: caps}) as pair:
        pieces = await pair.asker.fetch(blob_of(size), pair.holder)
        moved = sum(wire_bytes(piece) for piece in pieces)
        assert (max(pieces), len(pieces)) == (rate * KIB // 2, -(-size // (rate * KIB // 2)))
        # The last piece leaves when all others are paid; which of them is the last, the workers' threads decide.
        soonest_s, latest_s = ((moved - wire_bytes(last)) / (rate * KIB) for last in (max(pieces), min(pieces)))
        assert 0.99 * soonest_s <= pair.elapsed_s <= 1.05 * latest_s
        assert pair.holder.meter.sent_bytes == pytest.approx(moved, rel=0.02)
        assert pair.asker.meter.received_bytes == pytest.approx(moved, rel=0.02)


async def test_a_message_does_not_wait_for_a_blob(tmp_path: Path) -> None:
    async with Pair(tmp_path, asker=CapsSection(upload_kib_per_s=16, download_kib_per_s=16)) as pair:
        downloading = asyncio.ensure_future(pair.asker.fetch(blob_of(100_000), pair.holder))
        await until(lambda: pair.elapsed_s > 2)
        assert await pair.asker.exchange.send(pair.asker.transport, pair.holder.peer, b"x" * 2000)
        assert not downloading.done()
        assert pair.elapsed_s < 5
        assert sum(await downloading) == 100_000
        assert pair.elapsed_s > 5.5


async def test_a_peer_without_bandwidth_sends_others_away(tmp_path: Path) -> None:
    async with Pair(tmp_path, holder=CapsSection(upload_kib_per_s=8)) as pair:
        pair.holder.throttle.upload.charge(40 * KIB)
        with pytest.raises(BlobUnavailable, match="overloaded"):
            await pair.asker.fetch(b"wanted", pair.holder)
        pair.clock.advance(2)
        assert await pair.asker.fetch(b"wanted", pair.holder) == [6]


async def test_the_quota_ends_downloads_until_midnight(tmp_path: Path) -> None:
    async with Pair(tmp_path, asker=CapsSection(daily_mib=2)) as pair:
        with pytest.raises(BlobUnavailable, match="quota"):
            await pair.asker.fetch(blob_of(4 * MIB), pair.holder)
        assert pair.asker.throttle.used_up
        assert 1 <= pair.asker.meter.used_bytes() / (2 * MIB) < 1.02
        with pytest.raises(BlobUnavailable, match="quota"):
            await pair.asker.fetch(b"a", pair.holder)
        assert await pair.asker.exchange.send(pair.asker.transport, pair.holder.peer, b"goodbye")
        pair.clock.advance(DAY_S / 2)
        assert await pair.asker.fetch(b"a", pair.holder) == [1]


async def test_the_quota_ends_uploads_too(tmp_path: Path) -> None:
    async with Pair(tmp_path, holder=CapsSection(daily_mib=1)) as pair:
        with pytest.raises(BlobUnavailable, match="overloaded"):
            await pair.asker.fetch(blob_of(2 * MIB), pair.holder)
        assert 1 <= pair.holder.meter.used_bytes() / MIB < 1.02


async def test_what_did_not_come_is_not_paid(tmp_path: Path) -> None:
    async with Pair(tmp_path, asker=CapsSection(download_kib_per_s=64, daily_mib=1)) as pair:
        with pytest.raises(BlobUnavailable, match="undialable"):
            await pair.asker.blobs.fetch(pair.asker.transport, bytes(32), 20_000, [identity(9).peer_id])
        assert pair.asker.meter.used_bytes() < 1000
        assert pair.asker.throttle.download.delay_s() < 0.05


async def test_crumbs_are_refused(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:

        async def crumbs(peer: bytes, data: bytes) -> bytes:
            length = pb.Request.FromString(data).chunk.length
            return pb.Reply(chunk=bytes(min(length, limits.PIECE_BYTES_MIN - 1)), blob_bytes=50_000).SerializeToString()

        pair.holder.transport._handlers.clear()
        await pair.holder.transport.serve(crumbs)
        with pytest.raises(BlobUnavailable):
            await pair.asker.blobs.fetch(pair.asker.transport, bytes(32), 50_000, [pair.holder.peer])
        assert pair.asker.transport.traffic.calls["ok"] == 1


# The day's count


def meter(path: Path | None, clock: FakeClock, files: Files | None = None) -> DailyMeter:
    return DailyMeter(path, clock, local=utc, files=files)


def test_the_days_count_survives_a_restart_and_ends_at_midnight(tmp_path: Path) -> None:
    clock, path = FakeClock(wall_s=NOON), tmp_path / "traffic.json"
    first = meter(path, clock)
    first.add(1000.5, 2000.0)
    first.save()
    assert meter(path, clock).used_bytes() == 3000
    clock.advance(DAY_S / 2 - 1)
    again = meter(path, clock)
    assert again.used_bytes() == 3000
    clock.advance(1)
    assert again.used_bytes() == meter(path, clock).used_bytes() == 0
    again.add(1.0, 1.0)
    assert again.used_bytes() == 2
    again.save()
    assert meter(path, clock).used_bytes() == 2


def test_setting_the_clock_back_gains_nothing(tmp_path: Path) -> None:
    clock, path = FakeClock(wall_s=NOON), tmp_path / "traffic.json"
    first = meter(path, clock)
    first.add(500.0, 500.0)
    first.save()
    clock.set_wall(NOON - 3 * DAY_S)
    assert first.used_bytes() == meter(path, clock).used_bytes() == 1000
    first.add(1.0, 0.0)  # and the count belongs to that day from now on
    clock.advance(DAY_S)
    assert first.used_bytes() == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "[]",
        "{}",
        '{"day": "2026-11-22", "sent_bytes": 1}',
        '{"day": "yesterday", "sent_bytes": 1, "received_bytes": 1}',
        '{"day": "2026-11-22", "sent_bytes": -1, "received_bytes": 1}',
        '{"day": 3, "sent_bytes": 1, "received_bytes": 1}',
        '{"day": "2026-11-22", "sent_bytes": 1e999, "received_bytes": 1}',
        "[" * 100_000,
        "\udcff",
    ],
)
def test_a_damaged_count_begins_at_zero(tmp_path: Path, text: str) -> None:
    path = tmp_path / "traffic.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with structlog.testing.capture_logs() as logs:
        again = meter(path, FakeClock(wall_s=NOON))
    assert again.used_bytes() == 0
    assert [entry["log_level"] for entry in logs] == ["warning"]
    again.add(5.0, 0.0)
    again.save()
    assert json.loads(path.read_text())["sent_bytes"] == 5


def test_a_full_disk_keeps_the_old_count(tmp_path: Path) -> None:
    class Full(Files):
        full = False

        def write(self, file: FileIO, data: memoryview) -> None:
            if self.full:
                raise OSError(errno.ENOSPC, "no space")
            super().write(file, data)

    clock, path, files = FakeClock(wall_s=NOON), tmp_path / "traffic.json", Full()
    first = meter(path, clock, files)
    first.add(5.0, 0.0)
    first.save()
    files.full = True
    first.add(5.0, 0.0)
    first.save()
    assert meter(path, clock).used_bytes() == 5
    files.full = False
    first.save()
    assert meter(path, clock).used_bytes() == 10
    assert [file.name for file in tmp_path.iterdir()] == ["traffic.json"]


# The processor


class PassingQueue(queue.SimpleQueue[Callable[[], None] | None]):
    """Whoever waits here lets the clock's time pass."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__()
        self.clock = clock

    def get(self, block: bool = True, timeout: float | None = None) -> Callable[[], None] | None:
        try:
            return super().get(block and timeout is None)
        except queue.Empty:
            self.clock.advance(timeout or 0.0)
            raise


@pytest.mark.parametrize(("duty_percent", "idle_s"), [(100.0, 0.0), (50.0, 2.0), (20.0, 8.0)])
async def test_the_duty_cycle(monkeypatch: pytest.MonkeyPatch, duty_percent: float, idle_s: float) -> None:
    clock, trainer = FakeClock(), make_trainer()
    step, began = trainer.step, []

    def slow() -> StepResult:
        began.append(clock.monotonic())
        clock.advance(2.0)
        return step()

    monkeypatch.setattr(trainer, "step", slow)
    jobs = PassingQueue(clock)
    thread = TrainerThread(trainer, clock, threads=1, nice=0, duty_percent=duty_percent, jobs=jobs)
    thread.start()
    thread.train()
    async with asyncio.timeout(PATIENCE_S):
        while thread.progress.steps < 5:
            await thread.call(lambda trainer: None)  # served between two steps, also while it stays idle
    await asyncio.to_thread(thread.stop)
    assert len(began) >= 5
    assert {after - before for before, after in itertools.pairwise(began)} == {2.0 + idle_s}
    assert idle_s * (len(began) - 1) <= thread.throttled_s <= idle_s * len(began)
    speed = SETTINGS.batch * CONFIG.context / (2.0 + idle_s)
    assert thread.progress.tokens_per_s == pytest.approx(speed)


# Memory

TINY = PRESETS["tiny"]
NEEDS = [memory_bytes_needed(TINY, tier, TrainSettings()) for tier in range(TINY.tiers)]


@pytest.mark.parametrize(
    ("wanted", "left", "tier"),
    [("auto", None, 0), ("auto", NEEDS[0], 0), ("auto", NEEDS[0] - 1, 1), ("auto", NEEDS[3], 3), (2, NEEDS[2], 2)],
)
def test_the_tier_that_the_memory_cap_allows(wanted: Tier, left: int | None, tier: int) -> None:
    assert choose_tier(wanted, TINY, TrainSettings(), 100 * NEEDS[0], left) == tier


@pytest.mark.parametrize(("wanted", "left"), [("auto", NEEDS[3] - 1), ("auto", -5), (2, NEEDS[2] - 1)])
def test_a_cap_too_small_for_a_tier_names_itself(wanted: Tier, left: int) -> None:
    with pytest.raises(ResourceError, match=r"caps\.memory_mib leaves \d+ MiB: .*, or raise caps\.memory_mib$"):
        choose_tier(wanted, TINY, TrainSettings(), 100 * NEEDS[0], left)
    with pytest.raises(ResourceError, match="0 MiB may be used: not even batch 1 fits at any tier, so close other"):
        choose_tier("auto", TINY, TrainSettings(), 0, 100 * NEEDS[0])


def test_what_a_cap_leaves_is_less_than_the_cap() -> None:
    assert memory_left_bytes(0) is None
    left = memory_left_bytes(100_000)
    assert left is not None
    assert 90_000 * MIB < left < 100_000 * MIB - 10 * MIB
