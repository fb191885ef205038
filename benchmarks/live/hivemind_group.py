"""Four peers of hivemind's averager: their rounds, and the death of one of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from live.usage import PEERS, START_S, Failed, Usage, family, kill

DEADLINE_S = 30.0
"""For one round of hivemind's; its averager has none of its own."""
KILL_AFTER = 0.1
"""Of a usual round, after the all-reduce has begun."""
_SCRIPT = Path(__file__).parent.parent / "hivemind_peer.py"


class HivemindPeer:
    """A process of hivemind_peer.py."""

    def __init__(self, preset: str, codec: str, number: int, addresses: list[str]) -> None:
        command = [sys.executable, str(_SCRIPT), "--preset", preset]
        command += ["--codec", codec, "--number", str(number), "--peers", str(PEERS), *addresses]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        self.pids: set[int] = set()
        """All that were seen of it."""
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self._unread = b""

    def tell(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(command.encode() + b"\n")
        self.process.stdin.flush()

    def hear(self, key: str, deadline_s: float) -> dict[str, Any] | None:
        """The next answer with a key; None if there is none in time. Raises Failed if the peer has ended."""
        assert self.process.stdout is not None
        while True:
            while b"\n" in self._unread:
                line, _, self._unread = self._unread.partition(b"\n")
                answer: dict[str, Any] = json.loads(line)
                if key in answer:
                    return answer
            if time.monotonic() > deadline_s:
                return None
            ended = self.process.poll() is not None  # asked first: what it said before is in the pipe
            self._unread += self.process.stdout.read() or b""
            if ended and b"\n" not in self._unread:
                raise Failed(f"a peer of hivemind's ended with exit code {self.process.returncode}")
            time.sleep(0.005)

    def stop(self) -> None:
        """End it and whatever it has left in shared memory."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.pids |= {process.pid for process in family(self.process.pid)}
            kill(self.process.pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # what outlived its parent
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        for pid in self.pids:
            for left in Path("/dev/shm").glob(f"torch_{pid}_*"):
                left.unlink(missing_ok=True)


@contextlib.contextmanager
def hivemind_group(preset: str, codec: str) -> Iterator[list[HivemindPeer]]:
    """Peers that have found each other. Raises Failed."""
    peers = [HivemindPeer(preset, codec, 0, [])]
    try:
        addresses = expect(peers[0], "addresses", START_S)["addresses"]
        peers += [HivemindPeer(preset, codec, number, addresses) for number in range(1, PEERS)]
        for peer in peers[1:]:
            expect(peer, "addresses", START_S)
        for peer in peers:
            peer.pids |= {process.pid for process in family(peer.process.pid)}
        yield peers
    finally:
        for peer in peers:
            peer.stop()


def expect(peer: HivemindPeer, key: str, patience_s: float) -> dict[str, Any]:
    answer = peer.hear(key, time.monotonic() + patience_s)
    if answer is None:
        raise Failed(f"a peer of hivemind's did not answer in {patience_s:.0f} s")
    return answer


def hivemind_round(peers: list[HivemindPeer]) -> list[dict[str, Any] | None]:
    """All average once: what each says, None for who had not ended at the deadline."""
    for peer in peers:
        peer.tell("round")
    deadline_s = time.monotonic() + DEADLINE_S
    return [peer.hear("seconds", deadline_s) for peer in peers]


def hivemind_figures(preset: str, codec: str, rounds: int) -> dict[str, Any]:
    """Of undisturbed rounds. Raises Failed if one does not average over everybody."""
    with hivemind_group(preset, codec) as peers:
        usual_s = []
        hivemind_round(peers)  # the first one opens connections
        usage = Usage([peer.process.pid for peer in peers])
        for _ in range(rounds):
            answers = hivemind_round(peers)
            if any(answer is None or answer["group"] != PEERS for answer in answers):
                raise Failed(f"a round of hivemind's with {codec} did not reach everybody: {answers}")
            usual_s.append(max(answer["seconds"] for answer in answers if answer is not None))
        figures = usage.per_round(rounds, PEERS)
        agreed = agree_percent(peers)
    return {**figures, "seconds": round(statistics.median(usual_s), 3), "rounds": rounds, "agree_percent": agreed}


def hivemind_kill(preset: str, codec: str, usual_s: float) -> dict[str, Any]:
    """One of four is killed in the all-reduce."""
    with hivemind_group(preset, codec) as peers:
        hivemind_round(peers)
        *survivors, victim = peers
        began_s = time.monotonic()
        for peer in peers:
            peer.tell("round")
        if victim.hear("stage", began_s + DEADLINE_S) is None:
            raise Failed("hivemind's peers found no group")
        time.sleep(KILL_AFTER * usual_s)
        kill(victim.process.pid)
        answers = [peer.hear("seconds", began_s + DEADLINE_S) for peer in survivors]
        ended = [answer for answer in answers if answer is not None]
        hung = len(survivors) - len(ended)
        found: dict[str, Any] = {"hung": hung, "errors": [a["error"] for a in ended if a["error"]], "lost_s": None}
        if not hung:
            found["lost_s"] = round(max(answer["seconds"] for answer in ended) - usual_s, 3)
            found["agree_percent"] = agree_percent(survivors)
        return found


def agree_percent(peers: list[HivemindPeer]) -> float:
    """Of the values, on which all peers agree up to a tenth of their standard deviation."""
    with tempfile.TemporaryDirectory() as folder:
        held = []
        for number, peer in enumerate(peers):
            path = Path(folder) / f"{number}.npy"
            peer.tell(f"save {path}")
            expect(peer, "saved", DEADLINE_S)
            held.append(np.load(path))
    values = np.stack(held)
    return round(100 * float((np.ptp(values, axis=0) < 0.1 * values.std()).mean()), 2)
