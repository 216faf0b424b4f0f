#!/usr/bin/env bash
# Times the engine on this machine with random weights; see README.md. Every flag of run_benchmark.py can be given.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
python=python3
if [[ -z "${VIRTUAL_ENV:-}" && -x "$root/.venv/bin/python" ]]; then python="$root/.venv/bin/python"; fi
exec "$python" "$here/run_benchmark.py" "$@"
