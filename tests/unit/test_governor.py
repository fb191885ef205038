"""When the worker is told to rest and to go on: by hand, by the policy, by both."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from braniac.node.clock import FakeClock
from braniac.node.config import CapsSection, PolicySection
from braniac.node.governor import Governor
from braniac.node.metrics import Metrics
from braniac.node.policy import Policy
from braniac.node.sensors import Sample, Sensors
from tests.unit.node_harness import until

HOT, COOL = Sample(cpu_celsius=99.0), Sample(cpu_celsius=40.0)


class Scripted(Sensors):
    """Says what it is told to."""

    def __init__(self, root: Path) -> None:
        super().__init__(root=root)
        self.says = COOL

    def sample(self) -> Sample:
        return self.says


class Watched:
    """A governor in virtual time; its worker writes down what it is told."""

    def __init__(self, root: Path) -> None:
        self.clock = FakeClock()
        self.metrics = Metrics("test", 1)
        self.sensors = Scripted(root)
        policy = Policy(PolicySection(dwell_s=30), CapsSection())
        self.governor = Governor(policy, self.sensors, self.clock, 5.0, self.metrics)
        self.told: list[str] = []
        self.slept: list[float] = []
        self._go_on = asyncio.Event()

    async def rest(self, *, finish: bool) -> None:
        self.told.append("finish" if finish else "rest")

    async def wake(self) -> None:
        self.told.append("wake")

    async def sleep(self, seconds: float) -> None:
        """Until the test lets time pass."""
        self.slept.append(seconds)
        await self._go_on.wait()
        self._go_on.clear()
        self.clock.advance(seconds)

    async def asleep(self) -> None:
        """Until what was told before is done with."""
        await until(lambda: self.slept)
        self.slept.clear()

    async def look(self, sample: Sample | None = None) -> None:
        """Let the next look at the sensors happen."""
        self.sensors.says = sample or self.sensors.says
        self._go_on.set()
        await self.asleep()

    def paused(self, reason: str) -> float | None:
        return self.metrics.registry.get_sample_value("braniac_paused", {"reason": reason})


@pytest.fixture
async def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path)


async def during(watched: Watched, story: Callable[[], object]) -> None:
    """Run the governor for as long as the story lasts."""
    running = asyncio.create_task(watched.governor.run(watched, watched.sleep))
    try:
        await watched.asleep()
        result = story()
        assert asyncio.iscoroutine(result)
        await result
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_the_policy_rests_and_wakes_the_worker(watched: Watched) -> None:
    async def story() -> None:
        assert watched.told == []
        await watched.look(HOT)
        assert (watched.told, watched.governor.resting) == (["rest"], True)
        assert (watched.paused("cpu_hot"), watched.paused("manual")) == (1, 0)
        [message] = watched.governor.messages()
        assert (message.code, message.HasField("until_s")) == ("cpu_hot", False)
        assert "99.0 °C" in message.sentence
        for _ in range(5):
            await watched.look(COOL)
        assert watched.told == ["rest"]  # not before the dwell time is over
        assert watched.governor.messages()[0].since_s == 25
        await watched.look(COOL)
        assert (watched.told, watched.governor.resting) == (["rest", "wake"], False)
        assert watched.paused("cpu_hot") == 0
        assert watched.governor.messages() == []

    await during(watched, story)


async def test_a_pause_by_hand_ends_by_itself(watched: Watched) -> None:
    async def story() -> None:
        watched.governor.pause(12.0, False)
        await watched.asleep()
        assert (watched.told, watched.paused("manual")) == (["rest"], 1)
        assert watched.governor.messages()[0].until_s == 12.0
        await watched.look()
        await watched.look()
        assert watched.told == ["rest"]
        await watched.look()  # of the rest of the pause, not of a whole period
        assert watched.told == ["rest", "wake"]
        assert watched.clock.monotonic() == 1012.0
        assert watched.paused("manual") == 0

    await during(watched, story)


async def test_resume_ends_the_pause_and_not_the_policy(watched: Watched) -> None:
    async def story() -> None:
        watched.governor.pause(0.0, False)
        await watched.asleep()
        await watched.look(HOT)
        assert [reason.code for reason in watched.governor.reasons] == ["manual", "cpu_hot"]
        assert [reason.code for reason in watched.governor.resume()] == ["cpu_hot"]
        await watched.asleep()
        assert watched.told == ["rest"]
        assert [reason.code for reason in watched.governor.reasons] == ["cpu_hot"]
        watched.sensors.says = COOL
        for _ in range(6):
            await watched.look()
        assert watched.told == ["rest", "wake"]

    await during(watched, story)


async def test_finish_is_after_the_slot_in_hand(watched: Watched) -> None:
    async def story() -> None:
        watched.governor.pause(0.0, True)
        await watched.asleep()
        assert watched.told == ["finish"]
        watched.governor.resume()
        await watched.asleep()
        assert watched.told == ["finish", "wake"]
        watched.sensors.says = HOT
        watched.governor.pause(0.0, True)  # what the policy finds does not wait
        await watched.asleep()
        assert watched.told == ["finish", "wake", "rest"]

    await during(watched, story)


async def test_the_last_look_can_be_seen(watched: Watched) -> None:
    async def story() -> None:
        await watched.look(HOT)
        assert watched.governor.sample == HOT

    assert watched.governor.sample == Sample()
    await during(watched, story)
