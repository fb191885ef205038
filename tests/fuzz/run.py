"""Fuzzes decoders with atheris: python -m tests.fuzz.run [TARGET ...] --seconds 60

Each target runs in a process of its own, because libFuzzer ends the process it runs in. It begins with the corpus in
the repository and with what earlier runs have found on this machine (in build/fuzz), which grows. An input that breaks
a target is kept as build/fuzz/TARGET-crash-*, a slow or greedy one as TARGET-timeout-* or TARGET-oom-*: mend the
decoder, then move the input to corpus/TARGET/found-WHAT. Exit code 1 if there was any.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

from tests.fuzz.corpus_files import CORPUS, names

INPUT_S_MAX = 10  # for one input, on a busy machine
MEMORY_MIB_MAX = 2048  # of the process, most of it torch and the fuzzer's own
FOUND = Path("build/fuzz")
_EXECUTIONS = re.compile(r"stat::number_of_executed_units:\s*(\d+)")
_COVERAGE = re.compile(r"cov: (\d+)")


def fuzz(name: str, flags: list[str]) -> None:
    """Run one target in this process; does not return."""
    import atheris

    with atheris.instrument_imports(include=["braniac"]):
        from tests.fuzz.targets import find

        target = find(name)

    def once(data: bytes) -> None:
        try:
            target.run(data)
        except BaseException:
            # libFuzzer's timer would kill an interpreter that takes long to end, before the input is written down.
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise

    atheris.Setup([sys.argv[0], f"-max_len={target.bytes_max}", *flags], once)
    atheris.Fuzz()


def run_apart(name: str, seconds: int) -> dict[str, object]:
    """Run one target in another process: executions, lines covered, and inputs that broke it."""
    found = FOUND / name
    found.mkdir(parents=True, exist_ok=True)
    flags = [
        str(found),
        str(CORPUS / name),
        f"-max_total_time={seconds}",
        f"-timeout={INPUT_S_MAX}",
        f"-rss_limit_mb={MEMORY_MIB_MAX}",
        f"-artifact_prefix={FOUND}/{name}-",
        "-print_final_stats=1",
        "-use_value_profile=1",
    ]
    before = set(FOUND.glob(f"{name}-*"))
    process = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.run", name, "--here", *flags], capture_output=True, text=True, check=False
    )
    executions, coverage = _EXECUTIONS.search(process.stderr), _COVERAGE.findall(process.stderr)
    broken = sorted(str(path) for path in set(FOUND.glob(f"{name}-*")) - before)
    if process.returncode:
        print(process.stderr[-4000:], file=sys.stderr)
    return {
        "target": name,
        "executions": int(executions[1]) if executions else 0,
        "coverage": int(coverage[-1]) if coverage else 0,
        "broken": broken or ([f"exit code {process.returncode}"] if process.returncode else []),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help="all of them if none is named")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--json", action="store_true", help="one JSON object per target")
    options = parser.parse_args()
    if unknown := set(options.targets) - set(names()):
        parser.error(f"no target {', '.join(sorted(unknown))}: choose from {', '.join(names())}")
    failed = False
    for name in options.targets or names():
        result = run_apart(name, options.seconds)
        failed = failed or bool(result["broken"])
        line = (
            f"{name:16}{result['executions']:>12,} executions{result['coverage']:>8,} covered  {result['broken'] or ''}"
        )
        print(json.dumps(result) if options.json else line.rstrip(), flush=True)
    return int(failed)


if __name__ == "__main__":
    if sys.argv[2:3] == ["--here"]:
        fuzz(sys.argv[1], sys.argv[3:])
    sys.exit(main())
