"""The way of an update from the owner of a slot to all who hold its fragment: a tree in which two at most ask one.

It is a treap (Seidel and Aragon 1996), and everybody can work out its own way up alone. The peers stand in a row, in
the order of one hash, and each has a rank: the owner the highest, then the other seats, because they have the update,
then whoever has the higher lot, so that in every slot it is another tree. In any stretch of the row whoever has the
highest rank is above all others there. Who is missing from somebody's roster changes the parents of few: those next to
the gap.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from braniac.protocol.committee import score
from braniac.protocol.identity import PeerId


def ancestors(
    run_id: bytes, slot: int, committee: Sequence[PeerId], peers: Iterable[PeerId], me: PeerId
) -> list[PeerId]:
    """Whom `me` may expect to have the update before it: its parent, the parent of that, and so on to the owner.

    `committee` is the slot's, owner first; `peers` are those that take part in the slot and hold its fragment. If `me`
    is none of them it is a leaf, and nobody's parent in the eyes of the others.
    """
    taking_part = set(peers).union(committee)
    lots = {peer: score(run_id, slot, peer) for peer in taking_part | {me}}
    seats = {peer: len(committee) - rank for rank, peer in enumerate(committee)}

    def rank(peer: PeerId) -> tuple[int, bool, bytes]:
        return seats.get(peer, 0), peer in taking_part, lots[peer]

    # Ranks compare lots from their first byte on, the row from the last one: as good as two hashes.
    row = sorted(lots, key=lambda peer: lots[peer][::-1])
    at = row.index(me)
    found = []
    for side in (row[:at][::-1], row[at + 1 :]):
        highest = rank(me)
        for peer in side:
            if rank(peer) > highest:
                highest = rank(peer)
                found.append(peer)
    return sorted(found, key=rank)
