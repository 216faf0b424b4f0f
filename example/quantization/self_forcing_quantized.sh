#!/usr/bin/env bash
# Text (or image) to video with Self-Forcing, quantized. Every flag of run_self_forcing_quantized.py has a variable here:
#   PROMPT="A cat dancing on the moon" QUANT_TYPE=int8 ./example/quantization/self_forcing_quantized.sh
# NPROC (default: the GPUs there are) processes share each video, or with DATA_PARALLEL make several at a time; see
# launch.py, also for several nodes.
# WEBRTC_TOKEN, the secret of the page, has none: flags can be seen by others.
# An empty variable counts as not set, but for PROMPT. Further arguments are passed on as they are.
set -euo pipefail

ROOT="$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.." && pwd)" # readlink: this may be a symlink
PYTHON=python3
if [[ -z "${VIRTUAL_ENV:-}" && -x "$ROOT/.venv/bin/python" ]]; then PYTHON="$ROOT/.venv/bin/python"; fi

if [[ -z "${PRESET:-}" ]]; then USE_EMA="${USE_EMA:-true}"; fi # a preset knows which weights it means
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" # threads that wait leave a shared CPU to those that work

exec "$PYTHON" "$ROOT/example/quantization/launch.py" "$ROOT/example/quantization/run_self_forcing_quantized.py" \
    ${USE_EMA:+--use_ema "$USE_EMA"} \
    ${PRESET:+--preset "$PRESET"} \
    ${CONFIG_PATH:+--config_path "$CONFIG_PATH"} ${DEFAULT_CONFIG_PATH:+--default_config_path "$DEFAULT_CONFIG_PATH"} \
    ${WAN_BASE_MODEL_PATH:+--wan_base_model_path "$WAN_BASE_MODEL_PATH"} \
    ${CHECKPOINT_PATH:+--checkpoint_path "$CHECKPOINT_PATH"} \
    ${LORA_PATH:+--lora_path "$LORA_PATH"} \
    ${VAE:+--vae "$VAE"} ${TINY_VAE_PATH:+--tiny_vae_path "$TINY_VAE_PATH"} \
    ${HEIGHT:+--height "$HEIGHT"} ${WIDTH:+--width "$WIDTH"} \
    ${PROMPT+--prompt "$PROMPT"} \
    ${PROMPT_FILE:+--prompt_file "$PROMPT_FILE"} ${EXTENDED_PROMPT_FILE:+--extended_prompt_file "$EXTENDED_PROMPT_FILE"} \
    ${OVERWRITE:+--overwrite "$OVERWRITE"} \
    ${STORYBOARD:+--storyboard "$STORYBOARD"} \
    ${NUM_OUTPUT_FRAMES:+--num_output_frames "$NUM_OUTPUT_FRAMES"} ${ENDLESS:+--endless "$ENDLESS"} \
    ${NUM_SAMPLES:+--num_samples "$NUM_SAMPLES"} \
    ${I2V:+--i2v "$I2V"} \
    ${IMAGE_PATH:+--image_path "$IMAGE_PATH"} \
    ${SEED:+--seed "$SEED"} \
    ${OUTPUT_FOLDER:+--output_folder "$OUTPUT_FOLDER"} \
    ${SAVE_WITH_INDEX:+--save_with_index "$SAVE_WITH_INDEX"} \
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
    ${ENABLE_PROFILING:+--enable_profiling "$ENABLE_PROFILING"} \
    ${ENABLE_WEBRTC:+--enable_webrtc "$ENABLE_WEBRTC"} \
    ${WEBRTC_HOST:+--webrtc_host "$WEBRTC_HOST"} ${WEBRTC_PORT:+--webrtc_port "$WEBRTC_PORT"} \
    ${WEBRTC_EXIT:+--webrtc_exit "$WEBRTC_EXIT"} ${WEBRTC_WAIT:+--webrtc_wait "$WEBRTC_WAIT"} \
    "$@"
