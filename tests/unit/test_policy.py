"""When a node rests: every gate's two thresholds and dwell time, all reasons told, and a week of a phone's sensors."""

from __future__ import annotations

from datetime import datetime, timedelta
from itertools import islice
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from braniac.node import schedule
from braniac.node.config import CapsSection, NodeConfig, PolicySection
from braniac.node.errors import ConfigError
from braniac.node.policy import CODES, Policy
from braniac.node.sensors import Sample
from braniac.node.settings_merge import load_config
from tests.unit import device_week

MIB = 1 << 20
MONDAY = datetime(2026, 11, 16)
EVERYTHING = {
    "policy": {
        "on_battery": False,
        "only_idle": True,
        "others_cpu_max_percent": 50,
        "metered": False,
        "schedule": ["mon 08:00-12:00"],
        "dwell_s": 60,
    },
    "caps": {"disk_mib": 100, "memory_mib": 100, "daily_mib": 100},
}


def policy_of(**changes: Any) -> Policy:
    """Every gate there is."""
    sections = NodeConfig.model_validate({"policy": EVERYTHING["policy"] | changes, "caps": EVERYTHING["caps"]})
    return Policy(sections.policy, sections.caps)


# (code, rests, stays as it is, goes on, words of the sentence)
GATES = [
    ("on_battery", {"plugged": False}, None, {"plugged": True}, ["battery", "charger"]),
    (
        "battery_low",
        {"plugged": False, "battery_percent": 29.9},
        {"plugged": False, "battery_percent": 34.0},
        {"plugged": False, "battery_percent": 35.0},
        ["30%", "35%"],
    ),
    (
        "battery_low",
        {"plugged": False, "battery_percent": 3.0},
        {"plugged": False, "battery_percent": 31.0},
        {"plugged": True, "battery_percent": 3.0},
        ["at 3%", "30%"],
    ),
    (
        "battery_hot",
        {"battery_celsius": 42.5},
        {"battery_celsius": 40.0},
        {"battery_celsius": 39.0},
        ["42.5", "42 °C", "39 °C"],
    ),
    ("cpu_hot", {"cpu_celsius": 95.0}, {"cpu_celsius": 89.0}, {"cpu_celsius": 86.0}, ["95.0", "90 °C", "87 °C"]),
    ("user_active", {"idle_s": 12.0}, None, {"idle_s": 180.0}, ["12 s", "180 s"]),
    (
        "others_cpu",
        {"others_cpu_percent": 51.0},
        {"others_cpu_percent": 45.0},
        {"others_cpu_percent": 40.0},
        ["51%", "50%", "40%"],
    ),
    ("metered", {"metered": True}, None, {"metered": False}, ["metered"]),
    (
        "schedule",
        {"local_time": MONDAY.replace(hour=12)},
        None,
        {"local_time": MONDAY.replace(hour=8)},
        ["Mon 12:00", "mon 08:00-12:00", "Mon 08:00"],
    ),
    (
        "disk_free",
        {"disk_free_bytes": 255 * MIB},
        {"disk_free_bytes": 270 * MIB},
        {"disk_free_bytes": 282 * MIB},
        ["255 MiB", "256 MiB"],
    ),
    (
        "disk",
        {"disk_used_bytes": 101 * MIB},
        {"disk_used_bytes": 97 * MIB},
        {"disk_used_bytes": 95 * MIB},
        ["101 MiB", "100 MiB", "caps.disk_mib"],
    ),
    (
        "memory",
        {"memory_bytes": 101 * MIB},
        {"memory_bytes": 97 * MIB},
        {"memory_bytes": 95 * MIB},
        ["101 MiB", "100 MiB", "caps.memory_mib"],
    ),
    ("quota", {"daily_bytes": 100 * MIB}, None, {"daily_bytes": 0}, ["100.0 MiB", "100 MiB", "midnight"]),
]


def test_every_gate_is_tested() -> None:
    assert {gate[0] for gate in GATES} == set(CODES)


