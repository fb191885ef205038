"""How much memory a node's training takes: real steps and one fragment's offer and merge, in this fresh process.

Each step is a forward and backward pass with the optimizer inside, on random tokens; then one fragment is read,
encoded, merged and rebased by the production codec, merge and ledger, its anchor being a file. Peaks are the kernel's
(VmHWM) and, for anonymous memory, the largest of many looks at /proc. The model's share of the machine (`mfu`) counts 6
FLOPs per token and parameter that is multiplied, and attention; not the recomputation, nor the optimizer, whose time it
includes. It compares CPU seconds with those of a matrix product, which others on the machine disturb least;
`tokens_per_s` is by the clock on the wall. The JSON object is the last line on stdout.

With `--limit-gib` all that runs in a memory cgroup of its own, of version 1 or 2, which only root may make; the kernel
kills it if it needs more. `growth` is by how much memory after the last step exceeds that after the
20th, relative to it.

    python benchmarks/memory.py --preset nano-1b --tier 0 --json
    python benchmarks/memory.py --preset small --precision lean --tokens 256 --steps 200 --json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from braniac.model.config import PRESETS, ModelConfig
from braniac.model.data import Batches
from braniac.model.fragments import Fragment, fragment_table
from braniac.model.lean import compute_type
from braniac.model.objective import ObjectiveSettings
from braniac.model.sources import Corpus
from braniac.model.tiers import EMBEDDING, parameter_count, parameter_shapes
from braniac.model.trainer import Trainer, TrainSettings, default_precision, memory_bytes_needed
from braniac.node import bridge
from braniac.node.founding import RECIPES, TURNS
from braniac.protocol import codec, ledger
from braniac.protocol.codec import CodecRules
from braniac.protocol.identity import Identity
from braniac.protocol.manifest import Manifest, MergeRules
from braniac.protocol.merge import Contribution, merge

GIB = 1 << 30
LOOK_EVERY_S = 0.02
CGROUPS = Path("/sys/fs/cgroup")
SETTLED_STEPS = 20
LEAN_METHODS = ("add_gradient", "apply", "update_rows")


def status_bytes(key: str) -> int:
    """A figure of this process from the kernel."""
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith(key + ":")).split()[1]) * 1024


def run_limited(arguments: list[str], limit_gib: float) -> dict[str, object]:
    """This benchmark in a fresh process in a cgroup of its own, swap included. Exits with a sentence if that fails."""
    old = (CGROUPS / "memory").is_dir()
    group = CGROUPS / ("memory" if old else "") / f"braniac-memory-{os.getpid()}"
    limits = ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"] if old else ["memory.max", "memory.swap.max"]
    try:
        group.mkdir()
        for name, limit in zip(limits, (round(limit_gib * GIB), round(limit_gib * GIB) if old else 0), strict=True):
            if (group / name).exists():  # swap is not always accounted for
                (group / name).write_text(str(limit))
    except OSError as error:
        sys.exit(f"--limit-gib needs a memory cgroup, which cannot be made here ({error}): run it as root, or without.")
    try:
        join = f'echo $$ > "{group}/cgroup.procs" && exec "$@"'  # from its first page on
        command = ["sh", "-c", join, "sh", sys.executable, __file__, *arguments, "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        peak = int((group / ("memory.max_usage_in_bytes" if old else "memory.peak")).read_text())
    finally:
        group.rmdir()
    if done.returncode:
        sys.exit(
            f"it ended with {done.returncode} (-9: the kernel killed it) after {peak / GIB:.3f} of {limit_gib} GiB."
        )
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result | {"limit_gib": limit_gib, "cgroup_peak_gib": peak / GIB}


class AnonymousPeak:
    """Looks at RssAnon from a thread of its own, because the kernel keeps no high-water mark of it."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(LOOK_EVERY_S):
            self.peak_bytes = max(self.peak_bytes, status_bytes("RssAnon"))

    def stop(self) -> int:
        self._stop.set()
        self._thread.join()
        return self.peak_bytes


