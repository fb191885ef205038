"""Write docs/RESULTS.md from the CSV files in benchmarks/results/, and draw the pictures that it shows.

    python benchmarks/report.py

Every figure in it comes from a CSV file; what was not measured is said to be missing. A test compares the file with
what this script makes of the results in the repository.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from plots import RESULTS, draw
from report_tables import (
    burst_table,
    delay_table,
    drops_table,
    loss_bytes_table,
    peak_to_mean,
    round_table,
    table,
    tiers_table,
)

from outer.tables import Folder, folders, grouped, mean

TARGET = Path(__file__).parent.parent / "docs" / "RESULTS.md"

INTRODUCTION = """\
# Results of the comparisons

Made by `python benchmarks/report.py` from the CSV files in [benchmarks/results](../benchmarks/results): run it again
after a new run, and edit nothing here. Losses are held-out, in nats per byte, as means over seeds ± standard deviation.
Other measurements (memory, speed, churn, hostile peers) are in [benchmarks/RESULTS.md](../benchmarks/RESULTS.md).
"""

NOT_SHOWN = """\
* **A run of a billion parameters**, on phones or on anything else. Steps of such a model were measured in memory and
  time, no model of that size was trained.
* **Phones.** Everything here ran on one Linux machine; hours on phone links are computed from bytes, with an assumed
  time per step.
* **The internet.** Live comparisons ran over loopback, with no delay and no loss between peers.
* **Many seeds and long runs.** The tables say how many seeds and tokens there were. Losses still fall when the runs
  end, so an order of methods at their end need not be the order at convergence.
* **The authors' own code.** Rival methods were written anew from their code or papers, with one inner optimizer for
  all but DeMo and DisTrO; each names its departures in its docstring. NoLoCo's constants come from descriptions.
* **Tuning of rivals** beyond the learning rates in `sweep.csv`.
* **Text other than the source code of Python's standard library**, read as bytes.\
"""


@dataclass(frozen=True)
class Section:
    """One comparison in the report."""

    title: str
    script: str
    kind: str
    """Name of its main CSV file."""
    table: Callable[[Folder], Iterator[str]]
    pictures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    """What the README says, and the figure that stands for it."""

    text: str
    script: str
    kind: str
    """Name of the CSV file that the figure comes from."""
    figure: Callable[[Folder], str | None]


SECTIONS = (
    Section(
        "Loss against bytes",
        "loss_bytes.py",
        "loss_bytes",
        loss_bytes_table,
        ("loss_against_bytes", "loss_against_tokens", "loss_against_hours"),
    ),
    Section("Peers that drop out", "drops.py", "drops", drops_table, ("loss_under_drops",)),
    Section("Bursts", "burst.py", "burst", burst_table, ("uplink_over_time",)),
    Section("Late updates and slow peers", "delay.py", "delay", delay_table),
    Section("A live round, against hivemind", "round.py", "round", round_table),
    Section("Small devices beside large ones", "tiers.py", "tiers", tiers_table, ("tiers",)),
)


def against(folder: Folder, ours: str, theirs: str) -> str | None:
    """Loss and bytes of one method beside another's."""
    methods = grouped(folder.rows("loss_bytes"), "method")
    if (ours,) not in methods or (theirs,) not in methods:
        return None
    mine, other = methods[(ours,)], methods[(theirs,)]
    over = 100 * (mean(mine, "loss") / mean(other, "loss") - 1)
    ratio = _traffic(other) / _traffic(mine)
    return f"loss {over:+.1f}% against {theirs}, with 1/{ratio:.3g} of its bytes, sent and received"


def _traffic(rows: list[dict[str, str]]) -> float:
    return mean(rows, "bytes_per_peer") + mean(rows, "downlink_bytes_per_peer")


def rise(folder: Folder, percent: int) -> str | None:
    """What drops cost Braniac."""
    by_percent = grouped([row for row in folder.rows("drops") if row["method"] == "braniac"], "missing_percent")
    if ("0",) not in by_percent or (str(percent),) not in by_percent:
        return None
    over = 100 * (mean(by_percent[(str(percent),)], "loss") / mean(by_percent[("0",)], "loss") - 1)
    return f"loss {over:+.1f}% when {percent}% of the peers drop out of every exchange"


def killed(folder: Folder) -> str | None:
    """How survivors of ours went on."""
    rows = [row for row in folder.rows("round_kills") if row["system"] == "braniac" and row["lost_s"]]
    if not rows:
        return None
    worst, agree = max(float(row["lost_s"]) for row in rows), min(float(row["agree_percent"]) for row in rows)
    return f"one of four killed: at most {worst:.1f} s without a certificate, survivors agree on {agree:.0f}%"


