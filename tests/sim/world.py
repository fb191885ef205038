"""One simulation: machines, a network, true time, faults from a seed, and checkers that watch all of it.

First comes the safety phase, in which things go wrong and nothing false may happen. Then everything is healed, and in
the liveness phase the swarm must come to work as a whole again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import logging
import random
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from braniac.model.fragments import layout_digest
from braniac.node import bridge, run_file
from braniac.protocol.codec import CodecRules
from braniac.protocol.committee import committee
from braniac.protocol.identity import Identity
from braniac.protocol.manifest import Manifest, MergeRules, sign_manifest
from tests.sim.checks import Checks
from tests.sim.faults import SLOT_S, Adversary, Mix
from tests.sim.loop import HOST, VirtualLoop
from tests.sim.network import SimNetwork
from tests.sim.node import Life, Machine
from tests.sim.training import FRAGMENT_TABLE, FRAGMENTS, MODEL

EPOCH_S = 1_700_000_000.0

_SCRATCH = next((place for place in (Path("/dev/shm"),) if place.is_dir()), None)  # thousands of small files
_SIZES = (1, 2, 3, 3, 4, 4, 4, 5, 5, 6)
_SAFETY_SLOTS = (15, 40)
_TICK_SLOTS = 0.25
_LIVE_SLOTS_MAX = 16 * FRAGMENTS


@dataclass(frozen=True)
class Violation:
    """An invariant that did not hold."""

    invariant: str
    machine: str
    sentence: str
    at_s: float

    def __str__(self) -> str:
        return f"{self.invariant} at {self.machine}, {self.at_s:.3f} s: {self.sentence}"


@dataclass
class Outcome:
    """What one seed came to."""

    seed: int
    violations: list[Violation]
    stuck: str
    """What was still wrong at the end of the liveness phase; empty: nothing."""
    trace: str
    """A hash of all that happened."""
    fired: Counter[str]
    messages: int = 0
    virtual_s: float = 0.0
    flowing_slots: float = 0.0
    """From the healing until a slot had its certificate again."""
    whole_slots: float = 0.0
    """From the healing until all agreed and every slot held everybody's work."""
    certificates: int = 0
    checked: int = 0

    @property
    def good(self) -> bool:
        return not self.violations and not self.stuck


def identity(seed: int, number: int) -> Identity:
    """The key of one machine."""
    return Identity.from_seed(hashlib.sha256(f"simulated machine {number} of {seed}".encode()).digest())


@dataclass
class Plan:
    """What a simulation begins with; from a seed, or by hand in a scenario."""

    seed: int
    tiers: Sequence[int]
    mix: Mix = field(default_factory=Mix)
    lean: Sequence[bool] = ()
    safety_slots: float = 0.0

    @classmethod
    def draw(cls, seed: int) -> Plan:
        rng = random.Random(f"plan {seed}")
        size = rng.choice(_SIZES)
        tiers = [0, *(rng.choice((0, 0, 1, 2)) for _ in range(size - 1))]
        lean = [rng.random() < 0.5 for _ in tiers]
        return cls(seed, tiers, Mix.draw(rng), lean, rng.uniform(*_SAFETY_SLOTS))


