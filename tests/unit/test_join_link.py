"""Join links: one text for one meaning, and one sentence for everything else."""

from __future__ import annotations

import contextlib
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from braniac.node import look
from braniac.node.errors import ConfigError, Incompatible, NodeError
from braniac.node.join_link import SCHEME, JoinLink, link_for, parse_link, qr_text, with_link
from braniac.node.transport_memory import MemoryNetwork
from braniac.protocol import messages_pb2 as pb
from braniac.protocol.errors import VersionMismatch
from braniac.protocol.identity import Identity, PeerId, peer_id_text
from braniac.protocol.limits import ADDRESSES_MAX
from braniac.protocol.manifest import sign_manifest
from tests.unit.node_harness import identity, make_manifest

RUN = "02e0e79f63b5c595deb855c913a3a842419283065a45d91382d7fe717d4aca36"
PEER = peer_id_text(identity(1).peer_id)
DOOR = f"/ip4/192.0.2.7/tcp/4001/p2p/{PEER}"

PEERS = st.binary(max_size=8).map(lambda seed: peer_id_text(Identity.from_seed(hashlib.sha256(seed).digest()).peer_id))
HOSTS = st.one_of(
    st.ip_addresses(v=4).map(lambda ip: f"/ip4/{ip}"),
    st.ip_addresses(v=6).map(lambda ip: f"/ip6/{ip.compressed}"),
    st.from_regex(r"\A[a-z][a-z0-9]{0,20}(-[a-z0-9]{1,8})?\.[a-z]{2,8}\Z").map(lambda name: f"/dns4/{name}"),
)
ADDRESSES = st.builds("{}/{}/{}/p2p/{}".format, HOSTS, st.sampled_from(["tcp", "udp"]), st.integers(1, 65535), PEERS)
LINKS = st.builds(
    JoinLink,
    st.binary(min_size=32, max_size=32).map(bytes.hex),
    st.lists(ADDRESSES, min_size=1, max_size=ADDRESSES_MAX, unique=True).map(tuple),
)


@given(LINKS)
def test_a_link_reads_back(link: JoinLink) -> None:
    assert parse_link(f"  {link}\n") == link


@given(LINKS, st.data())
def test_a_link_that_was_changed_is_refused_or_names_something_else(link: JoinLink, data: st.DataObject) -> None:
    text = str(link)
    at = data.draw(st.integers(0, len(text) - 1))
    changed = text[:at] + data.draw(st.characters(codec="utf-8")) + text[at + 1 :]
    with contextlib.suppress(ConfigError):
        assert (parse_link(changed) == link) == (changed.strip() == text)


@given(st.text(max_size=60))
def test_no_text_whatever_gets_a_traceback(text: str) -> None:
    for link in (text, SCHEME + text, f"{SCHEME}{RUN}@{text}"):
        with pytest.raises(ConfigError):
            parse_link(link)


def test_a_link_is_written_in_one_way() -> None:
    assert str(JoinLink(RUN, (DOOR, "/dns4/a b,c@d%/tcp/1/p2p/x"))) == (
        f"braniac://{RUN}@{DOOR},/dns4/a%20b%2Cc%40d%25/tcp/1/p2p/x"
    )


