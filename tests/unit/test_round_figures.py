"""What round.py makes of what it has seen; the peers themselves are started by the script only."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import hivemind_peer
import numpy as np
import pytest
import round as averaging
import torch
from hivemind.compression import CompressionInfo
from hivemind.compression.quantization import Uniform8BitQuantization

from live import hivemind_group
from live.daemons import longest_gap
from live.usage import Failed, loopback_bytes


def failing() -> dict[str, Any]:
    raise Failed("nobody came")


def test_what_could_not_be_measured_has_no_figures() -> None:
    assert averaging.attempted(failing, 100) == {"error": "Failed: nobody came"}


def test_figures_are_given_per_parameter() -> None:
    found = averaging.attempted(lambda: {"seconds": 2.0, "bytes_per_peer": 50, "cpu_s_per_peer": 1.0}, 100)
    assert (found["seconds_per_parameter"], found["bytes_per_peer_per_parameter"]) == (0.02, 0.5)


def test_the_longest_gap_is_counted_in_slots() -> None:
    assert longest_gap([True, False, False, True, False]) == 2
    assert longest_gap([True, True]) == 0


def test_an_unknown_codec_is_refused() -> None:
    assert averaging.codecs("uniform8,float16") == ["uniform8", "float16"]
    with pytest.raises(argparse.ArgumentTypeError, match="choose from float16, uniform8"):
        averaging.codecs("float64")


def test_bytes_on_loopback_are_counted() -> None:
    assert loopback_bytes() >= 0


class Saved(hivemind_group.HivemindPeer):
    """A stand-in for a peer, which holds given values."""

    def __init__(self, values: list[float]) -> None:
        self.values = np.array(values, np.float32)

    def tell(self, command: str) -> None:
        np.save(command.removeprefix("save "), self.values)

    def hear(self, key: str, deadline_s: float) -> dict[str, Any] | None:
        return {key: ""}


def test_agreement_leaves_room_for_rounding() -> None:
    assert hivemind_group.agree_percent([Saved([1, -1, 1, -1]), Saved([1.01, -1, 1, 1])]) == 75


def test_a_peer_that_ends_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = "import json; print(json.dumps({'noise': 1})); print(json.dumps({'addresses': ['a']}))"

    def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return popen([sys.executable, "-c", code], **options)

    popen = subprocess.Popen
    monkeypatch.setattr(hivemind_group.subprocess, "Popen", start)
    peer = hivemind_group.HivemindPeer("tiny", "float16", 0, [])
    try:
        assert hivemind_group.expect(peer, "addresses", 60) == {"addresses": ["a"]}
        with pytest.raises(Failed, match="exit code 0"):
            hivemind_group.expect(peer, "seconds", 60)
    finally:
        peer.stop()


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # hivemind uses what torch has deprecated
def test_eight_bits_survive_the_wire() -> None:
    codec = Uniform8BitQuantization()
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    serialized = codec.compress(values, CompressionInfo.from_tensor(values))
    back = hivemind_peer.repaired_extract(codec, serialized)
    assert float((back - values).abs().mean()) < 0.02
