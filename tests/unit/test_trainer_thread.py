"""The training thread: what runs when, what comes back, and how it ends."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from braniac.model.errors import TrainingDiverged
from braniac.model.fragments import fragment_table
from braniac.model.trainer import StepResult, Trainer
from braniac.node.clock import FakeClock
from braniac.node.trainer_thread import TrainerThread
from tests.unit.node_harness import CONFIG, FRAGMENTS, SETTINGS, make_thread, make_trainer

PATIENCE_S = 30.0
STEP_TOKENS = SETTINGS.batch * CONFIG.context


@pytest.fixture
def trainer() -> Trainer:
    return make_trainer()


@pytest.fixture
def thread(trainer: Trainer) -> Iterator[TrainerThread]:
    thread = make_thread(trainer)
    thread.start()
    yield thread
    thread.stop()


async def steps_reach(thread: TrainerThread, steps: int) -> None:
    """Wait for steps; each call is served between two of them."""
    async with asyncio.timeout(PATIENCE_S):
        while thread.progress.steps < steps:
            await thread.call(lambda trainer: None)


async def test_calls_run_in_order_in_one_other_thread(thread: TrainerThread, trainer: Trainer) -> None:
    seen: list[int] = []

    def job(number: int) -> int:
        seen.append(number)
        return threading.get_ident()

    threads = await asyncio.gather(*(thread.call(lambda trainer, n=n: job(n)) for n in range(20)))
    assert seen == list(range(20))
    assert len(set(threads)) == 1
    assert threads[0] != threading.get_ident()
    assert await thread.call(lambda given: given) is trainer


async def test_what_a_call_raises_comes_back_and_the_thread_goes_on(thread: TrainerThread) -> None:
    with pytest.raises(ZeroDivisionError):
        await thread.call(lambda trainer: 1 // 0)
    assert await thread.call(lambda trainer: 3) == 3


async def test_a_call_that_was_given_up_does_not_run(thread: TrainerThread) -> None:
    hold, ran = threading.Event(), threading.Event()
    first = asyncio.ensure_future(thread.call(lambda trainer: hold.wait(PATIENCE_S)))
    second = asyncio.ensure_future(thread.call(lambda trainer: ran.set()))
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.sleep(0)
    hold.set()
    assert await first
    await thread.call(lambda trainer: None)
    assert not ran.is_set()


async def test_it_trains_only_between_train_and_pause(thread: TrainerThread) -> None:
    await thread.call(lambda trainer: None)
    assert thread.progress.steps == 0
    thread.train()
    await steps_reach(thread, 5)
    thread.pause()
    steps = await thread.call(lambda trainer: trainer.step_count)  # whatever was in hand is done now
    assert [await thread.call(lambda trainer: trainer.step_count) for _ in range(5)] == [steps] * 5
    assert thread.progress.steps == steps
    assert thread.progress.tokens == steps * STEP_TOKENS
    assert thread.progress.loss is not None
    thread.train()
    await steps_reach(thread, steps + 2)


async def test_tokens_of_earlier_lives_count() -> None:
    thread = make_thread(make_trainer(), tokens=1000)
    thread.start()
    assert thread.progress.tokens == 1000
    thread.train()
    await steps_reach(thread, 1)
    thread.stop()
    assert thread.progress.tokens == 1000 + thread.progress.steps * STEP_TOKENS


async def test_a_batch_that_diverges_is_skipped(
    trainer: Trainer, thread: TrainerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, tried = trainer.step, []

    def diverge_twice() -> StepResult:
        tried.append(trainer.step_count)
        if trainer.step_count in (2, 3):
            raise TrainingDiverged("the loss is not finite")
        return step()

    monkeypatch.setattr(trainer, "step", diverge_twice)
    thread.train()
    await steps_reach(thread, 6)
    assert tried[:6] == [0, 1, 2, 3, 4, 5]
    assert thread.progress.diverged == 2
    assert not thread.progress.stalled


async def test_it_stalls_on_bad_weights_until_good_ones_are_there(trainer: Trainer, thread: TrainerThread) -> None:
    fragments = fragment_table(CONFIG, FRAGMENTS)
    good = {f.index: trainer.read(f) for f in fragments}
    with torch.no_grad():  # what no certificate can do: weights that make every loss infinite
        for parameter in trainer.params.values():
            parameter.fill_(float("nan"))
    thread.train()
    async with asyncio.timeout(PATIENCE_S):
        while not thread.progress.stalled:
            await thread.call(lambda trainer: None)
    failed = thread.progress.diverged
    assert failed == 16
    for _ in range(3):
        await thread.call(lambda trainer: None)
    assert thread.progress.diverged == failed  # it waits, and still answers
    for fragment in fragments:
        await thread.call(lambda trainer, f=fragment: trainer.load_fragment(f, good[f.index]))
    await thread.call(lambda trainer: thread.start_over())
    steps = thread.progress.steps
    await steps_reach(thread, steps + 1)
    assert not thread.progress.stalled
    assert thread.progress.diverged == failed


async def test_it_stalls_when_the_loss_has_jumped_and_stays_there(
    trainer: Trainer, thread: TrainerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = trainer.step
    spikes = {*range(20, 27), *range(40, 60)}  # seven in a row are bad luck, eight are a pattern

    def jump() -> StepResult:
        result = step()
        loss = 9.0 if trainer.step_count in spikes else 5.0
        return replace(result, loss=loss, widths=trainer.model.neurons)

    monkeypatch.setattr(trainer, "step", jump)
    thread.train()
    async with asyncio.timeout(PATIENCE_S):
        while not thread.progress.stalled:
            await thread.call(lambda trainer: None)
    assert thread.progress.steps == 47
    assert thread.progress.loss == pytest.approx(5.0)
    assert thread.progress.diverged == 0
    await thread.call(lambda trainer: thread.start_over())
    await steps_reach(thread, 70)  # what the loss is now is what it is compared with
    assert not thread.progress.stalled


async def test_after_other_weights_a_higher_loss_is_no_jump(
    trainer: Trainer, thread: TrainerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, loss = trainer.step, 0.3

    def learned_by_heart() -> StepResult:
        return replace(step(), loss=loss, widths=trainer.model.neurons)

    monkeypatch.setattr(trainer, "step", learned_by_heart)
    thread.train()
    await steps_reach(thread, 20)
    thread.pause()
    await thread.call(lambda trainer: thread.compare_anew())
    loss = 4.0
    thread.train()
    await steps_reach(thread, 40)
    assert not thread.progress.stalled
    assert thread.progress.loss == pytest.approx(4.0)


async def test_starting_over_forgets_the_optimizer(trainer: Trainer, thread: TrainerThread) -> None:
    thread.train()
    await steps_reach(thread, 2)
    thread.pause()
    await thread.call(lambda trainer: thread.start_over())
    assert not any(tensor.any() for tensor in trainer.optimizer.state_tensors().values())


async def test_stop_ends_the_thread_and_with_it_the_wait(thread: TrainerThread) -> None:
    thread.train()
    waiting = asyncio.ensure_future(thread.wait_failed())
    await steps_reach(thread, 1)
    await asyncio.to_thread(thread.stop)
    await waiting
    thread.stop()  # harmless twice
    assert not [one for one in threading.enumerate() if one.name == "trainer"]


async def test_the_death_of_the_thread_is_reported(
    trainer: Trainer, thread: TrainerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down() -> StepResult:
        raise MemoryError("no memory")

    monkeypatch.setattr(trainer, "step", break_down)
    waiting = asyncio.ensure_future(thread.wait_failed())
    thread.train()
    with pytest.raises(MemoryError):
        async with asyncio.timeout(PATIENCE_S):
            await waiting


async def test_who_stops_waiting_does_not_disturb_the_thread(thread: TrainerThread) -> None:
    waiting = asyncio.ensure_future(thread.wait_failed())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert await thread.call(lambda trainer: 1) == 1
    await asyncio.to_thread(thread.stop)
    await thread.wait_failed()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a priority belongs to the whole process")
def test_it_takes_a_lower_priority_but_never_a_higher_one() -> None:
    def nice_of(wanted: int, present: int) -> int:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), present)  # inherited by the threads it starts
        thread = TrainerThread(make_trainer(), FakeClock(), threads=1, nice=wanted)
        thread.start()
        nice = asyncio.run(thread.call(lambda trainer: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))
        thread.stop()
        return nice

    for wanted, present, result in ((5, 0, 5), (0, 0, 0), (10, 19, 19)):
        with ThreadPoolExecutor(1) as starter:  # a new thread each time: ours must keep its priority
            assert starter.submit(nice_of, wanted, present).result() == result