def gemm_gflops(dtype: torch.dtype) -> float:
    """Matrix products of the model's size: the best of three, in 10^9 FLOPs per CPU second of one thread."""
    a, b = torch.randn(512, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    seconds = []
    for _ in range(4):
        began = time.process_time()
        torch.mm(a, b)
        seconds.append(time.process_time() - began)
    return 2 * 512 * 2048 * 2048 / min(seconds[1:]) / 1e9


def flops_per_token(config: ModelConfig, tier: int, context: int) -> float:
    """Of a forward and backward pass: 6 per weight that is multiplied, and causal attention's two products."""
    shapes = parameter_shapes(config, tier)
    multiplied = parameter_count(config, tier) - np.prod(shapes[EMBEDDING])
    inner = config.num_attention_heads * config.head_dim
    return float(6 * multiplied + 6 * config.num_hidden_layers * inner * context)


class Stopwatch:
    """Adds up the seconds that some methods of an object take, by a clock of choice."""

    def __init__(self, owner: object, names: tuple[str, ...], clock: Callable[[], float] = time.process_time) -> None:
        self.seconds = 0.0
        self._clock = clock
        for name in names:
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, method: Callable[..., object]) -> Callable[..., object]:
        def timed(*args: object) -> object:
            began = self._clock()
            try:
                return method(*args)
            finally:
                self.seconds += self._clock() - began

        return timed


def manifest_of(config: ModelConfig, fragments: tuple[Fragment, ...], preset: str) -> Manifest:
    recipe, founder = RECIPES[preset], Identity.from_seed(bytes(32))
    return Manifest(
        name="memory",
        founder=founder.peer_id,
        epoch_ms=0,
        slot_ms=round(1000 * recipe.slot_s),
        seed=0,
        tiers=config.tiers,
        model=config.to_dict(),
        data={},
        layout_digest=bytes(32),
        fragments=bridge.fragment_specs(fragments),
        up=CodecRules(recipe.up_per_tile, 1, TURNS),
        down=CodecRules(recipe.down_per_tile, 2),
        merge=MergeRules(),
    )


def offer_and_merge(trainer: Trainer, manifest: Manifest, fragment: Fragment, folder: Path) -> int:
    """One fragment's slot, alone, with its anchor in a file: the payload's size in bytes."""
    layout, file = manifest.fragments[fragment.index].layout, folder / f"{fragment.index}.anchor"
    file.write_bytes(bridge.anchor_bytes(bridge.initial_anchor(trainer.config, fragment, trainer.settings.seed)))

    anchor = bridge.anchor_from_bytes(file.read_bytes(), fragment.size)
    work = ledger.residual(bridge.to_fixed_point(trainer.read(fragment)), anchor)
    payload, sent = codec.encode_topk(layout, manifest.up, work)
    del work
    merged = merge(manifest, fragment.index, [Contribution(manifest.founder, 1, payload)])
    assert merged is not None
    settlement = ledger.settle(codec.decode(layout, manifest.down, merged.update), sent)
    file.write_bytes(bridge.anchor_bytes(ledger.move_anchor(anchor, settlement)))
    trainer.rebase(fragment, bridge.weight_change(settlement, fragment.size))
    return len(payload)


