#!/usr/bin/env bash
# Measures what a clip costs on this machine, seconds and GPU memory; every flag of memory.py can be given.
# NPROC processes (default: 1) share each clip.
set -euo pipefail
ROOT="$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)" # readlink: this may be a symlink
PYTHON=python3
if [[ -z "${VIRTUAL_ENV:-}" && -x "$ROOT/.venv/bin/python" ]]; then PYTHON="$ROOT/.venv/bin/python"; fi
NPROC="${NPROC:-1}" exec "$PYTHON" "$ROOT/example/quantization/launch.py" "$ROOT/benchmarks/memory.py" "$@"
