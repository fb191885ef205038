"""From a dense model to a MatFormer: what is each ordering of the neurons worth, before and after a short training?

Trains a dense model on the standard library (whole width only), sorts its neurons in every way that convert.py knows,
and trains each result jointly at all widths for some more steps. Prints a table of held-out losses in nats per byte,
or with --json one JSON object; its keys:
  dense              the dense model, whole
  dense_continued    the dense model after as many further steps at the whole width only
  orderings          per kind the losses `before` and `after` the joint training, one entry per width

    python benchmarks/convert.py --json --seed 0
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence

import torch

from braniac.model.config import PRESETS
from braniac.model.convert import KINDS, ConversionReport, report
from braniac.model.data import Batches
from braniac.model.objective import ObjectiveSettings
from braniac.model.trainer import Trainer, TrainSettings
from braniac.node.text import default_text


def run(options: argparse.Namespace) -> ConversionReport:
    config = PRESETS[options.preset]
    corpus = default_text().load(config.vocab_size)

    def batches(purpose: str, batch: int) -> Batches:
        return Batches(corpus, options.seed, purpose.encode(), config.context, batch)

    dense = TrainSettings(
        objective=ObjectiveSettings(mode="fixed"), total_steps=options.steps, seed=options.seed, check_gradients=True
    )
    trainer = Trainer(config, 0, batches("dense", dense.batch), dense)
    for _ in range(options.steps):
        trainer.step()
    joint = dataclasses.replace(
        dense,
        objective=ObjectiveSettings(mode="joint"),
        total_steps=options.finetune_steps,
        warmup_steps=max(1, options.finetune_steps // 10),
        learning_rate=dense.learning_rate * options.finetune_rate,
        adam_learning_rate=dense.adam_learning_rate * options.finetune_rate,
    )
    return report(
        trainer.model,
        KINDS,
        calibration=batches("calibration", options.calibration).batch(0),
        windows=batches("evaluation", 1).held_out(options.windows),
        batches=batches("finetune", joint.batch),
        settings=joint,
        seed=options.seed,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", choices=sorted(PRESETS))
    parser.add_argument("--steps", type=int, default=300, help="of the dense model")
    parser.add_argument("--finetune-steps", type=int, default=40, help="joint steps after the sorting")
    parser.add_argument("--finetune-rate", type=float, default=0.25, help="their learning rates, in those of the dense")
    parser.add_argument("--calibration", type=int, default=128, help="windows of training text that decide the orders")
    parser.add_argument("--windows", type=int, default=64, help="held-out windows that decide the losses")
    parser.add_argument("--quick", action="store_true", help="a third of the steps: under a minute")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args(arguments)
    if options.quick:
        options.steps, options.finetune_steps = options.steps // 3, options.finetune_steps // 4
    torch.set_num_threads(1)
    result = run(options)
    if options.json:
        print(json.dumps({**dataclasses.asdict(result), "options": vars(options)}))
        return
    print(f"{'ordering':<18}" + "".join(f"{width:>8}" for width in result.widths))
    print(f"{'dense':<18}{result.dense:8.3f}\n{'dense, continued':<18}{result.dense_continued:8.3f}")
    for kind, losses in result.orderings.items():
        for when, values in (("", losses.before), (", trained", losses.after)):
            print(f"{kind + when:<18}" + "".join(f"{value:8.3f}" for value in values))


if __name__ == "__main__":
    main()