@pytest.mark.parametrize(("code", "rest", "between", "go_on", "words"), GATES)
def test_a_gate_has_two_thresholds_and_says_why(
    code: str, rest: dict[str, Any], between: dict[str, Any] | None, go_on: dict[str, Any], words: list[str]
) -> None:
    policy = policy_of(on_battery=code != "on_battery")

    def codes(fields: dict[str, Any], now: float) -> list[str]:
        return [reason.code for reason in policy.decide(Sample(**fields), now)]

    assert codes(go_on, 0.0) == []
    if between:
        assert codes(between, 100.0) == []
    [reason] = policy.decide(Sample(**rest), 200.0)
    assert (reason.code, reason.since_s) == (code, 200.0)
    assert [word for word in words if word not in reason.sentence] == []
    if between:
        assert codes(between, 300.0) == [code]
    assert codes(go_on, 400.0) == []


def test_a_gate_keeps_what_it_says_for_the_dwell_time() -> None:
    policy = policy_of()
    hot, cool = Sample(cpu_celsius=95.0), Sample(cpu_celsius=50.0)
    assert len(policy.decide(hot, 0.0)) == 1
    assert len(policy.decide(cool, 59.9)) == 1
    assert policy.decide(cool, 60.0) == ()
    assert policy.decide(hot, 119.9) == ()
    assert len(policy.decide(hot, 120.0)) == 1


def test_a_missing_sensor_is_not_zero_and_never_rests_the_node() -> None:
    policy = policy_of()
    assert policy.decide(Sample(), 0.0) == ()
    assert policy.decide(Sample(battery_percent=0.0), 100.0) == ()  # whether it is plugged in is unknown
    before = policy.decide(Sample(cpu_celsius=95.0, metered=True), 200.0)
    assert [reason.code for reason in before] == ["cpu_hot", "metered"]
    assert policy.decide(Sample(), 230.0) == before  # what it said last, as long as any change would take
    assert policy.decide(Sample(), 260.0) == ()


def test_all_reasons_are_told() -> None:
    worst = Sample(**{key: value for _, rest, *_ in GATES for key, value in rest.items()})
    policy = policy_of()
    reasons = policy.decide(worst, 5.0)
    assert [reason.code for reason in reasons] == list(CODES)
    assert all(reason.since_s == 5.0 and "None" not in reason.sentence for reason in reasons)


def test_what_is_not_bounded_has_no_gate() -> None:
    worst = Sample(**{key: value for _, rest, *_ in GATES for key, value in rest.items()})
    codes = [reason.code for reason in Policy(PolicySection(), CapsSection()).decide(worst, 0.0)]
    assert codes == ["battery_low", "battery_hot", "cpu_hot", "disk_free"]


def test_it_is_told_when_the_hours_begin_and_when_the_quota_is_new() -> None:
    late = MONDAY.replace(hour=23, minute=30)
    [hours, quota] = policy_of().decide(Sample(local_time=late, daily_bytes=200 * MIB), 1000.0)
    assert (hours.code, quota.code) == ("schedule", "quota")
    assert quota.until_s == 1000.0 + 1800
    assert hours.until_s == 1000.0 + (7 * 24 - 23.5 + 8) * 3600


# Hours


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("mon-fri 20:00-06:00", ["16 20:00", "17 05:59", "21 05:59"], ["16 19:59", "17 06:00", "22 03:00", "16 03:00"]),
        ("sat,sun 00:00-24:00", ["21 00:00", "22 23:59"], ["20 23:59", "23 00:00"]),
        ("sun 22:00-02:00", ["22 22:00", "16 01:59", "23 01:00"], ["22 21:00", "23 02:00"]),
        ("fri-mon 1:00-2:00", ["20 01:30", "21 01:30", "22 01:30", "23 01:30"], ["24 01:30"]),
        ("MON, wed 08:00 - 09:00", ["16 08:30", "18 08:30"], ["17 08:30"]),
        ("22:00-06:00", ["16 23:00", "17 01:00", "22 05:00"], ["16 12:00"]),
    ],
)
def test_hours(text: str, inside: list[str], outside: list[str]) -> None:
    window = schedule.parse_window(text)
    times = {when: datetime.strptime(f"2026-11-{when}", "%Y-%m-%d %H:%M") for when in inside + outside}
    assert [when for when, time in times.items() if schedule.is_open([window], time)] == inside


