#!/usr/bin/env bash
# Fetches public weights into the folder of this script. Interrupted? Run it again: it goes on where it stopped.
#   ./weights/download.sh [--dry-run] [NAME...]        (default: self_forcing causvid)
# NAME is a preset (PRESET=list ./example/quantization/self_forcing_quantized.sh lists them), fetched with the base model
# that it needs; base or base_14b, that base model alone; or tiny, the tiny VAE.
set -euo pipefail

WEIGHTS="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
PYTHON=python3
if [[ -z "${VIRTUAL_ENV:-}" && -x "$WEIGHTS/../.venv/bin/python" ]]; then PYTHON="$WEIGHTS/../.venv/bin/python"; fi

cd "$WEIGHTS/.." # where the package inferix is
exec "$PYTHON" -m inferix.cli.download "$WEIGHTS" "$@"