class World:
    """Everything there is in one simulation."""

    def __init__(self, plan: Plan, root: Path) -> None:
        self.plan = plan
        self.seed = plan.seed
        self.root = root
        self.loop = VirtualLoop()
        self.fired: Counter[str] = Counter()
        self.violations: list[Violation] = []
        self.network = SimNetwork(self.loop, random.Random(f"network {plan.seed}"), self.fired)
        lean = [*plan.lean, *[False] * len(plan.tiers)]
        self.machines = [
            Machine(self, number, identity(plan.seed, number), tier, lean=lean[number])
            for number, tier in enumerate(plan.tiers)
        ]
        self.adversary = Adversary(self, plan.mix, random.Random(f"faults {plan.seed}"))
        self.adversary.begin()
        self.run_file = root / "run.json"
        self.manifest = self._found()
        self.checks = Checks(self)

    def _found(self) -> Manifest:
        founder = self.machines[0]
        manifest = Manifest(
            name="simulated",
            founder=founder.identity.peer_id,
            epoch_ms=round(1000 * (self.true_time_s() + founder.wall_offset_s)),
            slot_ms=round(1000 * SLOT_S),
            seed=7,
            tiers=MODEL.tiers,
            model=MODEL.to_dict(),
            data={"tokenizer": "bytes"},
            layout_digest=layout_digest(MODEL, FRAGMENTS),
            fragments=bridge.fragment_specs(FRAGMENT_TABLE),
            up=CodecRules(1024, magnitude_bits=2, turns=3),
            down=CodecRules(2048, magnitude_bits=2),
            merge=MergeRules(),
        )
        run_file.write(self.run_file, *sign_manifest(manifest, founder.identity), overwrite=False)
        return manifest

    def true_time_s(self) -> float:
        """Unix time in this world."""
        return EPOCH_S + self.loop.time()

    def violated(self, invariant: str, machine: str, sentence: str) -> None:
        """A checker has found something."""
        self.violations.append(Violation(invariant, machine, sentence, self.loop.time()))

    def died(self, life: Life) -> None:
        """A process has ended, or is about to."""
        log.info("a process ended", machine=life.machine.name)

    # --- phases ------------------------------------------------------------------------------------------------------

    def run(self, story: Callable[[World], Awaitable[None]] | None = None) -> Outcome:
        """Both phases: the outcome. A `story` takes the place of the safety phase."""
        state = random.getstate()
        random.seed(self.seed)  # what draws its jitter there is as repeatable as the rest
        try:
            return self.loop.run(self._run(story))
        finally:
            random.setstate(state)

    async def _run(self, story: Callable[[World], Awaitable[None]] | None) -> Outcome:
        outcome = Outcome(self.seed, self.violations, "", "", self.fired)
        try:
            await (story(self) if story is not None else self.safety(self.plan.safety_slots))
            if not self.violations:
                self.adversary.heal()
                await self.liveness(outcome)
            self._sum_up(outcome)
        finally:
            await self._end()
        return outcome

    async def safety(self, slots: float) -> None:
        """Let things go wrong for a while, or until a checker has seen enough."""
        end_s = self.loop.time() + slots * SLOT_S
        while self.loop.time() < end_s and not self.violations:
            self.adversary.act(_TICK_SLOTS)
            await self.pass_time(_TICK_SLOTS)

    async def liveness(self, outcome: Outcome) -> None:
        """Wait until the swarm works as a whole; note what is wrong if it never does."""
        healed_s, healed_slot = self.loop.time(), self.slot
        # A founder whose clock went back has founded a run that begins in the future.
        most_slots = _LIVE_SLOTS_MAX + max(0, -healed_slot)
        outcome.stuck = "nobody was ever there"
        while outcome.stuck and not self.violations:
            await self.pass_time(1.0)
            self.adversary.keep_on()
            slots = (self.loop.time() - healed_s) / SLOT_S
            outcome.stuck, certified = self.ailment(), self.checks.settled_since(healed_slot)
            if certified and not outcome.flowing_slots:
                outcome.flowing_slots = slots
            if slots > most_slots:
                return
        outcome.whole_slots = (self.loop.time() - healed_s) / SLOT_S

    async def pass_time(self, slots: float) -> None:
        """Let nodes do what they do, and look at them."""
        await asyncio.sleep(slots * SLOT_S)
        self.checks.look()
        for problem in self.loop.errors:
            self.violated("an error that nobody saw", "?", f"{problem.get('message')}: {problem.get('exception')!r}")
        self.loop.errors.clear()

    async def _end(self) -> None:
        """End all processes, and whatever is still open."""
        lives = [machine.life for machine in self.machines if machine.life is not None]
        for life in lives:
            life.kill("kill")
        await asyncio.gather(*(life.task for life in lives), return_exceptions=True)
        others = asyncio.all_tasks(self.loop) - {asyncio.current_task()}
        for task in others:  # answers to requests that nobody waits for any more
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _sum_up(self, outcome: Outcome) -> None:
        self.checks.check_disks()
        digest = hashlib.blake2b(self.network.trace.digest(), digest_size=16)
        digest.update(repr(sorted(self.fired.items())).encode())
        digest.update(repr(self.violations).encode())
        outcome.trace = digest.hexdigest()
        outcome.messages, outcome.virtual_s = self.network.messages, self.loop.time()
        outcome.certificates = len(self.checks.settled_since(-1))
        outcome.checked = sum(ledger.checked for ledger in self.checks.ledgers.values())

    # --- for stories -------------------------------------------------------------------------------------------------

    async def begin(self, *numbers: int) -> None:
        """Start these machines, or all, and wait until they work as a whole."""
        for machine in [self.machines[n] for n in numbers] or self.machines:
            machine.start()
            await self.until(lambda machine=machine: machine.life is not None and machine.life.daemon is not None, 8)
        await self.until(lambda: not self.ailment(), _LIVE_SLOTS_MAX)

    async def until(self, condition: Callable[[], object], slots: float, step_slots: float = 0.05) -> None:
        """Wait for something that must come about."""
        end_s = self.loop.time() + slots * SLOT_S
        while not condition():
            assert self.loop.time() < end_s, f"this did not come about in {slots} slots ({self.ailment()})"
            assert not self.violations, self.violations
            await self.pass_time(step_slots)

    async def slots(self, count: float) -> None:
        """Let so many slots pass."""
        end_s = self.loop.time() + count * SLOT_S
        await self.until(lambda: self.loop.time() >= end_s, count + 1, 0.25)

    def cut(self, group: Iterable[Machine], rest: Iterable[Machine]) -> None:
        """Let nothing through between two groups of machines, either way."""
        for a, b in itertools.product(list(group), list(rest)):
            pair = (a.identity.peer_id, b.identity.peer_id)
            self.network.weather.cuts |= {pair, pair[::-1]}

    def mend(self) -> None:
        """End all cuts."""
        self.network.weather.cuts.clear()

    def owner_of(self, slot: int) -> Machine:
        """Who will own a slot if all machines that are on are known to each other and ready."""
        peers = [machine.identity.peer_id for machine in self.machines if machine.training]
        owner = committee(self.manifest.run_id, slot, peers)[0]
        return next(machine for machine in self.machines if machine.identity.peer_id == owner)

    # --- what the swarm looks like -----------------------------------------------------------------------------------

    @property
    def slot(self) -> int:
        """The slot that most engines are in."""
        slots = sorted(m.life.engine.slot for m in self.machines if m.life is not None and m.life.engine is not None)
        return slots[len(slots) // 2] if slots else -1

    def ailment(self) -> str:
        """Why the swarm does not work as a whole; empty if it does."""
        there = [machine for machine in self.machines if machine.lives]
        for machine in there:
            if not machine.training:
                return f"{machine.name} does not take part"
        for fragment in FRAGMENT_TABLE:
            holders = [m for m in there if self.manifest.holds(m.tier, fragment.index)]
            states = {m.name: m.life.engine.anchors().get(fragment.index) for m in holders}  # type: ignore[union-attr]
            if len(set(states.values())) > 1:
                return f"fragment {fragment.index} differs: {states}"
        first = self.slot - FRAGMENTS - 1
        return self.checks.incomplete(there, first, self.slot - 2) if first >= 0 else "it has only just begun"


log = structlog.get_logger(__name__)


@contextlib.contextmanager
def logging_to(write: bool) -> Iterator[None]:
    """Show what nodes log, each line with its machine and its time; or nothing, which is faster."""
    before = structlog.get_config()
    level = logging.DEBUG if write else logging.CRITICAL

    def place(logger: object, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        host = HOST.get()
        event["machine"] = host.machine.name if isinstance(host, Life) else "-"
        event["at_s"] = round(asyncio.get_running_loop().time(), 3)
        return event

    structlog.configure(
        processors=[place, structlog.processors.KeyValueRenderer(key_order=["at_s", "machine", "event"])],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=False,
    )
    try:
        yield
    finally:
        structlog.configure(**before)


def simulate(
    plan: Plan | int, story: Callable[[World], Awaitable[None]] | None = None, *, show: bool = False
) -> Outcome:
    """Run one simulation, of a seed or by plan, in a directory of its own that is removed again."""
    if isinstance(plan, int):
        plan = Plan.draw(plan)
    with tempfile.TemporaryDirectory(prefix="braniac-sim-", dir=_SCRATCH) as root, logging_to(show):
        return World(plan, Path(root)).run(story)
