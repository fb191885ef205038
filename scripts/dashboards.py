"""Writes the Grafana dashboards: `python scripts/dashboards.py`. Each panel is a line here and forty in the JSON.

Colours, legends and sizes are the same everywhere, so only what differs is said: title, unit, expressions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "deploy" / "grafana" / "dashboards"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
ONE = '{instance=~"$instance"}'
RATE = "[$__rate_interval]"
WIDTH, HEIGHT, STAT_HEIGHT = 8, 8, 4


@dataclass(frozen=True)
class Panel:
    """One panel: Grafana's unit, and (expression, legend) per series."""

    title: str
    unit: str
    queries: Sequence[tuple[str, str]]
    help: str = ""
    stat: bool = False


def stat(title: str, unit: str, expr: str, legend: str = "", help: str = "") -> Panel:
    """A single number, or one per legend."""
    return Panel(title, unit, [(expr, legend)], help, stat=True)


def rate(series: str, labels: str = ONE, by: str = "") -> str:
    """Per second, summed by labels."""
    return f"sum by ({by}) (rate({series}{labels}{RATE}))" if by else f"rate({series}{labels}{RATE})"


LIVE = '{state=~"ready|joining"}'
CERTIFIED = '{outcome="certified"}'

SWARM = [
    stat("Peers live", "short", f"sum(braniac_swarm_peers{LIVE})"),
    stat("Slot", "none", "max(braniac_swarm_slot)"),
    stat("Slots certified", "percentunit", "max(job:braniac_swarm_slots_certified:ratio_rate5m)"),
    stat("Last certificate", "s", "max(braniac_swarm_certificate_age_seconds)", help="Age; a slot is normal."),
    stat("Tokens per second", "short", "sum(braniac_swarm_tokens_per_second)", help="As peers say."),
    stat("Fragments in disagreement", "none", "max(braniac_swarm_split_fragments)"),
    Panel("Peers by state", "short", [("sum by (state) (braniac_swarm_peers)", "{{state}}")]),
    Panel("Live peers by tier", "short", [(f"sum by (tier) (braniac_swarm_peers{LIVE})", "tier {{tier}}")]),
    Panel("Live peers by version", "short", [("sum by (version) (braniac_swarm_peer_versions)", "{{version}}")]),
    Panel("Slots by outcome", "cps", [(rate("braniac_swarm_slots_total", "", "outcome"), "{{outcome}}")]),
    Panel(
        "Contributions per certificate",
        "short",
        [
            (
                f"{rate('braniac_swarm_contributions_total', '', 'tier')} "
                f"/ scalar(sum(rate(braniac_swarm_slots_total{CERTIFIED}{RATE})))",
                "tier {{tier}}",
            )
        ],
    ),
    Panel(
        "Slots behind",
        "none",
        [("max(braniac_swarm_lag_slots_max)", "slowest"), ("max(braniac_swarm_lag_slots_mean)", "mean")],
        "How many slots ago the last heartbeat speaks of, over live peers.",
    ),
    Panel(
        "Disagreement",
        "s",
        [("max(braniac_swarm_split_seconds)", "oldest split"), ("max(braniac_swarm_window_seconds)", "a window")],
        "Different bytes of a fragment after the same last slot. Longer than a window is a fault.",
    ),
    Panel(
        "Churn",
        "short",
        [("sum by (event) (increase(braniac_swarm_churn_total[5m]))", "{{event}}")],
        "In five minutes: joined, left with a goodbye, fell silent.",
    ),
    Panel(
        "Out of reach",
        "short",
        [
            ("sum(braniac_swarm_unreachable_peers)", "behind a router"),
            ('sum(braniac_swarm_peers{state="silent"})', "silent"),
            ("sum(braniac_swarm_bans_total)", "banned"),
        ],
    ),
]

