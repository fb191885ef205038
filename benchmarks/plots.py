"""Pictures of the results in benchmarks/results/: one PNG each, beside the folders with the CSV files.

    python benchmarks/plots.py [--results benchmarks/results]

What a picture needs and nobody has measured yet is left out, and said. Phone links are 10 Mbit/s up and 50 down, and
the busiest peer's counts. So that the ratio of training to sending is that of a large model, bytes are scaled to a
billion parameters, of which a step is ASSUMED to take 100 s (benchmarks/memory.py: 407 processor seconds for 1,024
tokens, on four cores). Methods that train while they send take the longer of the two times, all others the sum.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from outer.tables import Folder, Row, folders, grouped, mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
LARGE = 1_000_000_000
"""Parameters of the model that times are given for."""
LARGE_STEP_S = 100.0
OVERLAPPING = ("braniac", "streaming_diloco")
"""Methods that train while they send, by the beginnings of their names."""


class NothingToDraw(Exception):
    """There are no results of a kind."""


def hours(method: str, step: int, link_s: float, parameters: int) -> float:
    """Until a step is done and what was due by then is sent, for a large model on phones."""
    training_s, sending_s = step * LARGE_STEP_S, link_s * LARGE / parameters
    overlaps = method.startswith(OVERLAPPING)
    return (max(training_s, sending_s) if overlaps else training_s + sending_s) / 3600


def course(folder: Folder) -> Iterator[tuple[str, list[list[Row]]]]:
    """Per method: name, and its points in the order of steps, each with a row per seed."""
    for (method,), rows in grouped(folder.rows("loss_bytes_course"), "method").items():
        points = grouped(sorted(rows, key=lambda row: int(row["step"])), "step")
        yield method, list(points.values())


def draw_course(
    figure: Figure, results: Path, label: str, place: Callable[[Folder, str, Row], float], scale: str = "log"
) -> None:
    """Loss of all methods against something that grows in a run, a picture for each comparison."""
    found = measured(results, "loss_bytes_course")
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height * len(found))
    for number, folder in enumerate(found):
        axes, reached = figure.add_subplot(len(found), 1, number + 1), []
        for method, points in course(folder):
            x = [place(folder, method, rows[0]) for rows in points]
            y = [mean(rows, "loss") for rows in points]
            ours = method.startswith("braniac")
            axes.plot(x, y, marker="o" if ours else ".", linewidth=2.2 if ours else 1, label=method)
            reached += [loss for loss in y[-1:] if math.isfinite(loss)]
        if reached:  # where all begin alike is of no interest, nor who never comes near
            axes.set_ylim(0.98 * min(reached), min(1.05 * max(reached), 2 * min(reached)) + 0.2)
        axes.set_title(folder.path.name, fontsize="medium")
        axes.set_xscale(scale)
        axes.set_xlabel(label)
        axes.set_ylabel("held-out loss, nats per byte")
        explain(axes)


def measured(results: Path, kind: str) -> list[Folder]:
    """Folders with results of a kind. Raises NothingToDraw."""
    if found := folders(results, kind):
        return found
    raise NothingToDraw


def explain(axes: Axes) -> None:
    """Give every line a colour and a place in the legend, which stands beside the picture."""
    for number, line in enumerate(axes.lines):
        line.set_color(f"C{number % 10}")
        line.set_linestyle("-" if number < 10 else "--")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


def loss_against_bytes(figure: Figure, results: Path) -> None:
    draw_course(figure, results, "uplink per peer, bytes", lambda folder, method, row: float(row["bytes_per_peer"]))


def loss_against_tokens(figure: Figure, results: Path) -> None:
    def tokens(folder: Folder, method: str, row: Row) -> float:
        return int(row["step"]) * folder.tokens_per_step

    draw_course(figure, results, "tokens per peer", tokens, "linear")


def loss_against_hours(figure: Figure, results: Path) -> None:
    def time(folder: Folder, method: str, row: Row) -> float:
        return hours(method, int(row["step"]), float(row["link_s"]), folder.parameters)

    label = f"hours for a billion parameters on phone links, {LARGE_STEP_S:.0f} s per step assumed"
    draw_course(figure, results, label, time)


def loss_under_drops(figure: Figure, results: Path) -> None:
    axes = figure.add_subplot()
    for folder in measured(results, "drops"):
        for (method,), rows in grouped(folder.rows("drops"), "method").items():
            by_percent = grouped(rows, "missing_percent")
            losses = {int(percent): mean(each, "loss") for (percent,), each in by_percent.items()}
            finite = {percent: loss for percent, loss in sorted(losses.items()) if math.isfinite(loss)}
            axes.plot(list(finite), list(finite.values()), marker="o", label=method)
    axes.set_xlabel("peers that drop out of an exchange, percent")
    axes.set_ylabel("held-out loss, nats per byte")
    explain(axes)


def uplink_over_time(figure: Figure, results: Path) -> None:
    """A small picture per method, each with a scale of its own: what matters is its peaks over its mean."""
    methods = {
        method: rows
        for folder in measured(results, "burst")
        for (method,), rows in grouped(folder.rows("burst"), "method").items()
    }
    columns = 4
    for number, (method, rows) in enumerate(methods.items()):
        axes = figure.add_subplot(-(-len(methods) // columns), columns, number + 1)
        axes.bar([int(row["second"]) for row in rows], [int(row["busiest_bytes"]) for row in rows], width=1)
        axes.axhline(mean(rows, "mean_bytes"), color="black", linestyle=":")
        axes.set_title(method, fontsize="small")
        axes.tick_params(labelsize="x-small")
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        axes.yaxis.get_offset_text().set_fontsize("x-small")
    figure.supxlabel("second, at one step per second")
    figure.supylabel("bytes sent by the busiest peer; dotted: mean of all")


def tiers(figure: Figure, results: Path) -> None:
    axes = figure.add_subplot()
    names: list[str] = []
    for folder in measured(results, "tiers"):
        rows = [row for row in folder.rows("tiers") if row["tier"] == "0"]
        for (swarm,), of_swarm in grouped(rows, "swarm").items():
            axes.plot([len(names)] * len(of_swarm), [float(row["loss"]) for row in of_swarm], ".", color="grey")
            axes.plot([len(names)], [mean(of_swarm, "loss")], "o", color="C0")
            names.append(swarm)
    axes.set_xticks(range(len(names)), names, rotation=20)
    axes.grid(alpha=0.3)
    axes.set_ylabel("held-out loss at full width, nats per byte; small: seeds")


PICTURES: dict[str, Callable[[Figure, Path], None]] = {
    "loss_against_bytes": loss_against_bytes,
    "loss_against_tokens": loss_against_tokens,
    "loss_against_hours": loss_against_hours,
    "loss_under_drops": loss_under_drops,
    "uplink_over_time": uplink_over_time,
    "tiers": tiers,
}


def draw(results: Path) -> Iterator[tuple[str, Path | None]]:
    """Draw every picture: its name and its file, or None if there are no results for it.

    Raises SystemExit without matplotlib, ValueError for results that cannot be read.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("drawing needs matplotlib: pip install 'braniac-node[plots]'") from None
    for name, fill in PICTURES.items():
        figure = Figure(figsize=(9, 5), layout="constrained")
        target = results / f"{name}.png"
        try:
            fill(figure, results)
        except NothingToDraw:
            target.unlink(missing_ok=True)  # of results that are gone
            yield name, None
            continue
        figure.savefig(target, format="png", dpi=100, metadata={"Software": None})
        yield name, target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not options.results.is_dir():
        parser.error(f"{options.results} is no folder: run a benchmark with --results {options.results}/NAME first")
    try:
        for name, target in draw(options.results):
            print(target if target is not None else f"{name}: nothing was measured for it")
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
