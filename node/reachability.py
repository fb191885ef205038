"""Can others reach this node? It asks some of them to try (dial_back.py), now and then and when its addresses change.

* public: most of those asked could dial it. Most, because one may lie, or sit behind a firewall of its own.
* relayed: they could not, but another peer passes on what is sent to this one.
* private: they could not, so only peers that this node has called itself can talk to it.
* unknown: nobody could be asked, or nobody could tell.

A node that others cannot dial contributes like any other, over connections that it opened, and takes no seats.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import structlog

from braniac.node import control_pb2
from braniac.node.clock import Clock
from braniac.node.dial_back import is_global, is_relayed
from braniac.node.exchange import Exchange
from braniac.node.network import Network
from braniac.node.transport import Unreachable
from braniac.protocol import messages_pb2 as pb
from braniac.protocol.engine import Engine
from braniac.protocol.errors import WireError
from braniac.protocol.identity import PeerId, peer_id_text, short_name

log = structlog.get_logger(__name__)

ASKED_MAX = 3
AGAIN_S = 600.0  # between two checks
UNKNOWN_AGAIN_S = 60.0
FRESH_S = 20.0  # an answer this young is given again, because peers refuse to be asked too often
_LOOK_S = 5.0


class Reachability:
    """What the others say about reaching this node."""

    def __init__(self, network: Network, exchange: Exchange, engine: Engine, clock: Clock, rng: random.Random) -> None:
        self.latest = control_pb2.ReachabilityReply(reachability="unknown", detail="nobody was asked yet")
        """What is known now."""
        self._network = network
        self._exchange = exchange
        self._engine = engine
        self._clock = clock
        self._rng = rng
        self._checked_s = float("-inf")
        self._checked: tuple[str, ...] = ()
        self._one_at_a_time = asyncio.Lock()

    async def keep(self, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        """Check whenever it is time, for ever."""
        while True:
            pause_s = UNKNOWN_AGAIN_S if self.latest.reachability == "unknown" else AGAIN_S
            due = self._clock.monotonic() >= self._checked_s + pause_s
            moved = self._engine.addresses != self._checked and self._clock.monotonic() >= self._checked_s + FRESH_S
            if (due or moved) and self._askable():
                await self.check()
            await sleep(_LOOK_S)

    async def check(self) -> control_pb2.ReachabilityReply:
        """Ask now, unless it was asked a moment ago; an unanswered question leaves the last answer in force."""
        async with self._one_at_a_time:
            if self.latest.asked and self._clock.monotonic() < self._checked_s + FRESH_S:
                return self.latest
            peers = self._askable()
            if not peers:
                return control_pb2.ReachabilityReply(reachability="unknown", detail="there is no peer to ask")
            self._checked_s, self._checked = self._clock.monotonic(), self._engine.addresses
            replies = await asyncio.gather(*(self._ask(peer) for peer in peers))
            answers = {peer: reply for peer, reply in zip(peers, replies, strict=True) if reply is not None}
            found = self._judge(answers)
            if found.reachability == "unknown":
                if self.latest.reachability == "unknown":
                    self.latest = found
                return found
            if found.reachability != self.latest.reachability:
                log.info("reachability", reachability=found.reachability, detail=found.detail)
            self.latest = found
            self._engine.set_reachable(found.reachability == "public")
            self._exchange.on_input()
            return found

    def _askable(self) -> list[PeerId]:
        """Some live peers, those that can be dialled themselves if there are any; nobody while this node rests."""
        if self._exchange.engine is None:
            return []
        live = self._engine.live_peers()
        good = [member.peer for member in live if member.dialable(self._engine.slot)] or [m.peer for m in live]
        return self._rng.sample(good, min(ASKED_MAX, len(good)))

    async def _ask(self, peer: PeerId) -> pb.DialBack | None:
        try:
            return await self._exchange.ask_dial_back(self._network.transport, peer)
        except (Unreachable, WireError) as error:
            log.debug("a peer did not dial back", peer=short_name(peer), reason=str(error))
            return None

    def _judge(self, answers: dict[PeerId, pb.DialBack]) -> control_pb2.ReachabilityReply:
        """What the answers come to."""
        mine = set(self._checked)
        reply = control_pb2.ReachabilityReply(asked=peer_id_text(next(iter(answers))) if answers else "")
        reply.dialed.extend(sorted({a for answer in answers.values() for a in answer.answered} & mine))
        relayed = any(map(is_relayed, mine))
        nowhere = not any(is_global(address) and not is_relayed(address) for address in mine)
        votes = [self._vote(answer, mine, nowhere) for answer in answers.values()]
        yes, no = votes.count(True), votes.count(False)
        if not yes + no:
            reply.reachability = "unknown"
            reply.detail = "no peer could tell" if answers else "no peer answered"
        elif yes >= no:
            reply.reachability, reply.detail = "public", f"{yes} of {yes + no} peers could dial this node"
        else:
            reply.reachability = "relayed" if relayed else "private"
            way = "others reach it through a relay" if relayed else "it reaches others, they cannot reach it"
            reply.detail = (
                f"{no} of {yes + no} peers could not dial this node: {way}; it contributes and takes no seats"
            )
        return reply

    @staticmethod
    def _vote(answer: pb.DialBack, mine: set[str], nowhere: bool) -> bool | None:
        """One peer's word: None if it tried nothing and this node may well have an address that leads to it.

        One without any address of the Internet, connected from another than it knows, sits behind a router.
        """
        if mine.intersection(answer.answered):
            return True
        return False if mine.intersection(answer.silent) or nowhere else None
