"""Every bound of the protocol in one place (I5). Sizes in bytes, times in seconds, counts without a unit."""

PROTOCOL_VERSION = 3

# Fixed point: an anchor, a contribution's level and an update's level are all int32 in units of 2**-20.
FRACTION_BITS = 20
LEVEL_MAX = (1 << 24) - 1  # one level stays below 16.0, so float32 holds it exactly
ANCHOR_MAX = 1 << 30  # an anchor stays below 1024.0; an update that would pass it is refused

# Messages. hivemind's unary calls stop working at 4 MiB, so everything bulky goes in chunks.
MESSAGE_BYTES_MAX = 1 << 20
CHUNK_BYTES_MAX = 1 << 18
PIECE_BYTES_MIN = 1 << 12  # a peer with little bandwidth may answer with less than was asked for, but not with crumbs
BLOB_BYTES_MAX = 1 << 30
MANIFEST_BYTES_MAX = 1 << 16

# Codec
TILE_SIDE = 64
TILE_SIZE_MAX = TILE_SIDE * TILE_SIDE
FRAGMENT_TILES_MAX = 1 << 18
RICE_PARAMETER_MAX = 15
TURNS_MAX = 8  # whose values one contribution may hold, whatever a run allows
MAGNITUDE_BITS_MAX = 4

# Swarm
COMMITTEE_SIZE = 3
ROSTER_PEERS_MAX = 4096
GREETED_PEERS_MAX = 32  # with more live peers than these, heartbeats go to neighbours only and presence is gossip
LOOKED_FOR_PEERS_MAX = 128  # a peer that was away tries so many of those that it knew, the last heard first
NEIGHBOURS = 16  # that a peer of a large swarm sends heartbeats to
GOSSIP_PEERS = 6  # of the neighbours, that are told of new presences; others each time
CERTIFICATE_PEERS = 4  # of the neighbours, that a certificate is passed on to; who gets none asks for it
GOSSIP_PRESENCES_MAX = 256  # in one message
GOSSIP_STRANGERS_MAX = 64  # unknown peers that one neighbour may bring up in a slot without being asked
CANDIDATES = 16  # peers expected to be ready for the seats of a slot of a large swarm
CONTRIBUTORS_PER_SLOT = 64  # drawn by lot where more hold the fragment; the others keep their work for later
CONTRIBUTIONS_PER_SLOT_MAX = 512
CONTRIBUTORS_MAX = 4096  # whose totals are kept
RECENT_CERTIFICATES_MAX = 4096
FRAGMENTS_MAX = 4096
TIER_MAX = 16
WEIGHT_MAX = 1 << 20  # tokens that one contribution may claim
CLIP_ONE = 1 << 16  # a clip factor is a 16-bit fraction; CLIP_ONE means not clipped
REQUEST_NAMES_MAX = 64  # certificates asked for in one message
CHECKED_CONTRIBUTIONS = 64  # a seat recomputes every merge of so many; of larger ones a share that costs as much
DISTRUSTED_MAX = 256  # owners remembered for a wrong merge
NETWORK_PLACES = 4  # contributions to a slot from one network
NEWCOMER_PLACES = 8  # contributions to a slot from peers known for a short time; more if there are more of the others
NEWCOMER_WINDOWS = 4  # how long that is
ADMISSION_LOOKS = 4  # how often the places of a slot are given away anew because somebody else turned up
CERTIFICATE_RANK_MAX = 6  # a signer must be this high among the peers that could have had its seat
INTRODUCED_MAX = 64  # peers named to a newcomer
WITNESSED_SIGNERS_MAX = 16  # of a slot, whose verdicts are remembered
PROOFS_BYTES_MAX = 1 << 22  # of proofs against banned peers that are kept
HEARTBEAT_ENTRIES = 48  # certificates and anchors that a heartbeat lists besides the fresh ones; all others by turns
HEARTBEAT_PARTS_MAX = 1024  # after so many heartbeats everything must have had its turn
REPLAY_WINDOW = 1024  # sequence numbers remembered per peer
ADDRESSES_MAX = 8
ADDRESS_BYTES_MAX = 256
VERSION_LENGTH_MAX = 32  # characters in what a peer says its program's version is

# Slots: how long things matter, in slots
ROSTER_LIVE_SLOTS = 4  # a peer is live if it was heard within this many slots
ROSTER_FORGET_SLOTS = 4096  # a peer not heard for this long is forgotten
PRESENCE_SLOTS = 64  # in a large swarm whoever has no seat coming says so often to all that it is there
PRESENCE_SLOTS_MAX = 256  # as anybody may say
ROSTER_ANSWER_SLOTS = 16  # a peer is told the whole roster once in so many
HEARTBEAT_FRESH_SLOTS = 8  # every heartbeat lists what was decided within so many slots
PROPOSAL_OPEN_SLOTS = 2  # a slot without a certificate this long after its end stays without
ELIGIBLE_SLOTS = 2  # a peer sits in committees this long after it said it was ready, so that all know it
SIGNED_SPANS_MAX = 32  # of slots that may ever have been signed for; more are joined, at the smallest gaps
SIGNING_AHEAD_SLOTS = 2  # a peer notes durably that it may sign so far ahead: what a restart costs it in seats
HISTORY_WINDOWS = 4  # certificates are kept, served and accepted this many windows back
REPEATS_PER_SLOT = 4  # how often what may have been lost is said again
UPDATE_PATIENCE_REPEATS = 12  # how often, at most, an update is asked only of those above in the tree
ANNOUNCE_FRACTION = 0.5  # of a slot: in a large swarm the owner waits for nobody who has announced nothing by then
CLOSE_FRACTION = 1.0  # of a slot: the owner merges what it has at this point; sooner if all expected are in
