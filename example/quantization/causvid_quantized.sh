#!/usr/bin/env bash
# Text to video of any length with CausVid, quantized. Every flag of run_causvid_quantized.py has a variable here:
#   PROMPT="A beautiful sunset over the ocean" NUM_ROLLOUT=6 ./example/quantization/causvid_quantized.sh
# NPROC (default: the GPUs there are) processes share each video, or with DATA_PARALLEL make several at a time; see
# launch.py, also for several nodes.
# WEBRTC_TOKEN, the secret of the page, has none: flags can be seen by others.
# An empty variable counts as not set, but for PROMPT. Further arguments are passed on as they are.
set -euo pipefail

ROOT="$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.." && pwd)" # readlink: this may be a symlink
PYTHON=python3
if [[ -z "${VIRTUAL_ENV:-}" && -x "$ROOT/.venv/bin/python" ]]; then PYTHON="$ROOT/.venv/bin/python"; fi

export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" # threads that wait leave a shared CPU to those that work

exec "$PYTHON" "$ROOT/example/quantization/launch.py" "$ROOT/example/quantization/run_causvid_quantized.py" \
    ${PRESET:+--preset "$PRESET"} \
    ${CONFIG_PATH:+--config_path "$CONFIG_PATH"} ${DEFAULT_CONFIG_PATH:+--default_config_path "$DEFAULT_CONFIG_PATH"} \
    ${WAN_BASE_MODEL_PATH:+--wan_base_model_path "$WAN_BASE_MODEL_PATH"} \
    ${CHECKPOINT_FOLDER:+--checkpoint_folder "$CHECKPOINT_FOLDER"} \
    ${LORA_PATH:+--lora_path "$LORA_PATH"} \
    ${VAE:+--vae "$VAE"} ${TINY_VAE_PATH:+--tiny_vae_path "$TINY_VAE_PATH"} \
    ${HEIGHT:+--height "$HEIGHT"} ${WIDTH:+--width "$WIDTH"} \
    ${PROMPT+--prompt "$PROMPT"} \
    ${PROMPT_FILE:+--prompt_file "$PROMPT_FILE"} ${EXTENDED_PROMPT_FILE:+--extended_prompt_file "$EXTENDED_PROMPT_FILE"} \
    ${OVERWRITE:+--overwrite "$OVERWRITE"} \
    ${STORYBOARD:+--storyboard "$STORYBOARD"} \
    ${DIFF_PROMPT:+--diff_prompt "$DIFF_PROMPT"} \
    ${DIFF_PROMPT_FILE:+--diff_prompt_file "$DIFF_PROMPT_FILE"} \
    ${IS_INTERACTIVE:+--is_interactive "$IS_INTERACTIVE"} \
    ${NUM_ROLLOUT:+--num_rollout "$NUM_ROLLOUT"} \
    ${NUM_OVERLAP_FRAMES:+--num_overlap_frames "$NUM_OVERLAP_FRAMES"} \
    ${SEED:+--seed "$SEED"} \
    ${OUTPUT_FOLDER:+--output_folder "$OUTPUT_FOLDER"} \
    ${QUANT_TYPE:+--quant_type "$QUANT_TYPE"} ${QUANT_GRANULARITY:+--quant_granularity "$QUANT_GRANULARITY"} \
    ${QCONFIG:+--qconfig "$QCONFIG"} \
    ${SAVE_QUANTIZED:+--save_quantized "$SAVE_QUANTIZED"} ${LOAD_QUANTIZED:+--load_quantized "$LOAD_QUANTIZED"} \
    ${KV_CACHE_DTYPE:+--kv_cache_dtype "$KV_CACHE_DTYPE"} \
    ${NO_QUANTIZE:+--no_quantize "$NO_QUANTIZE"} \
    ${ENABLE_KV_OFFLOAD:+--enable_kv_offload "$ENABLE_KV_OFFLOAD"} \
    ${LOW_MEMORY:+--low_memory "$LOW_MEMORY"} \
    ${QUANTIZE_TEXT_ENCODER:+--quantize_text_encoder "$QUANTIZE_TEXT_ENCODER"} \
    ${DATA_PARALLEL:+--data_parallel "$DATA_PARALLEL"} \
    ${ULYSSES_SIZE:+--ulysses_size "$ULYSSES_SIZE"} ${RING_SIZE:+--ring_size "$RING_SIZE"} \
    ${ENABLE_WEBRTC:+--enable_webrtc "$ENABLE_WEBRTC"} \
    ${WEBRTC_HOST:+--webrtc_host "$WEBRTC_HOST"} ${WEBRTC_PORT:+--webrtc_port "$WEBRTC_PORT"} \
    ${WEBRTC_EXIT:+--webrtc_exit "$WEBRTC_EXIT"} ${WEBRTC_WAIT:+--webrtc_wait "$WEBRTC_WAIT"} \
    "$@"
