"""`braniac-node train`: one model on one device, with no swarm and no process group, until its last step or a signal.

A training that was stopped, in whatever way, goes on from its newest checkpoint and ends with the same weights, to the
bit, as one that never was (on the same machine, with the same number of threads).
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch

from braniac.model.data import Batches
from braniac.model.errors import TrainingDiverged
from braniac.model.evaluate import held_out_loss
from braniac.model.hf import load_tier
from braniac.model.objective import Term
from braniac.model.optim import copy_checked
from braniac.model.tiers import parameter_count, tier_width
from braniac.model.tokenizer import BYTES, Tokenizer
from braniac.model.trainer import StepResult, Trainer
from braniac.node import train_checkpoint
from braniac.node.commands import table_text
from braniac.node.errors import ConfigError
from braniac.node.lock import DirectoryLock
from braniac.node.memory import check_fits, free_memory_bytes
from braniac.node.text import folder_tokenizer, given_tokenizer, text_source
from braniac.node.train_config import TrainConfig

_PEER = b"alone"  # decides, with the seed, which text a step reads and which widths it draws
_WINDOWS = 64  # of the held-out text


def train(
    config: TrainConfig, *, restart: bool, say: Callable[[str], None], clock: Callable[[], float]
) -> dict[str, Any]:
    """Train, from the newest checkpoint in `out.dir` if there is one and not `restart`; what came of it.

    `say` gets a line of progress now and then, `clock` tells seconds. SIGINT and SIGTERM end the training after the
    step in hand, with a checkpoint. Raises NodeError and ModelError.
    """
    trainer, tokenizer = _trainer(config, say)
    training = Training(config, trainer, tokenizer, say, clock)
    out = config.out.dir
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write checkpoints to {out} ({error.strerror}): choose another --out") from None
    lock = DirectoryLock(out, "--out")
    try:
        train_checkpoint.remove_leftovers(out)
        if restart:
            train_checkpoint.remove_all(out)
        else:
            training.resume()
        with StopSignals() as stop:
            training.run(stop)
        return training.result()
    finally:
        lock.release()


def _trainer(config: TrainConfig, say: Callable[[str], None]) -> tuple[Trainer, Tokenizer | None]:
    """The trainer at its first step, and what text is read with."""
    tier, section, folder = config.train.tier, config.model, config.model.folder
    start = None if folder is None else load_tier(folder, tier, context=section.context)[0]
    model = section.build() if start is None else start.config
    tokenizer = given_tokenizer(config.data) if folder is None else folder_tokenizer(folder, model, config.data)
    settings = config.settings(model)
    check_fits(model, tier, settings, free_memory_bytes())
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    corpus = text_source(config.data, tokenizer).load(model.vocab_size)
    for sentence in corpus.skipped:
        say(f"left out a shard: {sentence}")
    trainer = Trainer(model, tier, Batches(corpus, settings.seed, _PEER, model.context, settings.batch), settings)
    if start is not None:
        held = {name: p.to(trainer.params[name].dtype) for name, p in start.named_parameters()}
        copy_checked(trainer.params, held)
    return trainer, tokenizer


class StopSignals:
    """While entered, the first SIGINT or SIGTERM only sets `requested`; a second one acts as it would have."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True
        self.__exit__(None, None, None)


class Interval:
    """What happened since the last line of progress."""

    def __init__(self) -> None:
        self.steps = 0
        self.tokens = 0
        self.seconds = 0.0
        self._losses: dict[str, list[float]] = {}

    def add(self, terms: Sequence[Term], result: StepResult, seconds: float) -> None:
        """Take one step into account."""
        self.steps += 1
        self.tokens += result.tokens
        self.seconds += seconds
        for term, loss in zip(terms, result.losses, strict=True):
            name = str(term.widths[0]) if len(set(term.widths)) == 1 else "mixed"
            self._losses.setdefault(name, []).append(loss)

    @property
    def losses(self) -> dict[str, float]:
        """Mean loss of each width trained, the widest first and width maps last."""
        names = sorted(self._losses, key=lambda name: (name == "mixed", -int(name) if name.isdecimal() else 0))
        return {name: sum(self._losses[name]) / len(self._losses[name]) for name in names}


