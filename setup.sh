#!/usr/bin/env bash
# Installs all that generation needs into the active virtualenv, or into .venv here. Run it again as often as you like.
#   ./setup.sh          to run the scripts
#   ./setup.sh --dev    what the tests need as well, system packages included
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

DEV=false
case "${1:-}" in
    "") ;;
    --dev) DEV=true ;;
    *) echo "usage: ./setup.sh [--dev]" >&2; exit 2 ;;
esac

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

if [[ -n "${VIRTUAL_ENV:-}" ]]; then
    PYTHON="$VIRTUAL_ENV/bin/python"
else
    if [[ ! -x .venv/bin/python ]]; then
        for candidate in python3 python3.13 python3.12 python3.11 none; do new_enough "$candidate" && break; done
        if [[ "$candidate" == none ]]; then
            echo "error: Python 3.11 or later is needed" >&2
            exit 2
        fi
        if ! "$candidate" -m venv .venv; then
            rm -rf .venv
            echo "error: $candidate cannot make a virtualenv: on Debian and Ubuntu, apt-get install python3-venv" >&2
            exit 2
        fi
    fi
    PYTHON="$PWD/.venv/bin/python"
fi
if ! new_enough "$PYTHON"; then
    echo "error: $PYTHON is older than Python 3.11" >&2
    exit 2
fi

pip() { "$PYTHON" -m pip --disable-pip-version-check "$@"; }

# Without a GPU PyTorch's CPU build does: a tenth of the size of the one that pip takes by default on Linux.
TORCH="$(grep '^torch==' requirements.txt)"
if [[ "$(uname -s)" == Linux ]] && ! command -v nvidia-smi >/dev/null &&
    ! pip install --dry-run --no-deps "$TORCH" | grep -qE '\+cpu|already satisfied'; then
    pip install --no-deps --extra-index-url https://download.pytorch.org/whl/cpu "$TORCH"
fi

pip install -r requirements.txt
pip install -e 3rd_party/DAX
pip install --no-deps -e .

if $DEV; then
    pip install -r requirements-dev.txt
    missing=() # the tests watch the stream in browsers, one of them in a network namespace
    command -v chromium >/dev/null || missing+=(chromium)
    command -v firefox-esr >/dev/null || command -v firefox >/dev/null || missing+=(firefox-esr)
    PATH="$PATH:/usr/sbin:/sbin" command -v ip >/dev/null || missing+=(iproute2)
    if ((${#missing[@]})); then
        if [[ "$(id -u)" == 0 ]] && command -v apt-get >/dev/null; then
            apt-get update || true # the lists that are there may do
            DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}" ||
                echo "note: the tests that need ${missing[*]} are skipped" >&2
        else
            echo "note: some tests need ${missing[*]}: as root, apt-get install ${missing[*]}" >&2
        fi
    fi
fi
echo "ready: ./example/quantization/self_forcing_quantized.sh"
