#!/usr/bin/env bash
# Measures speed and accuracy on this machine with random weights; every flag of speed.py can be given.
#   OUTPUT_FOLDER=/tmp/here ./benchmarks/benchmark.sh --settings bf16 fp8
set -euo pipefail
ROOT="$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)" # readlink: this may be a symlink
PYTHON=python3
if [[ -z "${VIRTUAL_ENV:-}" && -x "$ROOT/.venv/bin/python" ]]; then PYTHON="$ROOT/.venv/bin/python"; fi
exec "$PYTHON" "$ROOT/benchmarks/speed.py" "$@"