@pytest.mark.parametrize(
    "text",
    [
        "",
        "mon",
        "20:00",
        "mon 20:00",
        "fun 20:00-21:00",
        "mon 25:00-26:00",
        "mon 20:60-21:00",
        "mon 08:00-08:00",
        "mon 24:00-02:00",
        "mon- 20:00-21:00",
        "-fri 20:00-21:00",
        "mon 20.00-21.00",
        "mon 20:00-21:00 tue",
        ", 1:00-2:00",
    ],
)
def test_hours_that_cannot_be_read_are_refused_at_the_start(text: str) -> None:
    with pytest.raises(
        ConfigError, match=r"^policy\.schedule\.0 = .* cannot be used: expected hours such as"
    ) as caught:
        load_config(NodeConfig, None, {}, [], {"policy.schedule": [text]})
    assert "\n" not in str(caught.value)


def test_hours_may_be_given_on_the_command_line() -> None:
    config = load_config(NodeConfig, None, {}, ["policy.schedule=mon-fri 20:00-06:00,sat,sun 00:00-24:00"], {})
    assert config.policy.schedule == ("mon-fri 20:00-06:00", "sat,sun 00:00-24:00")


@settings(derandomize=True, max_examples=200, deadline=None)
@given(
    days=st.sets(st.integers(0, 6), min_size=1),
    begin=st.integers(0, 1439),
    end=st.integers(1, 1440),
    minute=st.integers(0, 7 * 1440 - 1),
)
def test_hours_hold_as_if_every_minute_were_marked(days: set[int], begin: int, end: int, minute: int) -> None:
    if begin == end:
        return
    text = ",".join(schedule.DAYS[day] for day in sorted(days))
    window = schedule.parse_window(f"{text} {begin // 60}:{begin % 60:02}-{end // 60}:{end % 60:02}")
    last = end if end > begin else end + 1440
    marked = {(day * 1440 + at) % 10080 for day in days for at in range(begin, last)}
    time = MONDAY + timedelta(minutes=minute)
    assert schedule.is_open([window], time) == (minute in marked)
    begins = {day * 1440 + begin for day in days}
    wait = next(ahead for ahead in range(10080) if (minute + ahead) % 10080 in begins)
    assert schedule.seconds_until_open([window], time) == 60 * wait


# Many samples

SAMPLES = st.builds(
    Sample,
    local_time=st.none() | st.datetimes(datetime(2026, 11, 1), datetime(2026, 11, 30)),
    plugged=st.none() | st.booleans(),
    battery_percent=st.none() | st.floats(0, 100),
    battery_celsius=st.none() | st.floats(-20, 80),
    cpu_celsius=st.none() | st.floats(0, 120),
    others_cpu_percent=st.none() | st.floats(0, 100),
    idle_s=st.none() | st.floats(0, 400),
    metered=st.none() | st.booleans(),
    disk_free_bytes=st.none() | st.integers(0, 600 * MIB),
    disk_used_bytes=st.none() | st.integers(0, 200 * MIB),
    memory_bytes=st.none() | st.integers(0, 200 * MIB),
    daily_bytes=st.none() | st.integers(0, 200 * MIB),
)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(steps=st.lists(st.tuples(st.floats(0.1, 200), SAMPLES), max_size=20))
def test_no_gate_toggles_twice_within_the_dwell_time(steps: list[tuple[float, Sample]]) -> None:
    policy, now, toggled, shut = policy_of(on_battery=False), 0.0, dict.fromkeys(CODES, -1e9), set[str]()
    for gap, sample in steps:
        now += gap
        reasons = policy.decide(sample, now)
        for code in {reason.code for reason in reasons} ^ shut:
            assert now - toggled[code] >= 60
            toggled[code] = now
        shut = {reason.code for reason in reasons}
        assert all(reason.since_s == toggled[reason.code] for reason in reasons)
        assert all(reason.until_s is None or reason.until_s >= now for reason in reasons)


