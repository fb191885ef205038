"""A round of averaging, live: our daemons against hivemind's averager, four peers on loopback, and one of them killed.

Both have the weights of the same preset and real libp2p daemons. hivemind averages all values of all peers in one
all-reduce (`DecentralizedAverager` with its default timeouts, float16 or 8 bits per value). Ours is the production
program: a window of slots, in which each fragment is due once and of each tile the largest values are merged; the rest
waits in the peers' own weights for later windows. So a round of ours moves fewer values; the figures per parameter say
what a round costs, not that both have done the same.

`seconds`: hivemind's averager has nothing else to do and runs as fast as it can; ours is paced, a window lasts as long
as its slots while training goes on (here: for 1% of the time). `bytes_per_peer`: uplink, as the kernel counted it on a
loopback device of the benchmark's own (a network namespace), with headers and all chatter. `cpu_s_per_peer`: all
processes of a peer.

Then one of four is killed with SIGKILL, all its processes, in the middle of a round. `lost_s`: of hivemind, how much
longer than usual the survivors' round took, or null if somebody had not ended at the deadline (`hung`); of ours, the
longest time for which there was no certificate although one was due. Nobody's training stops for that.
`agree_percent`: the share of the parameters on which the survivors agree afterwards; of hivemind up to a tenth of their
standard deviation, as its codecs round, of ours bit for bit.

The JSON object is the last line on stdout. Linux only. hivemind leaves shared memory behind when it is killed; it is
removed.

    python benchmarks/round.py --json --results benchmarks/results/round
    python benchmarks/round.py --quick --json
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from hivemind_peer import CODECS

from braniac.model.config import PRESETS
from braniac.model.fragments import fragment_table
from braniac.node import swarm_report
from braniac.node.errors import NodeError
from braniac.node.swarm_host import until
from braniac.node.swarm_options import SwarmOptions
from braniac.node.swarm_processes import ProcessHost
from outer import command
from outer.results import Results

PEERS = 4
DEADLINE_S = 30.0
"""For one round of hivemind's; its averager has none of its own."""
START_S = 120.0
KILL_AFTER = 0.1
"""Of a usual round, after the all-reduce has begun."""
RECOVERY_SLOTS = 12
"""That survivors of ours are watched for."""


class Failed(Exception):
    """A measurement that could not be made."""


class Usage:
    """What peers have used since it was made: seconds, bytes on loopback, CPU seconds."""

    def __init__(self, pids: list[int]) -> None:
        self._trees = [tree for pid in pids for tree in family(pid)]
        self._began_s, self._bytes, self._cpu_s = time.monotonic(), loopback_bytes(), self._total_cpu_s()

    def per_round(self, rounds: int, peers: int) -> dict[str, float]:
        return {
            "seconds": round((time.monotonic() - self._began_s) / rounds, 3),
            "bytes_per_peer": round((loopback_bytes() - self._bytes) / rounds / peers),
            "cpu_s_per_peer": round((self._total_cpu_s() - self._cpu_s) / rounds / peers, 3),
        }

    def _total_cpu_s(self) -> float:
        times = [process.cpu_times() for process in self._trees]
        return sum(each.user + each.system for each in times)


