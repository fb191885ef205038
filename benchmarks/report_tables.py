"""Tables of the report: one per kind of result, in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from outer.tables import Folder, Row, grouped, mean, mean_and_spread


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """In Markdown."""
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def size(value: float) -> str:
    """Bytes for people."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.0f} B"


def loss_bytes_table(folder: Folder) -> Iterator[str]:
    rows = []
    for (method,), of_method in grouped(folder.rows("loss_bytes"), "method").items():
        sent, received = mean(of_method, "bytes_per_peer"), mean(of_method, "downlink_bytes_per_peer")
        rates = f"{float(of_method[0]['rate']):g}, {float(of_method[0]['outer_rate']):g}"
        rows.append((method, mean_and_spread(of_method, "loss"), size(sent), size(received), rates))
    yield from table(("method", "loss", "sent by a peer", "received", "factors on rates, inner and outer"), rows)


def drops_table(folder: Folder) -> Iterator[str]:
    rows = folder.rows("drops")
    percents = sorted({row["missing_percent"] for row in rows}, key=int)
    lines = []
    for (method,), of_method in grouped(rows, "method").items():
        by_percent = grouped(of_method, "missing_percent")
        lines.append((method, *(mean_and_spread(by_percent.get((p,), []), "loss") for p in percents)))
    yield from table(("method", *(f"{percent}% drop out" for percent in percents)), lines)


def burst_table(folder: Folder) -> Iterator[str]:
    lines = [
        (method, f"{peak_to_mean(rows):.2f}", size(max(int(row["busiest_bytes"]) for row in rows)))
        for (method,), rows in grouped(folder.rows("burst"), "method").items()
    ]
    yield from table(("method", "busiest second over the mean of all", "most that a peer sent in a second"), lines)


def peak_to_mean(rows: Sequence[Row]) -> float:
    """Of the busiest peer's busiest second over the mean of all peers and seconds."""
    return max(int(row["busiest_bytes"]) for row in rows) / mean(rows, "mean_bytes")


def delay_table(folder: Folder) -> Iterator[str]:
    lines = [
        (case, mean_and_spread(rows, "loss"), f"{mean_and_spread(rows, 'over_percent')}%")
        for (case,), rows in grouped(folder.rows("delay"), "case").items()
    ]
    yield from table(("case", "loss", "over the first"), lines)


def round_table(folder: Folder) -> Iterator[str]:
    kills = grouped(folder.rows("round_kills"), "system")
    lines = []
    for row in folder.rows("round"):
        of_system = kills.get((row["system"],), [])
        lost = [f"{float(kill['lost_s']):.1f} s" if kill["lost_s"] else f"{kill['hung']} hung" for kill in of_system]
        agree = [f"{float(kill['agree_percent']):.0f}%" if kill["agree_percent"] else "-" for kill in of_system]
        lines.append(
            (
                row["system"],
                f"{float(row['seconds']):.1f} s",
                size(float(row["bytes_per_peer"])),
                f"{float(row['bytes_per_peer']) / int(row['parameters']):.3g}",
                f"{float(row['cpu_s_per_peer']):.2f} s",
                ", ".join(lost),
                ", ".join(agree),
            )
        )
    header = (
        "system",
        "round",
        "sent by a peer",
        "bytes per parameter",
        "processor",
        "lost by a kill",
        "agree after it",
    )
    yield from table(header, lines)


def tiers_table(folder: Folder) -> Iterator[str]:
    lines = [
        (swarm, tier, mean_and_spread(rows, "loss"))
        for (swarm, tier), rows in grouped(folder.rows("tiers"), "swarm", "tier").items()
    ]
    yield from table(("swarm", "tier", "loss"), lines)