def run(options: argparse.Namespace) -> dict[str, object]:
    config = PRESETS[options.preset]
    if options.context:
        config = ModelConfig.from_dict(config.to_dict() | {"context": options.context})
    batch = max(1, options.tokens // config.context)
    peaks = {str(dtype).removeprefix("torch."): gemm_gflops(dtype) for dtype in {torch.float32, compute_type()}}
    looks = AnonymousPeak()
    precision = options.precision or default_precision(config)
    # The whole tier in every step: a narrower one needs less.
    settings = TrainSettings(
        batch=batch,
        precision=precision,
        objective=ObjectiveSettings(mode="fixed"),
        warmup_steps=0,
        kept_layers=options.kept_layers,
    )
    dice = np.random.default_rng(0)
    corpus = Corpus("noise", (dice.integers(0, config.vocab_size, 1 << 20).astype(np.uint16),), ())
    trainer = Trainer(config, options.tier, Batches(corpus, 0, b"", config.context, batch), settings)
    ready_bytes = status_bytes("VmRSS")
    optimizer = Stopwatch(trainer.optimizer, LEAN_METHODS if precision == "lean" else ("step",))
    fragments = fragment_table(config, options.fragments or RECIPES[options.preset].fragments)
    manifest = manifest_of(config, fragments, options.preset)
    fragment = max((fragments[index] for index in manifest.held(options.tier)), key=lambda held: held.size)
    steps: list[tuple[float, float]] = []
    losses, after_bytes, payload_bytes, slot_s = [], [], 0, 0.0
    for number in range(options.steps):
        if number == options.steps - 1:
            began = time.process_time()
            with tempfile.TemporaryDirectory() as folder:
                payload_bytes = offer_and_merge(trainer, manifest, fragment, Path(folder))
            slot_s = time.process_time() - began
        began_at = time.perf_counter(), time.process_time()
        losses.append(trainer.step().loss)
        steps.append((time.perf_counter() - began_at[0], time.process_time() - began_at[1]))
        after_bytes.append(status_bytes("VmRSS"))
        peaks = {name: max(was, gemm_gflops(getattr(torch, name))) for name, was in peaks.items()}
    step_s, step_cpu_s = (statistics.median(column) for column in zip(*steps, strict=True))
    tokens, peak = batch * config.context, max(peaks.values())
    optimizer_s = optimizer.seconds / options.steps
    achieved = tokens * flops_per_token(config, options.tier, config.context) / 1e9
    return {
        "params": parameter_count(config, options.tier),
        "tier": options.tier,
        "peak_rss_gib": status_bytes("VmHWM") / GIB,
        "anonymous_gib": looks.stop() / GIB,
        "tokens_per_s": tokens / step_s,
        "mfu": achieved / step_cpu_s / peak,
        "gemm_gflops": peak,
        "gemm_gflops_by_type": peaks,
        "mfu_without_optimizer": achieved / (step_cpu_s - optimizer_s) / peak,
        "tokens_per_cpu_s": tokens / step_cpu_s,
        "preset": options.preset,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "tokens_per_step": tokens,
        "context": config.context,
        "step_cpu_s": step_cpu_s,
        "optimizer_cpu_s": optimizer_s,
        "slot_cpu_s": slot_s,
        "fragment_parameters": fragment.size,
        "payload_bytes": payload_bytes,
        "estimate_gib": memory_bytes_needed(config, options.tier, settings) / GIB,
        "before_training_gib": ready_bytes / GIB,
        "after_steps_gib": [after / GIB for after in after_bytes],
        "growth": after_bytes[-1] / after_bytes[SETTLED_STEPS - 1] - 1 if options.steps > SETTLED_STEPS else None,
        "losses": losses,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="nano-1b", choices=sorted(PRESETS))
    parser.add_argument("--tier", type=int, default=0)
    parser.add_argument("--precision", choices=("fp32", "lean"), help="default: what a node takes for this model")
    parser.add_argument("--tokens", type=int, default=1024, help="per step")
    parser.add_argument("--context", type=int, default=0, help="tokens in a window; default: the preset's")
    parser.add_argument("--kept-layers", type=int, help="default: what a node takes for this precision")
    parser.add_argument("--fragments", type=int, default=0, help="default: the preset's")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--limit-gib", type=float, default=0.0, help="run in a memory cgroup of this size")
    parser.add_argument("--threads", type=int, default=1, help="as a node's default")
    parser.add_argument("--json", action="store_true", help="only the JSON object")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    alone = [*sys.argv[1:], "--limit-gib", "0"]
    result = run_limited(alone, options.limit_gib) if options.limit_gib else run(options)
    if not options.json:
        for key, value in result.items():
            print(f"{key:24}{value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
