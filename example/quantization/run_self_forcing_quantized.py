"""Text or image to video with Self-Forcing, its transformer quantized to 8 bits by DAX.

Build the pipeline, load, quantize, generate, save. ``--help`` lists the flags; self_forcing_quantized.sh has one
variable for each.
"""

import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "example/quantization")]  # so that a checkout runs without being installed
signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports; from cli.run on it is a KeyboardInterrupt

import dax_settings
from inferix import SelfForcingPipeline, cli
from inferix.errors import InputError
from inferix.pipelines.base import save

REAL = cli.Weights(
    config=ROOT / "example/self_forcing/configs/self_forcing_dmd.yaml",
    base=ROOT / "weights/Wan2.1-T2V-1.3B",
    checkpoint=ROOT / "weights/self_forcing/checkpoints/self_forcing_dmd.pt",
)
DEMO = cli.Weights(
    config=ROOT / "example/self_forcing/configs/self_forcing_demo.yaml",
    base=ROOT / "weights/demo/Wan2.1-T2V-demo",
    checkpoint=ROOT / "weights/demo/self_forcing/checkpoints/self_forcing_dmd.pt",
)


def parse_arguments(argv):
    parser = cli.RunnerParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint_path", type=Path, help="Self-Forcing's self_forcing_dmd.pt")
    parser.add_argument("--num_output_frames", type=int, help="latent frames: 3k, with --i2v 3k+1 (default: 21, 19)")
    parser.add_argument("--num_samples", type=int, default=1, help="videos of each prompt")
    parser.add_switch("--use_ema", help="load the averaged weights, 'generator_ema'")
    parser.add_switch("--save_with_index", help="name files after the prompt's number instead of its words")
    parser.add_switch("--i2v", help="image to video: start from --image_path")
    parser.add_argument("--image_path", type=Path, help="the first frame, for --i2v")
    parser.add_switch("--enable_profiling", help="say how long text encoding, each block and its decoding took")
    args = parser.parse_args(argv)
    if args.i2v != (args.image_path is not None):
        raise InputError("--i2v and --image_path (I2V=1 IMAGE_PATH=...) go together: one of them is missing")
    if args.num_output_frames is None:
        args.num_output_frames = 19 if args.i2v else 21
    return args


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


def main(argv=None):
    args = parse_arguments(argv)
    with cli.watched(args) as live:  # None without --enable_webrtc
        generate(args, live)


def generate(args, live):
    if not args.no_quantize:
        cli.check_can_quantize(args.quant_type)
    given = cli.Weights(args.config_path, args.wan_base_model_path, args.checkpoint_path)
    weights = cli.find_weights(given, REAL, DEMO, saved=args.load_quantized)
    qconfig_dict = dax_settings.read(args.qconfig) if args.qconfig else None

    # Build and load
    pipeline = SelfForcingPipeline(
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
        pipeline.load_checkpoint(weights.checkpoint, use_ema=args.use_ema)
    low_memory = cli.low_memory(args, pipeline)
    pipeline.setup_devices(low_memory)
    pipeline.stage_seconds = {} if args.enable_profiling else None

    # Quantize
    prompts = args.prompts or [pipeline.example_prompt()]
    if args.qconfig:
        dax_settings.quantize(pipeline, qconfig_dict, prompts[:1])
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
        live.ready(pipeline, cli.quantization(args), cli.weight_bytes(transformer), steers="clip")

    # Generate and save
    options = {
        "output_folder": args.output_folder or ROOT / "outputs",
        "num_output_frames": args.num_output_frames,
        "num_samples": args.num_samples,
        "seed": args.seed,
        "save_with_index": args.save_with_index,
        "sink": live.save if live else save,
    }
    for batch in live.clips([prompt] for prompt in prompts) if live else [prompts]:
        batch, start = cli.noted(batch, pipeline), time.perf_counter()
        if args.i2v:
            files = pipeline.run_image_to_video(batch, args.image_path, **options)
        else:
            files = pipeline.run_text_to_video(batch, **options)
        report.print(files, time.perf_counter() - start)
    cli.print_stages(pipeline.stage_seconds or {})


if __name__ == "__main__":
    sys.exit(cli.run(main))
