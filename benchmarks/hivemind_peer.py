"""One peer of hivemind's averager, for round.py: it averages tensors like a preset's whenever it is told to.

Commands come on stdin, one per line: `round` takes new values, as if it had trained, and averages once; `save PATH`
writes what is held as a .npy file. Answers are lines of JSON on stdout: {"addresses"}, then per round {"stage"} when
the all-reduce begins and {"seconds", "group", "error"} at its end, and {"saved"}.

    python benchmarks/hivemind_peer.py --preset tiny --codec float16 --number 0 [ADDRESS...]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from typing import Any

import numpy as np
import torch

from braniac.model.config import PRESETS
from braniac.model.gpt import GPT

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import hivemind
    from hivemind.averaging.control import AveragingStage
    from hivemind.compression import Float16Compression, Uniform8BitQuantization
    from hivemind.compression.quantization import Quantization

CODECS = {"float16": Float16Compression, "uniform8": Uniform8BitQuantization}
POLL_S = 0.002


def repaired_extract(self: Any, serialized: Any) -> torch.Tensor:
    """hivemind 1.1.12's own, which fails from numpy 2.4 on: it makes an int of an array of one element."""
    size = int(np.frombuffer(serialized.buffer, count=1, dtype=np.int64)[0])
    codebook = np.frombuffer(serialized.buffer, offset=8, count=size, dtype=self.codebook_dtype)
    codes = np.frombuffer(serialized.buffer, offset=8 + codebook.nbytes, dtype=self.indices_dtype)
    values = codebook[codes].reshape(tuple(serialized.size))
    return torch.from_numpy(values).to(getattr(torch, serialized.dtype))


def say(**answer: object) -> None:
    print(json.dumps(answer), flush=True)


def average(averager: hivemind.DecentralizedAverager, generator: torch.Generator) -> None:
    """One round, from new values."""
    with averager.get_tensors() as tensors:
        for tensor in tensors:
            tensor.normal_(generator=generator)
    began_s = time.monotonic()
    control = averager.step(wait=False)
    while not control.done():
        if control.stage == AveragingStage.RUNNING_ALLREDUCE:
            say(stage="all-reduce")
            break
        time.sleep(POLL_S)
    try:
        group, error = len(control.result()), None
    except Exception as failure:  # whatever it is, it is the outcome of this round
        group, error = 0, repr(failure)
    say(seconds=time.monotonic() - began_s, group=group, error=error)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), required=True)
    parser.add_argument("--codec", choices=sorted(CODECS), required=True)
    parser.add_argument("--number", type=int, required=True)
    parser.add_argument("--peers", type=int, default=4)
    parser.add_argument("addresses", nargs="*")
    options = parser.parse_args()
    torch.set_num_threads(1)
    Quantization.extract = repaired_extract
    dht = hivemind.DHT(initial_peers=options.addresses, host_maddrs=["/ip4/127.0.0.1/tcp/0"], start=True)
    averager = hivemind.DecentralizedAverager(
        [torch.zeros(parameter.shape) for parameter in GPT(PRESETS[options.preset], 0).parameters()],
        dht,
        start=True,
        prefix="round",
        target_group_size=options.peers,
        min_matchmaking_time=3.0,
        request_timeout=1.5,
        compression=CODECS[options.codec](),
    )
    say(addresses=[str(address) for address in dht.get_visible_maddrs()])
    generator = torch.Generator().manual_seed(options.number)
    for line in sys.stdin:
        command, _, path = line.strip().partition(" ")
        if command == "round":
            average(averager, generator)
        else:
            with averager.get_tensors() as tensors:
                np.save(path, torch.cat([tensor.flatten() for tensor in tensors]).numpy())
            say(saved=path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
