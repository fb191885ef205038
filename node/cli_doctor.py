"""The command that looks for what is wrong."""

from __future__ import annotations

import typer

from braniac.node import commands
from braniac.node.cli_options import ConfigFile, Json, Sets, StateDir, node_config

doctor_app = typer.Typer()


@doctor_app.command()
def doctor(json: Json = False, state_dir: StateDir = None, config: ConfigFile = None, set_: Sets = None) -> None:
    """Look for what is wrong with this node and this machine.

    The node may run or not; if it does, a peer is asked to dial it. Each line is a finding: ok, note, warning or error,
    with what to do. Exit code 0 if there is nothing worse than notes, 10 for warnings, 11 for errors.

    \b
    Examples:
      braniac-node doctor
      braniac-node doctor --json | jq '.findings[] | select(.severity == "error")'
    """
    settings = node_config(config, set_, state__dir=state_dir)
    from braniac.node import doctor as judge
    from braniac.node.doctor_facts import gather
    from braniac.node.logs import configure_logging

    configure_logging("error", settings.log.format)
    found = judge.findings(gather(settings))
    code = judge.exit_code(found)
    if json:
        rows = [
            {"code": f.code, "severity": f.severity.name.lower(), "sentence": f.sentence, "remedy": f.remedy or None}
            for f in found
        ]
        typer.echo(commands.json_text({"findings": rows, "exit_code": code}))
    else:
        for f in found:
            typer.echo(f"{f.severity.name.lower():<8} {f.sentence}" + (f"; {f.remedy}" if f.remedy else ""))
    raise typer.Exit(code)
