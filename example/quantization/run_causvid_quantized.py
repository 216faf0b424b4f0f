"""Text to video of any length with CausVid, its transformer quantized to 8 bits by DAX.

Build the pipeline, load, quantize, generate, save. ``--help`` lists the flags; causvid_quantized.sh has one variable
for each.
"""

import signal
import sys
import time
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "example/quantization")]  # so that a checkout runs without being installed
signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports; from cli.run on it is a KeyboardInterrupt

import dax_settings
from inferix import CausVidPipeline, cli
from inferix.pipelines.base import save

REAL = cli.Weights(
    config=ROOT / "example/causvid/configs/causvid.yaml",
    base=ROOT / "weights/Wan2.1-T2V-1.3B",
    checkpoint=ROOT / "weights/CausVid/autoregressive_checkpoint",
)
DEMO = cli.Weights(
    config=ROOT / "example/causvid/configs/causvid_demo.yaml",
    base=ROOT / "weights/demo/Wan2.1-T2V-demo",
    checkpoint=ROOT / "weights/demo/CausVid/autoregressive_checkpoint",
)


def parse_arguments(argv):
    parser = cli.RunnerParser(description=__doc__.splitlines()[0], offload=True)
    parser.add_argument("--checkpoint_folder", type=Path, help="folder of CausVid's model.pt")
    parser.add_argument("--num_rollout", type=int, help="rollouts (default: 3, or as many as there are prompts)")
    parser.add_argument("--num_overlap_frames", type=int, default=3, help="latent frames that rollouts share")
    parser.add_switch("--diff_prompt", help="one video whose rollouts follow the prompts in turn")
    parser.add_argument("--diff_prompt_file", type=Path, help="the same, the prompts from a file, one a line")
    parser.add_switch("--is_interactive", help="the same, the prompts typed in while the video is made")
    return parser.parse_args(argv)


def quantize_transformer(transformer, quant_type="fp8", granularity="per_token"):
    """Quantize every Linear of ``transformer`` but those whose precision matters and whose time does not."""
    from dax.quant.quantization import qconfig, quantize_dynamic

    choices = {
        ("fp8", "per_token"): qconfig.get_dynamic_fp8_per_token_act_per_channel_weight_qconfig,
        ("fp8", "per_tensor"): qconfig.get_default_dynamic_fp8_qconfig,
        ("int8", "per_token"): qconfig.get_dynamic_int8_per_token_act_per_channel_weight_qconfig,
        ("int8", "per_tensor"): qconfig.get_default_dynamic_int8_qconfig,
    }
    qconfig_dict = {
        "": choices[quant_type, granularity](),
        "condition_embedder": None,
        "proj_out": None,
    }
    quantize_dynamic(transformer, qconfig_dict)


def each_video(args, default_prompt):
    """The prompts of every video to make: a list of one for all its rollouts or of one for each, or an iterator."""
    if args.is_interactive:
        return [chain(args.prompts or [], cli.typed_prompts())]
    if args.diff_prompt_file is not None:
        return [cli.read_prompts(args.diff_prompt_file)]
    prompts = args.prompts or [default_prompt]
    return [prompts] if args.diff_prompt else [[prompt] for prompt in prompts]


def main(argv=None):
    args = parse_arguments(argv)
    with cli.watched(args) as live:  # None without --enable_webrtc
        generate(args, live)


def generate(args, live):
    if not args.no_quantize:
        cli.check_can_quantize(args.quant_type)
    given = cli.Weights(args.config_path, args.wan_base_model_path, args.checkpoint_folder)
    weights = cli.find_weights(given, REAL, DEMO, saved=args.load_quantized)
    qconfig_dict = dax_settings.read(args.qconfig) if args.qconfig else None

    # Build and load
    pipeline = CausVidPipeline(
        config_path=weights.config,
        default_config_path=args.default_config_path,
        wan_base_model_path=weights.base,
        enable_kv_offload=args.enable_kv_offload,
        parallel_config=cli.parallel_config(args.ulysses_size, args.ring_size, cli.attention_heads(weights.base)),
        transformer_weights=args.load_quantized is None,
    )
    transformer = pipeline.pipeline.generator.model
    report = cli.Report(transformer, pipeline.dtype)
    if args.load_quantized:
        dax_settings.load(pipeline, weights.checkpoint)
    else:
        pipeline.load_checkpoint(weights.checkpoint)
    low_memory = cli.low_memory(args, pipeline)
    pipeline.setup_devices(low_memory)

    # Quantize
    if args.qconfig:
        dax_settings.quantize(pipeline, qconfig_dict, (args.prompts or [pipeline.example_prompt()])[:1])
    elif not args.no_quantize and not args.load_quantized:
        quantize_transformer(transformer, args.quant_type, args.quant_granularity)
    dax_settings.share_scales(pipeline)
    if pipeline.leads and not args.no_quantize and (low_memory or args.quantize_text_encoder):
        dax_settings.quantize_text_encoder(pipeline.pipeline.text_encoder, args.quant_type or "int8")
    if pipeline.leads and args.save_quantized:
        dax_settings.save(transformer, args.save_quantized)
    pipeline.pipeline.set_kv_cache_dtype(args.kv_cache_dtype)
    if not pipeline.leads:  # another of several processes has the prompts and writes the files
        pipeline.pipeline.follow()
        return
    if live:
        live.ready(pipeline, cli.quantization(args), cli.weight_bytes(transformer), steers="rollout")

    # Generate and save
    videos = each_video(args, pipeline.example_prompt())
    for prompts in live.clips(videos) if live else videos:
        same, start = isinstance(prompts, list) and len(prompts) == 1, time.perf_counter()
        files = pipeline.run_text_to_video(
            cli.noted(prompts, pipeline),
            output_folder=args.output_folder or ROOT / "outputs",
            num_rollout=3 if same and args.num_rollout is None else args.num_rollout,
            num_overlap_frames=args.num_overlap_frames,
            num_frames=pipeline.config.image_or_video_shape[1],
            seed=args.seed,
            sink=live.save if live else save,
            steer=live.steered if live else iter,
        )
        report.print(files, time.perf_counter() - start)


if __name__ == "__main__":
    sys.exit(cli.run(main))
