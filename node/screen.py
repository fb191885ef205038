"""What `status --watch` shows: a picture made of the replies so far, for a terminal of any size.

`History` gathers, `Picture` draws; neither touches a terminal. Everything is plain text first and colour second, so it
reads as well without colours, without Unicode, and in a log.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from braniac.node.chart import bar, plot
from braniac.node.commands import bytes_text, duration_text
from braniac.node.control_pb2 import SlotRecord, StatusReply
from braniac.node.logs import printable
from braniac.node.replies import cap_texts, live_peers_text, reachability_text, reason_texts, update_text

SLOTS_KEPT = 4096
_RATE_REPLIES = 10  # over so many replies rates are taken
_CHART_ROWS_MIN, _CHART_ROWS_MAX = 3, 12
_NAME_COLUMNS = 10
_STYLES = {"training": "green", "degraded": "yellow", "paused": "cyan", "leaving": "magenta"}
_OUTCOMES = {"merged": "won", "missed": "missed", "no_certificate": "without certificate", "not_held": "not held"}


class History:
    """The replies of one node, as far as the picture needs them."""

    def __init__(self) -> None:
        self.last = StatusReply()
        self._slots: dict[int, SlotRecord] = {}
        self._traffic: deque[tuple[float, int, int]] = deque(maxlen=_RATE_REPLIES)

    def add(self, reply: StatusReply) -> None:
        """Take in the next reply; what came later about a slot holds."""
        if reply.uptime_s < self.last.uptime_s:
            self._traffic.clear()  # another daemon: its counters begin again
        self.last = reply
        self._traffic.append((reply.uptime_s, reply.bytes_sent, reply.bytes_received))
        self._slots.update((record.slot, record) for record in reply.slots)
        for slot in sorted(self._slots)[:-SLOTS_KEPT]:
            del self._slots[slot]

    @property
    def losses(self) -> list[float]:
        """Training loss at the end of each slot, oldest first, nats per byte."""
        return [record.loss for _, record in sorted(self._slots.items()) if record.HasField("loss")]

    @property
    def outcomes(self) -> dict[str, int]:
        """How the slots that are remembered ended."""
        outcomes = [record.outcome for record in self._slots.values()]
        return {outcome: outcomes.count(outcome) for outcome in _OUTCOMES}

    @property
    def bytes_per_s(self) -> tuple[float, float]:
        """Sent and received, lately."""
        (began_s, sent, received), (now_s, sent_now, received_now) = self._traffic[0], self._traffic[-1]
        seconds = max(now_s - began_s, 1e-9)
        return ((sent_now - sent) / seconds, (received_now - received) / seconds) if now_s > began_s else (0.0, 0.0)


class Picture:
    """A rich renderable of a history; it fits whatever size it is drawn at."""

    def __init__(self, history: History) -> None:
        self._history = history

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """See rich's console protocol."""
        width, height = options.max_width, options.height or console.height
        ascii_only = options.ascii_only
        above, below = list(_above(self._history)), list(_below(self._history, width, ascii_only))
        room = height - 1 - len(above) - len(below)
        rows = [*above, *_loss_rows(self._history.losses, width, room, ascii_only), *below]
        for row in [*rows[: height - 1], Text("q leaves; the node goes on", style="dim")]:
            if ascii_only and not row.plain.isascii():
                row.plain = row.plain.encode("ascii", "backslashreplace").decode()
            row.truncate(width, overflow="crop" if ascii_only else "ellipsis")
            row.no_wrap = True
            yield row


def _above(history: History) -> Iterator[Text]:
    reply = history.last
    state = Text(f"braniac-node: {reply.state}", style=f"bold {_STYLES.get(reply.state, '')}".strip())
    state.append(f", up {duration_text(reply.uptime_s)}", style="not bold default")
    yield state
    if reply.join_bytes_received < reply.join_bytes_needed:
        yield _row("joining", f"{bytes_text(reply.join_bytes_received)} of {bytes_text(reply.join_bytes_needed)}")
    for number, reason in enumerate(reason_texts(reply)):
        yield _row("" if number else "rests", reason, "cyan")
    if reply.state_reason:
        yield _row("trouble", reply.state_reason, "yellow")
    if update := update_text(reply):
        yield _row("update", update, "yellow")
    yield _row(
        "model",
        f"run {reply.run_id[:12]}, tier {reply.tier} of 0..{max(reply.tiers, 1) - 1}, {reply.parameters:,} parameters",
    )
    loss = f"loss {reply.train_loss:.3f} nats/byte" if reply.HasField("train_loss") else "no loss yet"
    yield _row("training", f"{loss}, {reply.tokens_per_s:,.0f} tokens/s, {reply.tokens:,} tokens")