TRAINING = [
    stat("Tokens per second", "short", "sum(job:braniac_tokens:rate5m)", help="Of the nodes scraped here."),
    stat("Tokens merged", "short", "sum(braniac_swarm_tokens_total)", help="Declared, since the observer began."),
    stat("Steps given up", "short", "sum(braniac_training_diverged_steps_total)", help="Their loss was not finite."),
    Panel(
        "Loss in the swarm, by tier",
        "none",
        [("avg by (tier) (braniac_swarm_loss_nats_per_byte)", "tier {{tier}}")],
        "Nats per byte in training, median of what live peers say.",
    ),
    Panel(
        "Loss of nodes",
        "none",
        [('braniac_loss_nats_per_byte{split="train", instance=~"$instance"}', "{{instance}}")],
        "Nats per byte in training, a running mean.",
    ),
    Panel("Tokens per second of nodes", "short", [(f"braniac_tokens_per_second{ONE}", "{{instance}}")]),
    Panel("Steps per second", "cps", [(rate("braniac_training_steps_total"), "{{instance}}")]),
    Panel(
        "Contributions, by outcome",
        "cps",
        [(rate("braniac_contributions_total", ONE, "outcome"), "{{outcome}}")],
        "Unacknowledged work stays in the weights and is offered again.",
    ),
    Panel("Tokens merged, of nodes", "short", [(f"braniac_tokens_merged{ONE}", "{{instance}}")]),
    Panel("Work given up, by reason", "cps", [(rate("braniac_forfeited_total", ONE, "reason"), "{{reason}}")]),
    Panel("Slots, by outcome", "cps", [(rate("braniac_slot_outcomes_total", ONE, "outcome"), "{{outcome}}")]),
    Panel(
        "Not finite",
        "short",
        [
            (f"sum(increase(braniac_training_diverged_steps_total{ONE}[5m]))", "steps given up in 5 min"),
            (f"sum(braniac_training_stalled{ONE})", "nodes that wait for better weights"),
        ],
    ),
]

NETWORK = [
    stat("Sent", "Bps", rate("braniac_net_bytes_total", '{direction="sent", instance=~"$instance"}', "direction")),
    stat(
        "Received", "Bps", rate("braniac_net_bytes_total", '{direction="received", instance=~"$instance"}', "direction")
    ),
    stat("Refused", "percentunit", f"max(instance:braniac_messages_refused:ratio_rate5m{ONE})", help="Worst node."),
    Panel("Traffic", "Bps", [(rate("braniac_net_bytes_total", ONE, "direction, kind"), "{{direction}} {{kind}}")]),
    Panel("Traffic of nodes", "Bps", [(rate("braniac_net_bytes_total", ONE, "instance"), "{{instance}}")]),
    Panel("Certified bytes", "Bps", [(rate("braniac_swarm_certified_bytes_total", "", "kind"), "{{kind}}")]),
    Panel(
        "Messages",
        "cps",
        [
            (f"sum(rate(braniac_messages_accepted_total{ONE}{RATE}))", "accepted"),
            (f"sum(rate(braniac_messages_refused_total{ONE}{RATE}))", "refused"),
        ],
    ),
    Panel("Refused messages, by code", "cps", [(rate("braniac_messages_refused_total", ONE, "code"), "{{code}}")]),
    Panel("Peers that nodes hear", "short", [(f"braniac_peers{ONE}", "{{instance}}")]),
    Panel(
        "Clocks",
        "s",
        [
            (f"braniac_clock_offset_seconds{ONE}", "{{instance}}"),
            ("max(braniac_swarm_clock_spread_seconds)", "spread of the swarm's own"),
        ],
        "Swarm time less the machine's wall clock.",
    ),
    Panel(
        "Quota used",
        "decbytes",
        [(f"braniac_quota_used_bytes{ONE}", "{{instance}}"), (f"max(braniac_quota_bytes{ONE})", "highest quota")],
        "Since midnight; a quota of 0 is none.",
    ),
    Panel("Bans", "short", [("sum(braniac_swarm_bans_total)", "banned")]),
]

