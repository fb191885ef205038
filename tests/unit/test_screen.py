"""The live screen: what it says at each size, with and without colours and Unicode, and the curves on it."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from braniac.node.chart import bar, plot
from braniac.node.control_pb2 import Caps, SlotRecord, StatusReply
from braniac.node.screen import SLOTS_KEPT, History, Picture, one_line


def reply(**changes: object) -> StatusReply:
    """A node that trains with three others."""
    fields: dict[str, object] = {
        "run_id": "ab12cd34ef56" + "0" * 52, "peer_id": "12D3KooWx", "state": "training", "uptime_s": 18_725,
        "peers_live": 3, "peers_by_tier": {0: 1, 2: 2}, "tier": 2, "tiers": 4, "parameters": 460_000,
        "tokens": 5_000_000, "tokens_per_s": 1234.4, "train_loss": 2.125, "slot": 412, "window": 51,
        "contributions_merged": 97, "contributions_unacknowledged": 4, "tokens_merged": 7_000_000,
        "bytes_sent": 1_000_000, "bytes_received": 4_000_000, "reachability": "private",
        "protocol_version": 1, "newest_protocol": 1,
    }  # fmt: skip
    return StatusReply(**(fields | changes))  # type: ignore[arg-type]


def slots(outcomes: str, first: int = 0) -> list[SlotRecord]:
    """One slot per letter, the loss falling from 4 on: m(erged), x (missed), n(o certificate), - (not held)."""
    names = {"m": "merged", "x": "missed", "n": "no_certificate", "-": "not_held"}
    return [
        SlotRecord(slot=first + number, outcome=names[letter], loss=4.0 - number / len(outcomes))
        for number, letter in enumerate(outcomes)
    ]


def drawn(history: History, width: int = 80, height: int = 24, *, ascii_only: bool = False) -> list[str]:
    """The lines on a terminal of this size without colours."""
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii" if ascii_only else "utf-8", write_through=True)
    console = Console(file=file, width=width, height=height, color_system=None, force_terminal=False)
    console.print(Picture(history))
    return raw.getvalue().decode().splitlines()


def history(*replies: StatusReply) -> History:
    gathered = History()
    for each in replies:
        gathered.add(each)
    return gathered


# --- what is on it ---------------------------------------------------------------------------------------------------


def test_a_terminal_of_80_by_24_shows_everything() -> None:
    caps = Caps(upload_bytes_per_s=500_000, daily_bytes=10_000_000, daily_bytes_used=2_500_000, threads=2)
    lines = drawn(history(
        reply(slots=slots("mmmxmmn-"), caps=caps),
        reply(slots=slots("mm", first=8), caps=caps, uptime_s=18_735, bytes_sent=3_000_000),
    ))  # fmt: skip
    assert len(lines) <= 24
    assert all(len(line) <= 80 for line in lines)
    shown = "\n".join(line.rstrip() for line in lines)
    for wanted in (
        "braniac-node: training, up 5h 12m",
        "run ab12cd34ef56, tier 2 of 0..3, 460,000 parameters",
        "loss 2.125 nats/byte, 1,234 tokens/s, 5,000,000 tokens",
        "loss of the last 10 slots",
        "7 won, 1 missed, 1 without certificate, 1 not held",
        "78% won",
        "3 peers live (1 of tier 0, 2 of tier 2)",
        "no: this node contributes",
        "3.0 MB, now 200.0 kB/s of 500.0 kB/s",
        "4.0 MB, now 0 B/s\n",
        "25% of the day's",
        "97 contributions merged, 7,000,000 tokens, 4 not acknowledged",
        "q leaves",
    ):
        assert wanted in shown
    assert re.search("[\u2801-\u28ff]", shown)  # a curve of dots
    assert "4.000" in shown  # between its highest and lowest value
    assert "\x1b" not in shown


def test_every_reason_to_rest_is_told_with_its_times() -> None:
    paused = reply(state="paused", state_reason="0 peers")
    paused.reasons.add(code="manual", sentence="paused by hand for a while", since_s=187, until_s=7200)
    paused.reasons.add(code="battery_low", sentence="the battery is at 12 %", since_s=60)
    paused.reasons.add(code="quota", since_s=1)
    shown = "\n".join(drawn(history(paused)))
    for wanted in (
        "braniac-node: paused",
        "rests     paused by hand for a while (for 3m 07s now, 2h 00m to go)",
        "          the battery is at 12 % (for 1m 00s now)",
        "          quota (for 1s now)",
        "trouble   0 peers",
    ):
        assert wanted in shown
    assert "rests" not in "\n".join(drawn(history(reply())))


def test_before_a_run_there_is_little_to_show() -> None:
    shown = "\n".join(drawn(history(StatusReply(state="starting"))))
    assert "braniac-node: starting" in shown
    assert "no loss yet" in shown
    assert "0 won" in shown
    joining = reply(state="joining", join_bytes_received=1_000_000, join_bytes_needed=2_000_000)
    assert "1.0 MB of 2.0 MB" in "\n".join(drawn(history(joining)))
    assert "joining" not in "\n".join(drawn(history(reply())))


def test_a_newer_protocol_is_told() -> None:
    assert "install a newer" in "\n".join(drawn(history(reply(newest_protocol=3))))
    assert "install" not in "\n".join(drawn(history(reply())))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (20, 5), (40, 12), (80, 24), (200, 60)])
@pytest.mark.parametrize("ascii_only", [False, True])
def test_it_fits_any_size(width: int, height: int, ascii_only: bool) -> None:
    paused = reply(state="paused", slots=slots("mxn-" * 50), caps=Caps(daily_bytes=1, daily_bytes_used=9))
    paused.reasons.add(sentence="for a reason that is told in more words than a narrow terminal has room for " * 3)
    lines = drawn(history(paused), width, height, ascii_only=ascii_only)
    assert 1 <= len(lines) <= height
    assert all(len(line) <= width for line in lines)
    assert ("".join(lines)).isascii() or not ascii_only
    if height >= 24:
        assert any("loss of the last 200 slots" in line for line in lines)


def test_colours_are_only_an_addition() -> None:
    file = io.StringIO()
    Console(file=file, width=80, height=24, color_system="standard", force_terminal=True, no_color=False).print(
        Picture(history(reply(slots=slots("mmx"))))
    )
    assert "\x1b[32m" in file.getvalue() or "\x1b[1;32m" in file.getvalue()
    plain = re.sub("\x1b\\[[0-9;]*m", "", file.getvalue())
    assert [line.rstrip() for line in plain.splitlines()] == [
        line.rstrip() for line in drawn(history(reply(slots=slots("mmx"))))
    ]


def test_a_peers_words_cannot_draw() -> None:
    shown = "\n".join(drawn(history(reply(state_reason="[bold]x[/bold] \x1b[2J\r\nfake \u202e"))))
    assert "[bold]x[/bold] \\x1b[2J\\r\\nfake \\u202e" in shown


def test_what_a_terminal_without_unicode_cannot_show_is_spelled_out() -> None:
    shown = "\n".join(drawn(history(reply(state_reason="naïve")), ascii_only=True))
    assert "trouble   na\\xefve" in shown


def test_what_is_no_terminal_gets_one_line() -> None:
    paused = reply(state="paused", slots=slots("mmxn"), state_reason="disk\nfull")
    paused.reasons.add(sentence="paused by hand", since_s=5)
    assert one_line(history(paused)) == (
        "paused (paused by hand (for 5s now); disk\\nfull), slot 412, loss 2.125, 1234 tokens/s, 3 peers, "
        "2 won, 1 missed, 1 without certificate, 1.0 MB sent, 4.0 MB received"
    )
    assert one_line(history(StatusReply(state="starting"))).startswith("starting, slot 0, no loss yet, ")


# --- history ---------------------------------------------------------------------------------------------------------


def test_the_latest_word_on_a_slot_holds_and_the_oldest_slots_go() -> None:
    gathered = history(reply(slots=slots("nnn")))
    assert gathered.outcomes == {"merged": 0, "missed": 0, "no_certificate": 3, "not_held": 0}
    gathered.add(reply(slots=slots("m", first=1)))  # its certificate came late
    assert gathered.outcomes == {"merged": 1, "missed": 0, "no_certificate": 2, "not_held": 0}
    gathered.add(reply(slots=slots("m" * SLOTS_KEPT, first=10)))
    assert gathered.outcomes == {"merged": SLOTS_KEPT, "missed": 0, "no_certificate": 0, "not_held": 0}
    assert len(gathered.losses) == SLOTS_KEPT
    assert gathered.losses == sorted(gathered.losses, reverse=True)


def test_rates_are_of_late_and_begin_again_with_another_daemon() -> None:
    gathered = history(reply(uptime_s=100, bytes_sent=0, bytes_received=0))
    assert gathered.bytes_per_s == (0, 0)
    for second in range(1, 30):
        gathered.add(reply(uptime_s=100 + second, bytes_sent=1000 * max(0, second - 15), bytes_received=50 * second))
    assert gathered.bytes_per_s == pytest.approx((1000, 50))
    gathered.add(reply(uptime_s=3, bytes_sent=10, bytes_received=10))
    assert gathered.bytes_per_s == (0, 0)


# --- curves and bars -------------------------------------------------------------------------------------------------


def test_a_curve_goes_from_top_to_bottom() -> None:
    assert plot([4.0, 3.0, 2.0, 1.0], 4, 4, ascii_only=True) == ["*", " *", "  *", "   *"]
    assert plot([1.0, 3.0, 2.0], 4, 3, ascii_only=True) == [" *", "  *", "*"]
    # Two dots across and four up per character.
    assert plot([8, 7, 6, 5, 4, 3, 2, 1], 4, 2) == ["⠑⢄", "  ⠑⢄"]


def test_a_curve_of_too_many_or_odd_values() -> None:
    assert plot([1.0, 3.0, 5.0, 7.0, 0.0, 0.0], 3, 3, ascii_only=True) == [" *", "*", "  *"]  # means 2, 6 and 0
    assert plot([2.0, 2.0], 4, 3, ascii_only=True) == ["", "**", ""]
    assert plot([float("nan"), 1.0, float("inf"), 0.0], 9, 2, ascii_only=True) == ["**", "  *"]
    assert plot([], 4, 2) == ["", ""]
    assert [len(line) for line in plot(list(range(1000)), 7, 1)] == [7]


def test_bars() -> None:
    assert bar(0.25, 8) == "██░░░░░░"
    assert bar(0.5, 4, ascii_only=True) == "##.."
    assert (bar(7.0, 3), bar(-1.0, 3), bar(0.5, 0), bar(0.5, -4)) == ("███", "░░░", "", "")
