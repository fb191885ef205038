"""What goes wrong in a simulation: each seed draws its own mix of faults, and how bad each of them is.

As in TigerBeetle's VOPR, a seed turns some kinds of fault off altogether: a mix of everything would hide what only
happens when, say, the disks are bad and the network is not.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.sim.network import Weather

if TYPE_CHECKING:
    from tests.sim.node import Machine
    from tests.sim.world import World

SLOT_S = 1.0
HOUR_S = 3600.0
CRASH_MODES = ("kill", "power", "reorder")
_PER_MACHINE = ("clock_jump", "disk_full", "crash", "pause", "leave", "rest")
_ALL_STARTED_SLOTS = 6.0


@dataclass(frozen=True)
class Mix:
    """One seed's faults. Rates are per slot: of the whole network for partitions, of each machine for the others."""

    loss: float = 0.0
    duplication: float = 0.0
    corruption: float = 0.0
    delay_s: float = 0.01
    slow: bool = False
    partition: float = 0.0
    one_way: float = 0.0
    """Share of the partitions that cut one direction only."""
    crash: float = 0.0
    pause: float = 0.0
    clock_offset_s: float = 0.0
    """Wall clocks start anywhere within plus and minus this."""
    clock_drift: float = 0.0
    clock_jump: float = 0.0
    disk_full: float = 0.0
    leave: float = 0.0
    rest: float = 0.0

    @classmethod
    def draw(cls, rng: random.Random) -> Mix:
        """A mix for one seed: each kind is off in half of the seeds."""

        def maybe(low: float, high: float) -> float:
            value = rng.uniform(low, high)
            return value if rng.random() < 0.5 else 0.0

        return cls(
            loss=maybe(0.0, 0.3),
            duplication=maybe(0.0, 0.5),
            corruption=maybe(0.0, 0.02),
            delay_s=rng.choice((0.005, 0.02, 0.05, 0.1)),
            slow=rng.random() < 0.5,
            partition=maybe(0.02, 0.1),
            one_way=rng.random(),
            crash=maybe(0.01, 0.06),
            pause=maybe(0.01, 0.05),
            clock_offset_s=maybe(1.0, HOUR_S),
            clock_drift=maybe(1e-5, 1e-2),
            clock_jump=maybe(0.01, 0.05),
            disk_full=maybe(0.01, 0.05),
            leave=maybe(0.01, 0.03),
            rest=maybe(0.01, 0.03),
        )

    def weather(self) -> Weather:
        """The network of this mix, before any partition."""
        return Weather(self.loss, self.duplication, self.corruption, self.delay_s, self.slow)

    def __str__(self) -> str:
        on = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return ", ".join(f"{name} {value:.3g}" for name, value in on.items() if value)


class Adversary:
    """Makes faults happen, a few times per slot, and ends them after a while or all at once."""

    def __init__(self, world: World, mix: Mix, rng: random.Random) -> None:
        self.mix = mix
        self._world = world
        self._rng = rng
        self._fired: Counter[str] = world.fired
        self._cut_until_s = 0.0
        self._back_s: dict[Machine, float] = {}
        """When a machine is started, woken or thawed again."""
        self._full_until_s: dict[Machine, float] = {}

    def begin(self) -> None:
        """Before any machine boots."""
        self._world.network.weather = self.mix.weather()
        for number, machine in enumerate(self._world.machines):
            self._back_s[machine] = number and self._rng.uniform(0.0, _ALL_STARTED_SLOTS) * SLOT_S
            machine.wall_offset_s = self._rng.uniform(-1, 1) * self.mix.clock_offset_s
            machine.drift = self._rng.uniform(-1, 1) * self.mix.clock_drift
            self._fired["clock offset"] += abs(machine.wall_offset_s) > 1
            self._fired["clock drift"] += abs(machine.drift) > 1e-6

    def act(self, slots: float) -> None:
        """Let so much of a slot pass."""
        now_s = self._world.loop.time()
        self._end(now_s)
        if self._rng.random() < self.mix.partition * slots:
            self._cut(now_s)
        for machine in self._world.machines:
            self._hurt(machine, slots, now_s)

    def heal(self) -> None:
        """End everything: from now on nothing goes wrong, and every machine is on."""
        self._world.network.weather = Weather()
        self._cut_until_s = 0.0
        self._back_s.clear()
        for machine in self._world.machines:
            machine.set_full(False)
            if machine.life is not None:
                machine.life.disk.arm(0, "kill")  # never
            self._bring_back(machine)

    def keep_on(self) -> None:
        """After healing: whoever was about to end then is started again."""
        for machine in self._world.machines:
            if machine.life is None:
                machine.start()

    def _end(self, now_s: float) -> None:
        if self._cut_until_s <= now_s:
            self._world.network.weather.cuts.clear()
        for machine, until_s in list(self._full_until_s.items()):
            if until_s <= now_s:
                del self._full_until_s[machine]
                machine.set_full(False)
        for machine in self._world.machines:
            if machine.life is None and machine not in self._back_s:  # it ended in the middle of what it wrote, or left
                self._back_s[machine] = now_s + self._lasting_s()
        for machine, back_s in list(self._back_s.items()):
            if back_s <= now_s:
                del self._back_s[machine]
                self._bring_back(machine)

    def _cut(self, now_s: float) -> None:
        """Cut some peers off from the others, both ways or one way."""
        peers = [machine.identity.peer_id for machine in self._world.machines]
        self._rng.shuffle(peers)
        size = self._rng.randint(1, max(1, len(peers) - 1))
        one_way = self._rng.random() < self.mix.one_way
        cuts = {(a, b) for a in peers[:size] for b in peers[size:]}
        self._world.network.weather.cuts = cuts if one_way else cuts | {(b, a) for a, b in cuts}
        self._cut_until_s = now_s + self._lasting_s()

    def _lasting_s(self) -> float:
        """Mostly short, now and then longer than the certificates are kept."""
        slots = self._rng.choice((0.3, 1.0, 3.0, 8.0, 30.0)) * self._rng.uniform(0.5, 1.5)
        return slots * SLOT_S

    def _hurt(self, machine: Machine, slots: float, now_s: float) -> None:
        mix, rng = self.mix, self._rng
        chances = {name: rng.random() < getattr(mix, name) * slots for name in _PER_MACHINE}
        if chances["clock_jump"]:
            machine.jump_wall(rng.uniform(-HOUR_S, HOUR_S))
            self._fired["clock jump"] += 1
        if chances["disk_full"]:
            machine.set_full(True)
            self._full_until_s[machine] = now_s + self._lasting_s()
        life = machine.life
        if life is None or life.frozen or machine in self._back_s:
            return
        if chances["crash"]:
            mode = rng.choice(CRASH_MODES)
            self._fired[f"crash ({mode})"] += 1
            if rng.random() < 0.5:
                life.disk.arm(rng.randint(1, 30), mode)  # in the middle of what it writes next
            else:
                life.kill(mode)
        elif chances["pause"]:
            life.frozen = True
            self._fired["pause"] += 1
        elif chances["leave"] and life.daemon is not None:
            life.leave()
            self._fired["leave"] += 1
        elif chances["rest"] and machine.training:
            life.rest(finish=rng.random() < 0.5)
            self._fired["rest"] += 1
        else:
            return
        self._back_s[machine] = now_s + self._lasting_s()

    def _bring_back(self, machine: Machine) -> None:
        """Whatever ended or rests, frozen or not, takes part again."""
        life = machine.life
        if life is None:
            return machine.start()
        if life.frozen:
            self._world.loop.thaw(life)
        life.wake()
