"""The outer step without a network: how good are the agreed weights after W windows, for one codec and merge rule?

Real trainers, real codec, real merge, in one process and in step (outer/braniac.py); every peer contributes to every
slot it holds. Prints one JSON object: held-out loss in nats per byte per tier of the anchors, loss of the first peer's
own weights, and bits per parameter and window.

    python benchmarks/merge_rules.py --tiers 0,1,2,3 --windows 15 --steps 24 --up 64 --down 256 --coverage 1 --step 1.0
"""

from __future__ import annotations

import argparse
import json

import torch

from braniac.model.config import PRESETS
from braniac.node.founding import TURNS
from braniac.node.text import default_text
from braniac.protocol.codec import CodecRules
from braniac.protocol.manifest import MergeRules
from outer.braniac import Braniac
from outer.swarm import Plan


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
    plan = Plan(
        config=config,
        tiers=tuple(int(tier) for tier in options.tiers.split(",")),
        windows=options.windows,
        steps=options.steps,
        batch=8,
        fragments=options.fragments,
        up=CodecRules(options.up, options.up_bits, TURNS),
        down=CodecRules(options.down, options.down_bits),
        merge=MergeRules(step_q16=round(options.step * 65536), coverage_halves=options.coverage),
        evaluated=64,
        seed=options.seed,
    )
    swarm = Braniac(plan, default_text().load(config.vocab_size))
    swarm.run()
    return {
        "loss_agreed": swarm.agreed_losses(),
        "loss_own": swarm.own_loss(0),
        "steps_per_peer": swarm.peers[0].trainer.step_count,
        "bits_per_param_per_window": swarm.payload_bits_per_parameter / options.windows,
    }


if __name__ == "__main__":
    main()
