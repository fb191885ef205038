"""The outer step without a network: how good are the agreed weights after W windows, for one codec and merge rule?

Real trainers, real codec, real merge, in one process and in lockstep; every peer contributes to every slot it holds.
Prints one JSON object: held-out loss in nats per byte per tier of the anchors, loss of the first peer's own weights,
and bits per parameter and window.

    python benchmarks/outer.py --tiers 0,1,2,3 --windows 15 --steps 24 --up 64 --down 256 --coverage 1 --step 1.0
"""

from __future__ import annotations

import argparse
import json

import torch

from braniac.model.config import PRESETS, ModelConfig
from braniac.model.data import Batches
from braniac.model.evaluate import held_out_loss
from braniac.model.fragments import Fragment, fragment_table, scatter_
from braniac.model.gpt import GPT
from braniac.model.sources import Corpus
from braniac.model.tiers import tier_width
from braniac.model.trainer import Trainer, TrainSettings
from braniac.node import bridge
from braniac.node.text import default_text
from braniac.protocol import codec, ledger
from braniac.protocol.bitpack import Int32Array
from braniac.protocol.codec import CodecRules
from braniac.protocol.identity import Identity
from braniac.protocol.manifest import Manifest, MergeRules
from braniac.protocol.merge import Contribution, merge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", choices=sorted(PRESETS))
    parser.add_argument("--tiers", default="0,1,2,3", help="one peer per entry")
    parser.add_argument("--windows", type=int, default=15)
    parser.add_argument("--steps", type=int, default=24, help="inner steps per window")
    parser.add_argument("--fragments", type=int, default=8)
    parser.add_argument("--up", type=int, default=64, help="values of 4096 that a peer sends")
    parser.add_argument("--down", type=int, default=256, help="values of 4096 in a merged update")
    parser.add_argument("--up-bits", type=int, default=1, help="magnitude bits of a contribution")
    parser.add_argument("--down-bits", type=int, default=2, help="magnitude bits of an update")
    parser.add_argument("--coverage", type=int, default=1, choices=(0, 1, 2))
    parser.add_argument("--step", type=float, default=1.0, help="outer step size")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = run(options)
    result["options"] = vars(options)
    print(json.dumps(result))


def run(options: argparse.Namespace) -> dict[str, object]:
    config = PRESETS[options.preset]
    fragments = fragment_table(config, options.fragments)
    identities = [Identity.from_seed(bytes([i]) * 32) for i in range(len(options.tiers.split(",")))]
    tiers = [int(tier) for tier in options.tiers.split(",")]
    manifest = Manifest(
        name="outer",
        founder=identities[0].peer_id,
        epoch_ms=0,
        slot_ms=1000,
        seed=options.seed,
        tiers=config.tiers,
        model=config.to_dict(),
        data={},
        layout_digest=bytes(32),
        fragments=bridge.fragment_specs(fragments),
        up=CodecRules(options.up, options.up_bits),
        down=CodecRules(options.down, options.down_bits),
        merge=MergeRules(step_q16=round(options.step * 65536), coverage_halves=options.coverage),
    )
    corpus = default_text().load(config.vocab_size)
    settings = TrainSettings(seed=options.seed)
    trainers = [
        Trainer(config, tier, Batches(corpus, options.seed, i.peer_id, config.context, settings.batch), settings)
        for tier, i in zip(tiers, identities, strict=True)
    ]
    anchors = {f.index: bridge.initial_anchor(config, f, options.seed) for f in fragments}
    steps_per_slot = options.steps / options.fragments
    done, payload_bits, slots = 0, 0.0, options.windows * options.fragments
    for slot in range(slots):
        while done < (slot + 1) * steps_per_slot:
            for trainer in trainers:
                trainer.step()
            done += 1
        fragment, layout = fragments[manifest.fragment_of(slot)], manifest.fragments[manifest.fragment_of(slot)].layout
        sent, contributions = {}, []
        for number, (tier, trainer) in enumerate(zip(tiers, trainers, strict=True)):
            if manifest.holds(tier, fragment.index):
                work = ledger.residual(bridge.to_fixed_point(trainer.read(fragment)), anchors[fragment.index])
                payload, sent[number] = codec.encode_topk(layout, manifest.up, work)
                contributions.append(Contribution(identities[number].peer_id, 1000, payload))
                payload_bits += 8 * len(payload) / manifest.parameters(tier)
        merged = merge(manifest, fragment.index, contributions)
        if merged is None:
            continue
        update = codec.decode(layout, manifest.down, merged.update)
        for number, own in sent.items():
            settlement = ledger.settle(update, own)
            trainers[number].rebase(fragment, bridge.weight_change(settlement, layout.size))
        anchors[fragment.index] = ledger.move_anchor(anchors[fragment.index], ledger.settle(update, None))
    return {
        "loss_agreed": _losses(config, fragments, anchors, corpus, options.seed),
        "loss_own": held_out_loss(trainers[0].model, _windows(config, corpus, options.seed)),
        "steps_per_peer": done,
        "bits_per_param_per_window": payload_bits / len(tiers) / options.windows,
    }


def _windows(config: ModelConfig, corpus: Corpus, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return Batches(corpus, seed, b"evaluation", config.context, 1).held_out(64)


def _losses(
    config: ModelConfig, fragments: tuple[Fragment, ...], anchors: dict[int, Int32Array], corpus: Corpus, seed: int
) -> dict[int, float]:
    model = GPT(config, 0)
    parameters = dict(model.named_parameters())
    for fragment in fragments:
        scatter_(parameters, fragment, bridge.to_weights(anchors[fragment.index]))
    windows = _windows(config, corpus, seed)
    return {tier: held_out_loss(model, windows, tier_width(config, tier)) for tier in range(config.tiers)}


if __name__ == "__main__":
    main()