PEER = [
    stat("State", "none", f"braniac_node_state{ONE} == 1", "{{state}}"),
    stat("Tier", "none", f"braniac_run_info{ONE}", "{{name}}, tier {{tier}}"),
    stat("Version", "none", f"braniac_build_info{ONE}", "{{version}}"),
    stat("Up", "s", f"time() - process_start_time_seconds{ONE}"),
    stat("Last checkpoint", "s", f"time() - braniac_checkpoint_timestamp_seconds{ONE}", help="Age."),
    stat("Generation", "none", f"braniac_checkpoint_generation{ONE}"),
    Panel("Loss", "none", [('braniac_loss_nats_per_byte{split="train", instance=~"$instance"}', "nats per byte")]),
    Panel("Slots, by outcome", "cps", [(rate("braniac_slot_outcomes_total", ONE, "outcome"), "{{outcome}}")]),
    Panel("Certificates", "cps", [(rate("braniac_certificates_total"), "applied")]),
    Panel(
        "Phases of a slot, 90th percentile",
        "s",
        [
            (
                "histogram_quantile(0.9, sum by (le, phase) "
                f"(rate(braniac_slot_phase_duration_seconds_bucket{ONE}{RATE})))",
                "{{phase}}",
            )
        ],
    ),
    Panel(
        "Event loop lag",
        "s",
        [
            (f"histogram_quantile(0.5, sum by (le) (rate(braniac_event_loop_lag_seconds_bucket{ONE}{RATE})))", "p50"),
            (f"max(instance:braniac_event_loop_lag_seconds:p99_rate5m{ONE})", "p99"),
        ],
        "How late the node does what is due.",
    ),
    Panel("Reasons to rest", "none", [(f"sum by (reason) (braniac_paused{ONE})", "{{reason}}")]),
    Panel("Memory", "bytes", [(f"process_resident_memory_bytes{ONE}", "resident")]),
    Panel(
        "Processor",
        "percentunit",
        [
            (rate("process_cpu_seconds_total"), "used, in cores"),
            (rate("braniac_cpu_throttled_seconds_total"), "held back by the cap"),
        ],
    ),
    Panel("Open files", "short", [(f"process_open_fds{ONE}", "open"), (f"process_max_fds{ONE}", "at most")]),
    Panel("Disagreements found", "short", [(f"sum by (kind) (braniac_divergences_total{ONE})", "{{kind}}")]),
    Panel("Checkpoints that failed", "short", [(f"increase(braniac_checkpoint_failures_total{ONE}[5m])", "in 5 min")]),
]

DASHBOARDS = {
    "swarm": ("Braniac: the swarm", SWARM, False),
    "training": ("Braniac: training", TRAINING, True),
    "network": ("Braniac: network", NETWORK, True),
    "peer": ("Braniac: one node", PEER, True),
}


def panel_json(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    """A panel as Grafana stores it."""
    targets = [
        {"datasource": DATASOURCE, "expr": expr, "legendFormat": legend or "__auto", "refId": chr(ord("A") + i)}
        for i, (expr, legend) in enumerate(panel.queries)
    ]
    options: dict[str, Any]
    if panel.stat:
        options = {
            "reduceOptions": {"calcs": ["lastNotNull"]},
            "textMode": "value_and_name" if panel.queries[0][1] else "value",
        }
    else:
        options = {
            "legend": {"displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    return {
        "id": number,
        "type": "stat" if panel.stat else "timeseries",
        "title": panel.title,
        "description": panel.help,
        "datasource": DATASOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "options": options,
        "targets": targets,
    }


def place(panels: Sequence[Panel]) -> list[dict[str, int]]:
    """Where each panel goes: from left to right, numbers in lower rows than charts."""
    places, x, y = [], 0, 0
    for index, panel in enumerate(panels):
        height = STAT_HEIGHT if panel.stat else HEIGHT
        if x and index and panels[index - 1].stat != panel.stat:
            x, y = 0, y + (STAT_HEIGHT if panels[index - 1].stat else HEIGHT)
        places.append({"h": height, "w": WIDTH, "x": x, "y": y})
        x += WIDTH
        if x >= 24:
            x, y = 0, y + height
    return places


def dashboard(uid: str) -> dict[str, Any]:
    """A whole dashboard, with a variable for the data source and, where nodes are shown, for the node."""
    title, panels, of_nodes = DASHBOARDS[uid]
    variables: list[dict[str, Any]] = [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    ]
    if of_nodes:
        query = 'label_values(braniac_node_state{job="braniac"}, instance)'
        several = uid != "peer"
        variables.append(
            {
                "name": "instance",
                "label": "Node",
                "type": "query",
                "datasource": DATASOURCE,
                "definition": query,
                "query": {"query": query, "refId": "instance"},
                "refresh": 2,
                "sort": 1,
                "multi": several,
                "includeAll": several,
                "allValue": ".*",
                "current": {"text": "All", "value": "$__all"} if several else {},
            }
        )
    return {
        "uid": f"braniac-{uid}",
        "title": title,
        "tags": ["braniac"],
        "schemaVersion": 39,
        "version": 1,
        "editable": False,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "links": [
            {"type": "dashboards", "tags": ["braniac"], "title": "Braniac", "asDropdown": True, "keepTime": True}
        ],
        "templating": {"list": variables},
        "panels": [
            panel_json(i + 1, panel, where) for i, (panel, where) in enumerate(zip(panels, place(panels), strict=True))
        ],
    }


def text(uid: str) -> str:
    """A dashboard's file."""
    return json.dumps(dashboard(uid), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name in DASHBOARDS:
        (FOLDER / f"{name}.json").write_text(text(name), encoding="utf-8")