def help_by(folder: Folder, swarm: str) -> str | None:
    """What a mixed swarm gives the large model."""
    rows = grouped([row for row in folder.rows("tiers") if row["tier"] == "0"], "swarm")
    if (swarm,) not in rows or ("2_full",) not in rows:
        return None
    pairs = zip(rows[(swarm,)], rows[("2_full",)], strict=True)
    ratios = [float(mixed["loss"]) / float(alone["loss"]) for mixed, alone in pairs]
    return f"full-width loss {100 * (statistics.mean(ratios) - 1):+.2f}% against 2 full peers alone ({swarm})"


def burstiness(folder: Folder, method: str) -> str | None:
    rows = grouped(folder.rows("burst"), "method").get((method,))
    return None if rows is None else f"busiest second {peak_to_mean(rows):.1f} times the mean"


CLAIMS = (
    Claim(
        "Peers average one small piece per slot, and learn together by it",
        "loss_bytes.py",
        "loss_bytes",
        lambda folder: against(folder, "braniac", "diloco"),
    ),
    *(
        Claim(
            f"The same, with {part} of {rival}",
            "loss_bytes.py",
            "loss_bytes",
            functools.partial(against, ours=f"braniac_at_{rival}", theirs=rival),
        )
        for rival, part in (
            ("diloco", "a 150th of the bytes"),
            *((other, "the bytes") for other in ("demo", "distro", "sparseloco")),
        )
    ),
    Claim("Any peer may vanish at any moment, and the others go on", "round.py", "round_kills", killed),
    Claim(
        "Without a certificate the work is offered again later", "drops.py", "drops", lambda folder: rise(folder, 25)
    ),
    Claim(
        "No exchange is huge: one small piece after the other",
        "burst.py",
        "burst",
        functools.partial(burstiness, method="braniac"),
    ),
    Claim(
        "With `caps.upload_pace` uploads are even",
        "burst.py",
        "burst",
        functools.partial(burstiness, method="braniac_paced"),
    ),
    *(
        Claim(
            f"A device trains the slice that fits it, and helps the whole by it ({swarm})",
            "tiers.py",
            "tiers",
            functools.partial(help_by, swarm=swarm),
        )
        for swarm in ("2_full_6_quarter", "2_full_6_half")
    ),
)


def claim_rows(results: Path) -> Iterator[tuple[str, ...]]:
    for claim in CLAIMS:
        shown = [(folder, figure) for folder in folders(results, claim.kind) if (figure := claim.figure(folder))]
        for folder, figure in shown:
            if folder.about["options"]["quick"]:
                figure += "; a quick run, too short to judge"
            yield claim.text, f"`{claim.script}` ([{folder.path.name}](#{folder.path.name}))", figure
        if not shown:
            yield claim.text, f"`{claim.script}`", "**not measured yet**"


def extent(folder: Folder, kind: str) -> str:
    """How much was trained, of what was simulated."""
    if folder.about["plan"] is None:
        return ""
    plan, seeds = folder.about["plan"], {row["seed"] for row in folder.rows(kind) if "seed" in row}
    tokens = plan["windows"] * plan["steps"] * folder.tokens_per_step
    return f"{folder.parameters:,} parameters, {tokens:,} tokens per peer, {len(seeds) or 1} seed(s)."


def section(part: Section, results: Path) -> Iterator[str]:
    yield f"## {part.title}\n"
    found = folders(results, part.kind)
    for folder in found:
        about = folder.about
        yield f"### {folder.path.name}\n"
        yield f"`{about['command']}`\n"
        yield f"{about['date'][:10]}, commit {about['commit'][:12]}, {about['machine']}, torch {about['torch']}."
        yield f"{extent(folder, part.kind)}\n"
        yield "\n".join(part.table(folder)) + "\n"
    for picture in part.pictures if found else ():
        yield f"![{picture.replace('_', ' ')}](../benchmarks/results/{picture}.png)\n"
    if not found:
        yield f"Not measured yet: `python benchmarks/{part.script} --results benchmarks/results/{part.kind}`.\n"


def text(results: Path) -> str:
    """The whole report. Raises ValueError for results that cannot be read."""
    parts = [
        INTRODUCTION,
        "## What the README claims\n",
        "\n".join(table(("claim", "command", "figure"), list(claim_rows(results)))) + "\n",
        "## What is not shown\n",
        NOT_SHOWN + "\n",
        *(line for part in SECTIONS for line in section(part, results)),
    ]
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    try:
        written = text(RESULTS)
        for name, picture in draw(RESULTS):
            sys.stderr.write(f"{picture or f'{name}: nothing was measured for it'}\n")
    except ValueError as error:
        parser.error(str(error))
    TARGET.write_text(written, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
