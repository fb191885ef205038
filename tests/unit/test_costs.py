"""What a run costs: the formula against the real codec, and against the real engines of a whole swarm."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import structlog

from braniac.model.config import PRESETS
from braniac.model.trainer import TrainSettings, memory_bytes_needed
from braniac.node import consent, costs
from braniac.node.config import NodeConfig, RunSection
from braniac.node.costs import costs_of, payload_bytes, slot_bytes
from braniac.node.errors import NodeError
from braniac.node.founding import found_run
from braniac.protocol.codec import CodecRules, encode_topk
from braniac.protocol.identity import PeerId, peer_id_text
from braniac.protocol.manifest import Manifest
from braniac.protocol.merge import Contribution, merge
from braniac.protocol.tiles import TileLayout
from tests.unit import swarm_harness
from tests.unit.node_harness import EPOCH_S, identity

LAYOUT = TileLayout(((4096, 6), (1024, 3), (64, 2)))
RULES = [CodecRules(64, 1), CodecRules(256, 2), CodecRules(1024, 2), CodecRules(4096, 1)]


def found(preset: str = "tiny") -> Manifest:
    return found_run(RunSection.model_validate({"preset": preset}), identity(0), EPOCH_S)[0]


def work(seed: int) -> np.ndarray[Any, Any]:
    """Some training: values of any size, the large ones anywhere."""
    return (np.random.default_rng(seed).standard_normal(LAYOUT.size) * 3000).astype(np.int64)


@pytest.mark.parametrize("rules", RULES)
def test_the_length_of_a_payload_is_what_the_codec_makes(rules: CodecRules) -> None:
    payload, _ = encode_topk(LAYOUT, rules, work(0))
    assert payload_bytes(LAYOUT, rules, 1.0) == pytest.approx(len(payload), rel=0.03)


@pytest.mark.parametrize("peers", [1, 2, 4, 12])
def test_the_length_of_an_update_is_what_a_merge_makes(peers: int) -> None:
    one = dataclasses.replace(found().fragments[0], layout=LAYOUT)
    table = tuple(dataclasses.replace(one, ring=ring) for ring in range(4))
    run = dataclasses.replace(found(), fragments=table, up=CodecRules(256, 1), down=CodecRules(1024, 2))
    payloads = [encode_topk(LAYOUT, run.up, work(seed))[0] for seed in range(peers)]
    merged = merge(run, 0, [Contribution(identity(i).peer_id, 1000, payload) for i, payload in enumerate(payloads)])
    assert merged is not None
    assert costs._merged_bytes(LAYOUT, run.up, run.down, peers) == pytest.approx(len(merged.update), rel=0.06)


def test_every_seat_but_the_own_is_sent_a_contribution_and_whoever_has_none_an_update() -> None:
    run = found()
    payload = payload_bytes(run.fragments[0].layout, run.up, 1.0)
    for peers, copies in ((1, 0.0), (2, 2 * 1 / 2), (3, 3 * 2 / 3), (8, 3 * 7 / 8), (128, 3 * 127 / 128 / 2)):
        assert costs.contribution_bytes(run, 0, peers) == pytest.approx(copies * payload)
    assert [costs.update_bytes(run, 0, peers) for peers in (1, 2, 3)] == [0.0, 0.0, 0.0]
    whole = costs._merged_bytes(run.fragments[0].layout, run.up, run.down, 8)
    assert costs.update_bytes(run, 0, 8) == pytest.approx(5 / 8 * whole)


class CountingSwarm(swarm_harness.Swarm):
    """Knows how many bytes of messages each peer has sent, replies included."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.sent_bytes: dict[int, int] = {}
        super().__init__(*arguments, **options)

    def send(self, source: swarm_harness.Peer, peer: PeerId, data: bytes) -> None:
        source.engine.addresses = (f"/ip4/203.0.113.7/tcp/31337/p2p/{peer_id_text(source.id)}",)
        for number, size in ((source.number, len(data) + 4), (self.by_id[peer].number, costs._REPLY_BYTES)):
            self.sent_bytes[number] = self.sent_bytes.get(number, 0) + size
        super().send(source, peer, data)


@pytest.mark.parametrize("peers", [2, 4])
def test_messages_of_a_real_swarm_are_as_counted(peers: int) -> None:
    swarm = CountingSwarm.running([0] * peers, rings=(0, 0))
    window = swarm.manifest.window
    swarm.run(5 * window)  # until the heartbeats are as long as they get
    before, slots = dict(swarm.sent_bytes), 4 * window
    swarm.run(slots)
    sent = sum(swarm.sent_bytes.values()) - sum(before.values())
    assert costs._message_bytes(swarm.manifest, 0, peers, 1.0) == pytest.approx(sent / slots / peers, rel=0.12)