def family(pid: int) -> list[psutil.Process]:
    """A process and all that it has started."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def kill(pid: int) -> None:
    """A device that is gone: no process of it says goodbye."""
    for process in family(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def loopback_bytes() -> int:
    """Sent over the loopback device so far, with headers."""
    for line in Path("/proc/net/dev").read_text("ascii").splitlines():
        name, _, counters = line.strip().partition(":")
        if name == "lo":
            return int(counters.split()[8])
    raise Failed("there is no loopback device to count bytes on")


# --- hivemind ---------------------------------------------------------------------------------------------------------


class HivemindPeer:
    """A process of hivemind_peer.py."""

    def __init__(self, preset: str, codec: str, number: int, addresses: list[str]) -> None:
        command = [sys.executable, str(Path(__file__).with_name("hivemind_peer.py")), "--preset", preset]
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
            if self.process.poll() is not None:
                raise Failed(f"a peer of hivemind's ended with exit code {self.process.returncode}")
            self._unread += self.process.stdout.read() or b""
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


# --- ours -------------------------------------------------------------------------------------------------------------


class Ours:
    """Daemons, watched from outside."""

    def __init__(self, preset: str, slot_s: float, fragments: int, root: Path) -> None:
        self.slot_s, self.fragments = slot_s, fragments
        sets = (f"run.fragments={fragments}", "train.batch=1", "caps.duty_percent=1", "metrics.enabled=false")
        options = SwarmOptions(
            nodes=PEERS,
            tiers=(0,),
            seconds=0,
            seed=0,
            preset=preset,
            slot_s=slot_s,
            sets=sets,
            keep_dir=None,
            json=True,
        )
        self.host = ProcessHost(options, root)

    async def measure(self, windows: int) -> dict[str, Any]:
        """Undisturbed windows, then a kill. Raises Failed, NodeError, TimeoutError."""
        try:
            await self.host.start_all()
            await until(self._all_merge, START_S)
            pids = [peer.process.pid for peer in self.host.peers if peer.process is not None]
            first = await self._next_slot(0)
            usage = Usage(pids)
            await self._next_slot(first + windows * self.fragments - 1)
            figures = usage.per_round(windows, PEERS)
            slots = range(first, first + windows * self.fragments)
            await self._next_slot(slots.stop + 1)  # outcomes are known a slot later
            merged = sum(self._certified(slot) for slot in slots)
            return {
                **figures,
                "rounds": windows,
                "slot_s": self.slot_s,
                "fragments": self.fragments,
                "certified_percent": round(100 * merged / len(slots), 1),
                "kill": await self._kill(),
            }
        finally:
            await self.host.stop_all()

    async def _look(self) -> list[int]:
        """Ask everybody who lives: the slots that they are in."""
        replies = await asyncio.gather(*(self.host.ask(peer) for peer in self.host.peers if peer.alive))
        return [reply.slot for reply in replies if reply is not None]

    async def _all_merge(self) -> bool | None:
        """Whether everybody has trained, and a certificate holds work of all."""
        await self._look()
        seen = [peer.observations for peer in self.host.peers]
        if not all(each.last is not None and each.last.steps > 0 for each in seen):
            return None
        return any(record.contributors == PEERS for record in seen[0].slots.values()) or None

    async def _next_slot(self, after: int) -> int:
        """Wait for a slot beyond one to begin, in the eyes of the first node."""

        async def begun(after: int) -> int | None:
            slot = max(await self._look(), default=0)
            return slot if slot > after else None

        after = after or max(await self._look(), default=0)
        return await until(partial(begun, after), START_S + 4 * self.fragments * self.slot_s)

    def _certified(self, slot: int) -> bool:
        """Whether anybody alive saw a certificate for a slot."""
        records = [peer.observations.slots.get(slot) for peer in self.host.peers if peer.alive]
        return any(record is not None and record.certificate for record in records)

    async def _kill(self) -> dict[str, Any]:
        """SIGKILL one node in the middle of a slot; how the others go on."""
        victim = self.host.peers[-1]
        assert victim.process is not None
        slot = await self._next_slot(0)
        await asyncio.sleep(self.slot_s / 2)
        kill(victim.process.pid)
        await victim.process.wait()
        await self._next_slot(slot + RECOVERY_SLOTS)
        slots = range(slot, slot + RECOVERY_SLOTS)
        gaps = longest_gap([self._certified(each) for each in slots])
        survivors = [peer for peer in self.host.peers if peer.alive]
        seen: dict[int, dict[str, Any]] = {}
        deadline = asyncio.get_running_loop().time() + 2 * self.fragments * self.slot_s
        while asyncio.get_running_loop().time() < deadline and not (seen and all(x["agree"] for x in seen.values())):
            replies = [reply for peer in survivors if (reply := await self.host.ask(peer)) is not None]
            swarm_report.keep_agreement(seen, swarm_report.compare(replies))
            await asyncio.sleep(0.1 * self.slot_s)
        return {
            "lost_s": round(gaps * self.slot_s, 3),
            "slots_without_certificate": sum(not self._certified(each) for each in slots),
            "slots": RECOVERY_SLOTS,
            "agree_percent": round(100 * statistics.mean(look["agree"] for look in seen.values()), 2),
        }


def longest_gap(certified: list[bool]) -> int:
    """The most slots in a row without a certificate."""
    longest = run = 0
    for each in certified:
        run = 0 if each else run + 1
        longest = max(longest, run)
    return longest


def our_figures(preset: str, slot_s: float, fragments: int, windows: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(Ours(preset, slot_s, fragments, Path(folder)).measure(windows))


# --- both -------------------------------------------------------------------------------------------------------------


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """The report; what could not be measured has an error in place of figures."""
    config = PRESETS[options.preset]
    parameters = sum(fragment.size for fragment in fragment_table(config, 4))
    report: dict[str, Any] = {"peers": PEERS, "preset": options.preset, "parameters": parameters}
    ours = partial(our_figures, options.preset, options.slot_s, options.fragments, options.windows)
    report["braniac"] = attempted(ours, parameters)
    for codec in options.codecs:
        figures = attempted(partial(hivemind_figures, options.preset, codec, options.rounds), parameters)
        report[f"hivemind_{codec}"] = figures
        if "error" not in figures:
            one = partial(hivemind_kill, options.preset, codec, figures["seconds"])
            figures["kills"] = [attempted(one) for _ in range(options.kills)]
    return report


def attempted(measure: Callable[[], dict[str, Any]], parameters: int = 0) -> dict[str, Any]:
    """Figures, also per parameter if its number is given; or the error."""
    try:
        figures = measure()
    except (Failed, NodeError, TimeoutError, psutil.Error) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    for key in ("seconds", "bytes_per_peer", "cpu_s_per_peer") if parameters else ():
        figures[f"{key}_per_parameter"] = float(f"{figures[key] / parameters:.4g}")
    sys.stderr.write(f"{figures}\n")
    return figures


def keep(results: Results, report: dict[str, Any]) -> None:
    """Write one row per system, and one per kill, into CSV files; what could not be measured is left out."""
    for system, figures in report.items():
        if not isinstance(figures, dict) or "error" in figures:
            continue
        columns = ("seconds", "bytes_per_peer", "cpu_s_per_peer", "rounds")
        row = (system, report["parameters"], *(figures[column] for column in columns))
        results.add_rows("round", ("system", "parameters", *columns), [row])
        kills = figures.get("kills", [figures.get("kill", {})])
        rows = [(system, k.get("hung", 0), k["lost_s"], k.get("agree_percent")) for k in kills if "lost_s" in k]
        results.add_rows("round_kills", ("system", "hung", "lost_s", "agree_percent"), rows)


def enter_namespace() -> None:
    """Start again with a loopback device of one's own; returns there. Raises SystemExit."""
    if os.environ.get("BRANIAC_ROUND_NAMESPACE"):
        return
    inside = f'ip link set lo up && exec "{sys.executable}" "$@"'
    command = ["unshare", "--user", "--map-root-user", "--net", "sh", "-c", inside, "sh", *sys.argv]
    environment = {**os.environ, "BRANIAC_ROUND_NAMESPACE": "1", "OMP_NUM_THREADS": "1"}
    try:
        probe = subprocess.run([*command[:6], "ip link set lo up"], capture_output=True, text=True)
    except OSError as error:
        raise SystemExit(f"round.py counts bytes in a network namespace, and needs unshare for it: {error}") from None
    if probe.returncode:
        sentence = probe.stderr.strip()
        raise SystemExit(f"round.py counts bytes in a network namespace, which this system does not allow: {sentence}")
    os.execvpe(command[0], command, environment)


