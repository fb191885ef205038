#!/bin/sh
# Generate the Python modules and type stubs of every .proto file, beside it (or below the directory given).
# Usage: scripts/proto.sh [directory]          PYTHON names the interpreter that has the dev extras.
set -eu
cd "$(dirname "$0")/.."
out=${1:-.typing}
python=${PYTHON:-python}
PATH="$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$PATH" # protoc-gen-mypy and protoc-gen-mypy_grpc
export PATH

# Through the links in .typing, so that the generated imports read `braniac.node` and not `node`.
cd .typing
case $out in /*) ;; .typing) out=. ;; *) out=../$out ;; esac
"$python" -m grpc_tools.protoc -I. --python_out="$out" --mypy_out="quiet:$out" braniac/protocol/*.proto braniac/node/*.proto
# Services live in node only: protocol knows no grpc.
"$python" -m grpc_tools.protoc -I. --grpc_python_out="$out" --mypy_grpc_out="quiet:$out" braniac/node/*.proto
