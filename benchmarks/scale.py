"""What a swarm of phones costs, by its size: production engines in virtual time, on links of 10 Mbit/s up and 50 down.

The run is `nano-1b` with everything held by everybody, payloads are sizes, messages are real and as long as they
travel. Every hour a tenth of the peers vanish without a word, and as many newcomers join with nothing. Training takes
no time, merging a little. Updates go down the protocol's tree.

    python benchmarks/scale.py --json
    python benchmarks/scale.py --peers 8,64 --slots 30 --json
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections import Counter
from statistics import mean, median
from typing import Any

from phones.run import make_run
from phones.swarm import Swarm

_QUICK_SLOTS = 8
_SLOTS = {8: 240, 64: 60, 512: 24, 4096: 12}
_SETTLING_SLOTS = 3  # at both ends: peers get acquainted, and certificates may still be on their way


def measure(peers: int, slots: int, churn_per_h: float, pace: float, seed: int) -> dict[str, Any]:
    """One swarm of `peers`."""
    started_s = time.process_time()
    gc.collect()
    gc.disable()  # what thousands of peers know of each other is no garbage, and looking at all of it takes minutes
    manifest, sizes = make_run()
    swarm = Swarm(manifest, sizes, peers, churn_per_h=churn_per_h, pace=pace, seed=seed)
    swarm.run(slots, _SETTLING_SLOTS)
    first = swarm.first_slot + _SETTLING_SLOTS
    judged = range(first, first + slots - _SETTLING_SLOTS)
    window_share = slots / manifest.window
    sent, received = Counter[str](), Counter[str]()
    for phone in swarm.phones:
        sent += phone.link.sent
        received += phone.link.received
    anchors = "anchors"
    flow = {kind: sent[kind] / peers / window_share for kind in sent}
    times = [t for t in (_latencies(swarm, slot) for slot in judged) if t]
    late = sorted(second for each in times for second in each)
    voters = [phone for phone in swarm.alive if phone.joined_s <= manifest.slot_start(first)]
    certified = sum(_certified(swarm, slot) for slot in judged)
    joins = [p.ready_s - p.joined_s for p in swarm.phones[peers:] if p.ready_s is not None]
    return {
        "peers": peers,
        "slots": slots,
        "departures": swarm.departures,
        "bytes_per_peer_window": round(sum(n for kind, n in flow.items() if kind != anchors)),
        "joining_bytes_per_peer_window": round(flow.get(anchors, 0)),
        "sent_by_kind": {kind: round(n) for kind, n in sorted(flow.items(), key=lambda item: -item[1])},
        "busiest_peer_bytes_per_slot": round(max(sum(p.link.sent.values()) for p in swarm.phones) / slots),
        "certificate_share": certified / len(judged),
        "applied_share": mean(sum(slot in phone.applied_s for phone in voters) / len(voters) for slot in judged),
        "slot_latency_s": {"median": round(median(late), 1), "p99": round(late[int(0.99 * len(late))], 1)}
        if late
        else None,
        "join_s": {"median": round(median(joins)), "longest": round(max(joins)), "count": len(joins)}
        if joins
        else None,
        "cpu_s": round(time.process_time() - started_s, 1),
    }


def _latencies(swarm: Swarm, slot: int) -> list[float]:
    start_s = swarm.manifest.slot_start(slot)
    return [phone.applied_s[slot] - start_s for phone in swarm.alive if slot in phone.applied_s]


def _certified(swarm: Swarm, slot: int) -> bool:
    """Whether most of the peers that were there have the slot's update."""
    start_s = swarm.manifest.slot_start(slot)
    there = [phone for phone in swarm.alive if phone.ready_s is not None and phone.ready_s <= start_s]
    return 2 * sum(slot in phone.applied_s for phone in there) > len(there)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default="8,64,512,4096", help="sizes of the swarm, with commas between them")
    parser.add_argument("--slots", type=int, help="of 60 s, to be simulated; default: more of a small swarm")
    parser.add_argument("--churn", type=float, default=0.1, help="share of the peers that vanish per hour")
    parser.add_argument("--pace", type=float, default=0.0, help="of uploads, as caps.upload_pace; 0: at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help=f"{_QUICK_SLOTS} slots of each")
    parser.add_argument("--json", action="store_true", help="one JSON list")
    options = parser.parse_args()
    found = []
    for peers in map(int, options.peers.split(",")):
        slots = options.slots or (_QUICK_SLOTS if options.quick else _SLOTS.get(peers, 24))
        found.append(measure(peers, slots, options.churn, options.pace, options.seed))
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