def _below(history: History, width: int, ascii_only: bool) -> Iterator[Text]:
    reply, outcomes = history.last, history.outcomes
    sent_per_s, received_per_s = history.bytes_per_s
    bar_columns = max(0, min(40, width - 2 - _NAME_COLUMNS))
    won = outcomes["merged"]
    decided = won + outcomes["missed"] + outcomes["no_certificate"]
    yield _row("slots", ", ".join(f"{outcomes[key]:,} {name}" for key, name in _OUTCOMES.items()))
    if decided:
        yield _row("", f"{bar(won / decided, bar_columns - 9, ascii_only)} {won / decided:.0%} won", "green")
    yield _row("swarm", f"slot {reply.slot:,}, window {reply.window:,}, {live_peers_text(reply)}")
    yield _row("reachable", reachability_text(reply))
    yield _row("sent", _traffic_text(reply.bytes_sent, sent_per_s, reply.caps.upload_bytes_per_s))
    yield _row("received", _traffic_text(reply.bytes_received, received_per_s, reply.caps.download_bytes_per_s))
    if reply.caps.daily_bytes:
        used = reply.caps.daily_bytes_used / reply.caps.daily_bytes
        yield _row("", f"{bar(used, bar_columns - 14, ascii_only)} {used:.0%} of the day's")
    if caps := cap_texts(reply):
        yield _row("caps", ", ".join(caps))
    yield _row(
        "record",
        f"{reply.contributions_merged:,} contributions merged, {reply.tokens_merged:,} tokens, "
        f"{reply.contributions_unacknowledged:,} not acknowledged",
    )


def _traffic_text(total: int, per_s: float, bound_per_s: float) -> str:
    bound = f" of {bytes_text(bound_per_s)}/s" if bound_per_s else ""
    return f"{bytes_text(total)}, now {bytes_text(per_s)}/s{bound}"


def _loss_rows(losses: Sequence[float], width: int, room: int, ascii_only: bool) -> Iterator[Text]:
    """The loss curve with its highest and lowest value beside it; nothing if there is no room."""
    rows = min(room - 1, _CHART_ROWS_MAX)
    if len(losses) < 2 or rows < _CHART_ROWS_MIN:
        return
    yield Text(f"loss of the last {len(losses):,} slots, nats/byte", style="dim")
    labels = {0: f"{max(losses):.3f}", rows - 1: f"{min(losses):.3f}"}
    for number, line in enumerate(plot(losses, max(1, width - _NAME_COLUMNS), rows, ascii_only)):
        yield _row(labels.get(number, ""), line, "green")


def _row(name: str, value: str, style: str = "") -> Text:
    # Text, never markup, and printable: some of this are other peers' words.
    text = Text(f"{name:<{_NAME_COLUMNS}}")
    text.append(printable(value), style=style or None)
    return text


def one_line(history: History) -> str:
    """The same in one line of text, for what is no terminal."""
    reply, outcomes = history.last, history.outcomes
    why = "; ".join([*reason_texts(reply), *([reply.state_reason] if reply.state_reason else [])])
    parts = [
        reply.state + (f" ({why})" if why else ""),
        f"slot {reply.slot}",
        f"loss {reply.train_loss:.3f}" if reply.HasField("train_loss") else "no loss yet",
        f"{reply.tokens_per_s:.0f} tokens/s",
        f"{reply.peers_live} peers",
        f"{outcomes['merged']} won, {outcomes['missed']} missed, {outcomes['no_certificate']} without certificate",
        f"{bytes_text(reply.bytes_sent)} sent, {bytes_text(reply.bytes_received)} received",
    ]
    return printable(", ".join(parts))
