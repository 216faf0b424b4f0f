#!/usr/bin/env bash
# Fetches the public weights into the folder of this script. Interrupted? Run it again: it goes on where it stopped.
#   ./weights/download.sh [--dry-run] [base] [self_forcing] [causvid]        (default: all three)
set -euo pipefail

WEIGHTS="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
PYTHON=python3
if [[ -z "${VIRTUAL_ENV:-}" && -x "$WEIGHTS/../.venv/bin/python" ]]; then PYTHON="$WEIGHTS/../.venv/bin/python"; fi

exec "$PYTHON" - "$WEIGHTS" "$@" <<'PYTHON'
import shutil
import sys
from pathlib import Path

# What, where from, where to, and the files with their rounded sizes in GB.
PARTS = {
    "base": ("Wan-AI/Wan2.1-T2V-1.3B", "Wan2.1-T2V-1.3B", {
        "config.json": 0.0,
        "diffusion_pytorch_model.safetensors": 5.7,
        "models_t5_umt5-xxl-enc-bf16.pth": 11.4,
        "Wan2.1_VAE.pth": 0.5,
        "google/umt5-xxl/special_tokens_map.json": 0.0,
        "google/umt5-xxl/spiece.model": 0.0,
        "google/umt5-xxl/tokenizer.json": 0.0,
        "google/umt5-xxl/tokenizer_config.json": 0.0,
    }),
    "self_forcing": ("gdhe17/Self-Forcing", "self_forcing", {"checkpoints/self_forcing_dmd.pt": 5.7}),
    "causvid": ("tianweiy/CausVid", "causvid", {"autoregressive_checkpoint/model.pt": 11.4}),
}

weights, *words = sys.argv[1:]
wanted = [word for word in words if word != "--dry-run"] or list(PARTS)
if unknown := set(wanted) - set(PARTS):
    print(f"error: unknown: {' '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}", file=sys.stderr)
    sys.exit(2)
missing = []
for repo, folder, files in (PARTS[part] for part in wanted):
    if folder == "causvid" and not Path(weights, folder).exists() and Path(weights, "CausVid").exists():
        folder = "CausVid"  # the name that earlier versions gave it
    for name, size in files.items():
        path = Path(weights, folder, name)
        state = "there" if path.exists() else f"{size:.1f} GB" if size else "small"
        print(f"{state:>8}  {repo}  {name} -> weights/{folder}/{name}", flush=True)
        if not path.exists():
            missing.append((size, repo, folder, name))
need = sum(size for size, *_ in missing)
free = shutil.disk_usage(weights).free / 1e9
print(f"to fetch: {need:.1f} GB; free here: {free:.1f} GB")
if "--dry-run" in words or not missing:
    sys.exit()
if need > free:
    sys.exit("error: the disk has too little room; name a part to fetch that alone, or link weights/ to another disk")
try:
    from huggingface_hub import hf_hub_download
except ImportError:
    sys.exit("error: huggingface_hub is not installed: run ./setup.sh first")
try:
    for _, repo, folder, name in missing:
        hf_hub_download(repo, name, local_dir=Path(weights, folder))
except KeyboardInterrupt:
    sys.exit("stopped: run it again to go on")
except Exception as error:
    sys.exit(f"error: {str(error).splitlines()[0]} (run it again to go on where it stopped)")
PYTHON