def test_a_recorded_week() -> None:
    caps, rules = device_week.CAPS, replace_rules(on_battery=False)
    policy, shut, toggled = Policy(rules, caps), set[str](), dict.fromkeys(CODES, -1e9)
    toggles, rested = dict.fromkeys(CODES, 0), 0
    wants_rest, wants_on = Lasting(rules, caps, rest=True), Lasting(rules, caps, rest=False)
    for now, sample in device_week.week():
        found = {reason.code for reason in policy.decide(sample, now)}
        for code in found ^ shut:
            assert now - toggled[code] >= rules.dwell_s, code
            toggled[code] = now
            toggles[code] += 1
        shut = found
        rested += bool(found)
        # What held for a whole dwell time has been obeyed, in both directions.
        assert wants_rest.since(sample, now) <= found
        assert not wants_on.since(sample, now) & found
    assert all(count >= 4 for count in toggles.values()), toggles  # every gate was put to the test
    assert 0.5 < rested / device_week.SAMPLES < 1


def replace_rules(**changes: Any) -> PolicySection:
    return device_week.POLICY.model_copy(update=changes)


class Lasting:
    """Which gates' conditions, written down here once more, have held at every sample for the dwell time."""

    def __init__(self, rules: PolicySection, caps: CapsSection, *, rest: bool) -> None:
        self._rules = rules
        self._caps = caps
        self._rest = rest
        self._began: dict[str, float] = {}

    def since(self, sample: Sample, now: float) -> set[str]:
        holding = self._resting(sample) if self._rest else self._going_on(sample)
        self._began = {code: self._began.get(code, now) for code in holding}
        return {code for code, began in self._began.items() if now - began >= self._rules.dwell_s}

    def _resting(self, s: Sample) -> set[str]:
        r, c = self._rules, self._caps
        inf = float("inf")
        local = s.local_time
        holds = {
            "on_battery": s.plugged is False,
            "battery_low": s.plugged is False and (100 if s.battery_percent is None else s.battery_percent) < 40,
            "battery_hot": (s.battery_celsius or 0) > 38,
            "cpu_hot": (s.cpu_celsius or 0) > 75,
            "user_active": (inf if s.idle_s is None else s.idle_s) < r.idle_s,
            "others_cpu": (s.others_cpu_percent or 0) > 50,
            "metered": s.metered is True,
            "schedule": local is not None and local.weekday() < 5 and 9 <= local.hour < 18,
            "disk_free": (inf if s.disk_free_bytes is None else s.disk_free_bytes) < c.disk_free_min_mib * MIB,
            "disk": (s.disk_used_bytes or 0) > c.disk_mib * MIB,
            "memory": (s.memory_bytes or 0) > c.memory_mib * MIB,
            "quota": (s.daily_bytes or 0) >= c.daily_mib * MIB,
        }
        # Monday before 9 belongs to Sunday, which has no evening of its own.
        if local is not None and local.weekday() == 0 and local.hour < 9:
            holds["schedule"] = True
        if local is not None and local.weekday() == 5 and local.hour < 9:
            holds["schedule"] = False
        return {code for code, value in holds.items() if value}

    def _going_on(self, s: Sample) -> set[str]:
        easier = Sample(
            local_time=s.local_time,
            plugged=s.plugged,
            battery_percent=None if s.battery_percent is None else s.battery_percent - 5,
            battery_celsius=None if s.battery_celsius is None else s.battery_celsius + 3,
            cpu_celsius=None if s.cpu_celsius is None else s.cpu_celsius + 3,
            others_cpu_percent=None if s.others_cpu_percent is None else s.others_cpu_percent / 0.8,
            idle_s=s.idle_s,
            metered=s.metered,
            disk_free_bytes=None if s.disk_free_bytes is None else int(s.disk_free_bytes / 1.1) - 1,
            disk_used_bytes=None if s.disk_used_bytes is None else int(s.disk_used_bytes / 0.95) + 1,
            memory_bytes=None if s.memory_bytes is None else int(s.memory_bytes / 0.95) + 1,
            daily_bytes=s.daily_bytes,
        )
        return set(CODES) - self._resting(easier)


def test_the_week_is_the_same_every_time() -> None:
    first, again = (list(islice(device_week.week(), 500)) for _ in range(2))
    assert first == again
    assert first != list(islice(device_week.week(seed=7), 500))