@pytest.mark.parametrize(
    ("link", "why"),
    [
        ("", "it does not begin with braniac://"),
        (DOOR, "it does not begin with braniac://"),
        ("run.braniac", "it does not begin with braniac://"),
        (f"BRANIAC://{RUN}@{DOOR}", "it does not begin with braniac://"),
        (f"braniac://{RUN}", "it names no address after an @"),
        (f"braniac://{RUN}@", "it names no address after an @"),
        (f"braniac://{RUN[:-1]}@{DOOR}", "its run id is not 64 hexadecimal digits"),
        (f"braniac://{RUN.upper()}@{DOOR}", "its run id is not 64 hexadecimal digits in lower case"),
        (f"braniac://{RUN}@{DOOR[:-5]}", "is not a peer's address"),
        (f"braniac://{RUN}@/ip4/192.0.2.7/tcp/4001", "it does not end in /p2p/<peer id>"),
        (f"braniac://{RUN}@{DOOR},", "is not a peer's address"),
        (f"braniac://{RUN}@{DOOR},{DOOR}", "it is not written as braniac-node writes it"),
        (f"braniac://{RUN}@%2F{DOOR[1:]}", "it is not written as braniac-node writes it"),
        (f"braniac://{RUN}@%ff", "an address in it is not text"),
        (f"braniac://{RUN}@" + ",".join(DOOR.replace("4001", str(p)) for p in range(1, 10)), "more than 8 addresses"),
        (f"braniac://{RUN}@{'x' * 5000}", "it is longer than 2900 characters"),
    ],
)
def test_a_wrong_link_gets_one_sentence(link: str, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_link(link)
    text = str(caught.value)
    assert why in text
    assert "copy the whole line that `braniac-node link` prints" in text
    assert len(text) < 700


def test_a_link_to_a_node_leaves_out_what_nobody_else_can_dial() -> None:
    local, relayed = f"/ip4/127.0.0.1/tcp/1/p2p/{PEER}", f"{DOOR}/p2p-circuit/p2p/{PEER}"
    assert link_for(RUN, [local, DOOR, DOOR]).addresses == (DOOR,)
    assert link_for(RUN, [local]).addresses == (local,)
    assert "nonsense" not in str(link_for(RUN, ["nonsense", DOOR]))
    for address in link_for(RUN, [relayed, DOOR]).addresses:
        parse_link(str(JoinLink(RUN, (address,))))
    many = [f"/dns4/{'a' * 60}.{'b' * 60}.{i:02}.org/tcp/{i + 1}/p2p/{PEER}" for i in range(40)]
    crowded = link_for(RUN, many)
    assert len(crowded.addresses) == ADDRESSES_MAX
    assert parse_link(str(crowded)) == crowded


def test_a_link_beside_flags() -> None:
    link = str(JoinLink(RUN, (DOOR,)))
    assert with_link(link, None, None) == (RUN, [DOOR])
    assert with_link(link, RUN, ["/other", DOOR]) == (RUN, [DOOR, "/other"])
    with pytest.raises(ConfigError, match=r"is for run 02e0e79f63b5\.\.\., not for --run-id 0000"):
        with_link(link, "0" * 64, None)


def test_a_qr_code_fits_a_terminal() -> None:
    code = qr_text(JoinLink(RUN, (DOOR,)))
    lines = code.splitlines()
    assert 15 < len(lines) <= 40
    assert max(map(len, lines)) < 400  # with colours
    longest = link_for(RUN, [f"/dns4/{'a' * 60}.{'b' * 60}.org/tcp/{i + 1}/p2p/{PEER}" for i in range(9)])
    assert qr_text(longest)


# --- a look at the run behind a link ---------------------------------------------------------------------------------


async def test_a_look_behind_a_link() -> None:
    memory, run = MemoryNetwork(), make_manifest(identity(0))
    transports = [memory.join(identity(number).peer_id) for number in range(4)]
    looker, silent, good, foreign = transports
    replies: dict[str, bytes] = {}

    async def answer(peer: PeerId, request: bytes) -> bytes:
        assert pb.Request.FromString(request).WhichOneof("kind") == "manifest"
        return replies["now"]

    for transport in (good, foreign):
        await transport.serve(answer)
    body, signature = sign_manifest(run, identity(0))
    signed = pb.SignedManifest(body=body, signature=signature).SerializeToString()
    replies["now"] = pb.Reply(manifest=signed).SerializeToString()
    doors = (silent.addresses()[0], good.addresses()[0])
    assert await look.ask(looker, JoinLink(run.run_id.hex(), doors), 5.0) == run
    with pytest.raises(Incompatible, match="ask for a new link"):
        await look.ask(looker, JoinLink("0" * 64, doors), 5.0)
    with pytest.raises(NodeError, match="nobody behind the link answers"):
        await look.ask(looker, JoinLink(run.run_id.hex(), doors[:1]), 5.0)
    for nonsense in (b"", b"\xff", pb.Reply(manifest=b"\xff").SerializeToString()):
        replies["now"] = nonsense
        with pytest.raises(NodeError, match="nobody behind the link answers"):
            await look.ask(looker, JoinLink(run.run_id.hex(), doors), 5.0)
    future = pb.SignedManifest(body=b'{"protocol":99}', signature=bytes(64)).SerializeToString()
    replies["now"] = pb.Reply(manifest=future).SerializeToString()
    with pytest.raises(VersionMismatch):
        await look.ask(looker, JoinLink(run.run_id.hex(), doors), 5.0)
