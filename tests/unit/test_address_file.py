"""Joining through a file: who writes it, who waits for it, what happens when it is not there or not right."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from braniac.node import address_file
from braniac.node.clock import FakeClock
from braniac.node.config import NetworkSection
from braniac.node.errors import ConfigError, ResourceError
from braniac.node.network import Network
from braniac.node.p2pd import P2pdOptions
from braniac.node.transport import Transport, parse_address
from braniac.node.transport_memory import MemoryNetwork
from braniac.protocol.identity import Identity, peer_id_text

FOUNDER, JOINER = (Identity.from_seed(bytes([number]) * 32) for number in (1, 2))
ADDRESS = f"/dns4/seed/tcp/4001/p2p/{peer_id_text(FOUNDER.peer_id)}"


async def refuse(peer: bytes, request: bytes) -> bytes:
    raise AssertionError("nobody asks")


def network(identity: Identity, world: MemoryNetwork, folder: Path, **settings: object) -> Network:
    async def start(path: Path, options: P2pdOptions) -> Transport:
        return world.join(identity.peer_id)

    section = NetworkSection.model_validate(settings)
    return Network(section, folder / "identity.key", identity, FakeClock(), start_transport=start)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file = tmp_path / "addresses"
    for addresses in ([ADDRESS, ADDRESS], [], [ADDRESS]):
        address_file.write(file, addresses)
        assert address_file.read(f"@{file}") == addresses
    assert [path.name for path in tmp_path.iterdir()] == ["addresses"]


def test_blank_lines_and_bytes_that_are_no_text_do_not_hurt(tmp_path: Path) -> None:
    file = tmp_path / "addresses"
    file.write_bytes(b"\n  a \r\n\n\xff\n")
    assert address_file.read(f"@{file}") == ["a", "\ufffd"]


def test_a_file_that_cannot_be_written_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"cannot write network\.address_file .*No such file or directory"):
        address_file.write(tmp_path / "none" / "addresses", [ADDRESS])


async def test_a_joiner_waits_for_the_founders_file(tmp_path: Path) -> None:
    world, file = MemoryNetwork(), tmp_path / "addresses"
    joiner = network(JOINER, world, tmp_path, peers=[f"@{file}"])
    await joiner.start(refuse)
    assert joiner.bootstrap == []
    assert joiner.failures == {f"@{file}": "no addresses yet: No such file or directory"}
    founder = network(FOUNDER, world, tmp_path, address_file=file)
    await founder.start(refuse)
    joiner.read_address_files()
    assert [parse_address(address)[0] for address in joiner.bootstrap] == [FOUNDER.peer_id]
    assert joiner.failures == {}
    joiner.read_address_files()
    assert len(joiner.bootstrap) == 1
    async with asyncio.timeout(5):
        assert await joiner.connect(joiner.bootstrap[0]) == FOUNDER.peer_id
    await joiner.close()
    await founder.close()


def test_addresses_and_files_can_be_mixed(tmp_path: Path) -> None:
    file = tmp_path / "addresses"
    address_file.write(file, [ADDRESS.replace("seed", "other")])
    joiner = network(JOINER, MemoryNetwork(), tmp_path, peers=[f"@{file}", ADDRESS])
    assert joiner.bootstrap == [ADDRESS]
    joiner.read_address_files()
    assert joiner.bootstrap == [ADDRESS, ADDRESS.replace("seed", "other")]


def test_a_malformed_address_is_refused_wherever_it_stands(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a peer's address"):
        network(JOINER, MemoryNetwork(), tmp_path, peers=["/ip4/1.2.3.4/tcp/1"])
    file = tmp_path / "addresses"
    file.write_text("/ip4/1.2.3.4/tcp/1\n")
    joiner = network(JOINER, MemoryNetwork(), tmp_path, peers=[f"@{file}"])
    with pytest.raises(ConfigError, match="is not a peer's address"):
        joiner.read_address_files()
