"""A look at a run from outside: its manifest, asked of a peer, under a key that is used once and thrown away."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from google.protobuf.message import DecodeError

from braniac.node import identity_file
from braniac.node.errors import Incompatible, NodeError
from braniac.node.join_link import JoinLink
from braniac.node.p2pd import P2pdOptions
from braniac.node.transport import Transport, Unreachable
from braniac.node.transport_libp2p import LibP2PTransport
from braniac.protocol import limits
from braniac.protocol import messages_pb2 as pb
from braniac.protocol.errors import ManifestError, VersionMismatch
from braniac.protocol.manifest import Manifest, open_manifest


def manifest_behind(link: JoinLink, timeout_s: float) -> Manifest:
    """The manifest of a link's run, from the first of its addresses that gives it.

    Raises ResourceError, Incompatible for a peer in another run, NodeError if nobody answers.
    """
    return asyncio.run(_look(link, timeout_s))


async def _look(link: JoinLink, timeout_s: float) -> Manifest:
    with tempfile.TemporaryDirectory(prefix="braniac-") as folder:
        key = Path(folder) / "identity.key"
        identity_file.load_or_create(key)
        transport = await LibP2PTransport.start(key, P2pdOptions())
        try:
            return await ask(transport, link, timeout_s)
        finally:
            await transport.close()


async def ask(transport: Transport, link: JoinLink, timeout_s: float) -> Manifest:
    """See `manifest_behind`."""
    request = pb.Request(manifest=pb.ManifestRequest(protocol_version=limits.PROTOCOL_VERSION)).SerializeToString()
    failures = []
    for address in link.addresses:
        try:
            peer = await transport.connect(address, timeout_s=timeout_s)
            reply = pb.Reply.FromString(await transport.call(peer, request, timeout_s=timeout_s))
            signed = pb.SignedManifest.FromString(reply.manifest)
            manifest = open_manifest(signed.body, signed.signature)
        except VersionMismatch:
            raise
        except (Unreachable, ManifestError, DecodeError) as error:
            failures.append(f"{address}: {error}"[:300])
            continue
        if manifest.run_id.hex() != link.run_id:
            raise Incompatible(
                f"{address} is in run {manifest.run_id.hex()[:12]}..., not in the link's {link.run_id[:12]}...: "
                "ask for a new link"
            )
        return manifest
    raise NodeError(f"nobody behind the link answers ({'; '.join(failures)}): try again later, or ask for a new link")
