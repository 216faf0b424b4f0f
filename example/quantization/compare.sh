#!/usr/bin/env bash
# What quantization costs and saves, for your own prompts and weights. Every flag of run_compare.py has a variable here:
#   PROMPT="A cat dancing on the moon" SETTINGS="fp8 int8" ./example/quantization/compare.sh
#   SENSITIVITY=fp8 PSNR=40 ./example/quantization/compare.sh
# An empty variable counts as not set, but for PROMPT. Further arguments are passed on as they are.
set -euo pipefail

ROOT="$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.." && pwd)" # readlink: this may be a symlink
PYTHON=python3
if [[ -z "${VIRTUAL_ENV:-}" && -x "$ROOT/.venv/bin/python" ]]; then PYTHON="$ROOT/.venv/bin/python"; fi

export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" # threads that wait leave a shared CPU to those that work

exec "$PYTHON" "$ROOT/example/quantization/run_compare.py" \
    ${MODEL:+--model "$MODEL"} \
    ${CONFIG_PATH:+--config_path "$CONFIG_PATH"} \
    ${DEFAULT_CONFIG_PATH:+--default_config_path "$DEFAULT_CONFIG_PATH"} \
    ${WAN_BASE_MODEL_PATH:+--wan_base_model_path "$WAN_BASE_MODEL_PATH"} \
    ${CHECKPOINT_PATH:+--checkpoint_path "$CHECKPOINT_PATH"} \
    ${USE_EMA:+--use_ema "$USE_EMA"} \
    ${PROMPT+--prompt "$PROMPT"} \
    ${NUM_PROMPTS:+--num_prompts "$NUM_PROMPTS"} \
    ${NUM_OUTPUT_FRAMES:+--num_output_frames "$NUM_OUTPUT_FRAMES"} \
    ${SEED:+--seed "$SEED"} \
    ${OUTPUT_FOLDER:+--output_folder "$OUTPUT_FOLDER"} \
    ${SETTINGS:+--settings $SETTINGS} \
    ${SENSITIVITY:+--sensitivity "$SENSITIVITY"} \
    ${PSNR:+--psnr "$PSNR"} \
    "$@"