class Training:
    """A trainer on its way to the last step: what it has measured and saved so far."""

    def __init__(
        self,
        config: TrainConfig,
        trainer: Trainer,
        tokenizer: Tokenizer | None,
        say: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        """Raises DataError if too little text is held out to evaluate on."""
        self.config = config
        self.trainer = trainer
        self.tokenizer = tokenizer
        self.checkpoint: Path | None = None
        self.tokens = 0
        self._say = say
        self._clock = clock
        start = config.model.folder
        self._settings = train_checkpoint.settings_of(trainer) | {
            "model.folder": start and str(start),
            "data.tokenizer": BYTES if tokenizer is None else tokenizer.name,
        }
        self._windows = trainer.batches.held_out(_WINDOWS)  # now, lest it fail after hours
        self._interval, self._session_tokens, self._session_seconds = Interval(), 0, 0.0
        self._train_loss: dict[str, float] = {}
        self._held_out_loss: dict[int, float] = {}
        self._evaluated_at: int | None = None

    def resume(self) -> None:
        """Go on from the newest checkpoint, if there is one. Raises Incompatible, CheckpointError."""
        folder = train_checkpoint.newest(self.config.out.dir)
        if folder is not None:
            self.tokens = train_checkpoint.load(self.trainer, folder, self._settings)
            self.checkpoint = folder
            self._say(f"going on from {folder}")

    def run(self, stop: StopSignals) -> None:
        """Train until the last step or a signal, and leave a checkpoint of it. Raises TrainingDiverged."""
        trainer, every = self.trainer, self.config.train
        while trainer.step_count < trainer.settings.total_steps and not stop.requested:
            self._step()
            if trainer.step_count % every.report_every_steps == 0:
                self._report()
            if every.evaluate_every_steps and trainer.step_count % every.evaluate_every_steps == 0:
                self._evaluate()
            if every.save_every_steps and trainer.step_count % every.save_every_steps == 0:
                self._save()
        if self._interval.steps:
            self._report()
        if self.checkpoint != train_checkpoint.folder_of(self.config.out.dir, trainer.step_count):
            self._save()
        if stop.requested:  # whoever sent the signal may not wait for an evaluation
            self._say(f"stopped after step {trainer.step_count}: the same command goes on from there")
        elif self._evaluated_at != trainer.step_count:
            self._evaluate()

    def _step(self) -> None:
        trainer = self.trainer
        terms = trainer.objective.terms(trainer.step_count)
        began = self._clock()
        try:
            result = trainer.step()
        except TrainingDiverged as error:
            kept = "no checkpoint was written" if self.checkpoint is None else f"{self.checkpoint} is as it was"
            raise TrainingDiverged(f"{str(error).removesuffix('.')}; {kept}") from None
        self._interval.add(terms, result, self._clock() - began)
        self.tokens += result.tokens

    def _report(self) -> None:
        interval, trainer = self._interval, self.trainer
        self._train_loss |= interval.losses
        self._session_tokens += interval.tokens
        self._session_seconds += interval.seconds
        self._interval = Interval()
        steps = trainer.settings.total_steps
        self._say(
            f"step {trainer.step_count:>{len(str(steps))}}/{steps}  loss {_losses_text(interval.losses)}"
            f"  {_rate(interval.tokens, interval.seconds):,.0f} tokens/s"
            f"  lr x{trainer.settings.lr_scale(trainer.step_count - 1):.2f}"
        )

    def _evaluate(self) -> None:
        trainer = self.trainer
        widths = {tier: tier_width(trainer.config, tier) for tier in range(trainer.tier, trainer.config.tiers)}
        self._held_out_loss = {t: held_out_loss(trainer.model, self._windows, width) for t, width in widths.items()}
        self._evaluated_at = trainer.step_count
        named = {str(widths[tier]): loss for tier, loss in self._held_out_loss.items()}
        self._say(f"step {trainer.step_count}  held-out loss {_losses_text(named)}")

    def _save(self) -> None:
        self.checkpoint = train_checkpoint.save(
            self.trainer, self.config.out.dir, self.tokens, self._settings, self.tokenizer
        )

    def result(self) -> dict[str, Any]:
        """How it went, ready for JSON; losses are in nats per token (per byte, for text)."""
        trainer, model = self.trainer, self.trainer.config
        tiers = [
            {
                "tier": tier,
                "width": (width := tier_width(model, tier)),
                "parameters": parameter_count(model, tier),
                "train_loss": self._train_loss.get(str(width)),
                "held_out_loss": self._held_out_loss.get(tier),
            }
            for tier in range(trainer.tier, model.tiers)
        ]
        return {
            "checkpoint": str(self.checkpoint),
            "step": trainer.step_count,
            "steps": trainer.settings.total_steps,
            "finished": trainer.step_count >= trainer.settings.total_steps,
            "tokens": self.tokens,
            "seconds": self._session_seconds,
            "tokens_per_s": _rate(self._session_tokens, self._session_seconds),
            "evaluated_at": self._evaluated_at,
            "tiers": tiers,
        }


def result_text(result: Mapping[str, Any]) -> str:
    """The result for people: a table of the tiers, then where the model is."""
    rows = [
        [
            str(tier["tier"]),
            str(tier["width"]),
            f"{tier['parameters']:,}",
            *("-" if tier[key] is None else f"{tier[key]:.4f}" for key in ("train_loss", "held_out_loss")),
        ]
        for tier in result["tiers"]
    ]
    return "\n".join([
        table_text(["TIER", "WIDTH", "PARAMETERS", "TRAIN LOSS", "HELD-OUT LOSS"], rows),
        f"{result['step']:,} of {result['steps']:,} steps, {result['tokens']:,} tokens, "
        f"{result['tokens_per_s']:,.0f} tokens/s, losses in nats per token",
        f"checkpoint {result['checkpoint']}",
    ])  # fmt: skip


def _losses_text(losses: Mapping[str, float]) -> str:
    return ", ".join(f"{name}: {loss:.4f}" for name, loss in losses.items())


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if seconds > 0 else 0.0