def codecs(text: str) -> list[str]:
    found = text.split(",")
    for name in found:
        if name not in CODECS:
            raise argparse.ArgumentTypeError(f"hivemind is not compared with {name!r}: choose from {', '.join(CODECS)}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="small")
    parser.add_argument("--codecs", type=codecs, default=list(CODECS), help="of hivemind, with commas")
    parser.add_argument("--rounds", type=int, default=5, help="of hivemind")
    parser.add_argument("--windows", type=int, default=2, help="of ours")
    parser.add_argument("--slot-s", type=float, default=2.0)
    parser.add_argument("--fragments", type=int, default=8)
    parser.add_argument("--kills", type=int, default=3, help="of hivemind, each in a new group")
    parser.add_argument("--quick", action="store_true", help="the smallest preset, one codec, one kill")
    parser.add_argument("--json", action="store_true", help="print the report as one line of JSON")
    parser.add_argument("--results", type=Path, help="a new folder for CSV files, such as benchmarks/results/NAME")
    options = parser.parse_args()
    if options.quick:
        quick = {"preset": "tiny", "codecs": ["float16"], "rounds": 2, "windows": 1, "slot_s": 0.5, "kills": 1}
        vars(options).update(quick)
    enter_namespace()
    with command.one_sentence(parser):
        results = Results(options.results) if options.results else None
    report = compare(options)
    if results is not None:
        results.write_about(None, vars(options))
        keep(results, report)
    print(json.dumps(report, indent=None if options.json else 2, allow_nan=False))
    return 1 if any("error" in each for each in report.values() if isinstance(each, dict)) else 0


if __name__ == "__main__":
    sys.exit(main())
