#!/usr/bin/env bash
# Measures what a clip costs on this machine, in seconds and GPU memory; see run_memory_benchmark.py, which has the flags.
# NPROC processes (default: 1) share each clip.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
python=python3
if [[ -z "${VIRTUAL_ENV:-}" && -x "$root/.venv/bin/python" ]]; then python="$root/.venv/bin/python"; fi
NPROC="${NPROC:-1}" exec "$python" "$here/launch.py" "$here/run_memory_benchmark.py" "$@"