def test_smaller_tiers_cost_less_of_everything() -> None:
    for preset in ("tiny", "small-llama"):
        every = costs_of(found(preset), PRESETS[preset], TrainSettings())
        assert [each.tier for each in every] == [0, 1, 2, 3]
        for larger, smaller in itertools.pairwise(every):
            for key in ("parameters", "memory_bytes", "disk_bytes", "download_bytes", "each_way_bytes_per_day"):
                assert getattr(larger, key) > getattr(smaller, key), key


def test_costs_follow_what_they_depend_on() -> None:
    run, model, settings = found(), PRESETS["tiny"], TrainSettings()
    [base, *_] = costs_of(run, model, settings)
    assert base.download_bytes == 4 * base.parameters
    slower = dataclasses.replace(run, slot_ms=2 * run.slot_ms)
    assert costs_of(slower, model, settings)[0].each_way_bytes_per_day * 2 == pytest.approx(base.each_way_bytes_per_day)
    more = costs_of(run, model, settings, peers=2 * costs.PEERS)[0]
    assert 1.3 < more.each_way_bytes_per_day / base.each_way_bytes_per_day < 2.5
    assert slot_bytes(run, 0, 1) == 0  # who is alone sends nothing
    bigger = dataclasses.replace(settings, batch=64)
    grown = costs_of(run, model, bigger)[0].memory_bytes - base.memory_bytes
    assert grown == memory_bytes_needed(model, 0, bigger) - memory_bytes_needed(model, 0, settings) > 0
    assert costs_of(run, model, settings, generations=9)[0].disk_bytes > base.disk_bytes


def test_in_a_large_swarm_nobody_pays_for_its_size() -> None:
    run = found("nano-1b")
    assert slot_bytes(run, 0, 4096) < 1.25 * slot_bytes(run, 0, 64)


def test_the_table_for_people_marks_the_tier() -> None:
    every = costs_of(found(), PRESETS["tiny"], TrainSettings())
    header, *rows = costs.table(every, 2).splitlines()
    assert header.split() == ["TIER", "PARAMETERS", "MEMORY", "DISK", "DOWNLOAD", "UP/DAY", "DOWN/DAY"]
    assert [row.split()[0] for row in rows] == ["0", "1", "2", "3"]
    assert [("*" in row) for row in rows] == [False, False, True, False]
    content = costs.as_json(found(), every, 8, None)
    assert content["tiers"][0]["parameters"] == every[0].parameters


# --- before the first download ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [True, False])
async def test_a_person_is_asked_and_obeyed(answer: bool) -> None:
    run, model = dataclasses.replace(found(), name="a\x1b[2Jb"), PRESETS["tiny"]
    asked = []

    async def ask(text: str) -> bool:
        asked.append(text)
        return answer

    said = consent.before_the_first_download(NodeConfig(), run, model, TrainSettings(), 3, ask)
    if answer:
        await said
    else:
        with pytest.raises(NodeError, match="nothing was downloaded, because you did not agree"):
            await said
    [text] = asked
    assert "run   a?[2Jb" in text
    assert run.run_id.hex() in text
    assert text.endswith("Download 917.5 kB and take part? [Y/n] ")


async def test_where_nobody_can_answer_the_log_says_it() -> None:
    with structlog.testing.capture_logs() as entries:
        await consent.before_the_first_download(NodeConfig(), found(), PRESETS["tiny"], TrainSettings(), 3, None)
    [entry] = entries
    assert (entry["event"], entry["tier"], entry["download"]) == ("what taking part costs", 3, "917.5 kB")
    assert set(entry) >= {"memory", "disk", "each_way_per_day"}


def test_without_a_terminal_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with open(os.devnull, encoding="utf-8") as nobody:
        monkeypatch.setattr(sys, "stdin", nobody)
        assert consent.terminal_ask() is None
    assert consent.terminal_ask() is None  # closed


@pytest.fixture
def keyboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The keys of a terminal that is stdin."""
    keys, screen = os.openpty()
    with open(screen, encoding="utf-8") as stdin, open(keys, "rb", buffering=0):
        monkeypatch.setattr(sys, "stdin", stdin)
        yield keys


@pytest.mark.parametrize(
    ("typed", "agreed"),
    [(b"y\n", True), (b"Yes\n", True), (b"\n", True), (b"n\n", False), (b"what?\n", False), (b"\x04", False)],
)
async def test_an_answer_at_a_terminal(keyboard: int, typed: bytes, agreed: bool) -> None:
    os.write(keyboard, typed)
    async with asyncio.timeout(60):
        assert await consent._ask("Really? ") is agreed


async def test_who_leaves_need_not_answer(keyboard: int) -> None:
    asked = asyncio.ensure_future(consent._ask("Really? "))
    await asyncio.sleep(0)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert not asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
