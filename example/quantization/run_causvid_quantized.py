"""Text to video of any length with CausVid, its transformer quantized to 8 bits by DAX.

Build the pipeline, quantize its transformer, generate, save. ``--help`` lists the flags; causvid_quantized.sh has one variable
for each.
"""

import launch  # noqa: F401  first: checks flags and paths before PyTorch is imported
from inferix import CausVidPipeline
from inferix.cli.devices import low_memory, pipeline_options
from inferix.cli.jobs import jobs, webrtc_session
from inferix.cli.main import run
from inferix.cli.model_paths import find_model_paths
from inferix.cli.preflight import parse_arguments
from quantization import check_quantization, load_transformer, quantize


def build(args):
    """Return the pipeline on its device, with the weights that the flags name."""
    paths = find_model_paths(args)
    pipeline = CausVidPipeline(
        config_path=paths.config, wan_base_model_path=paths.base, **pipeline_options(args, paths)
    )
    load_transformer(pipeline, paths.checkpoint, args)
    pipeline.setup_devices(low_memory(args, pipeline))
    return pipeline


def main(argv=None):
    """Generate the videos that the flags describe. Raises InputError for flags that cannot work."""
    args = parse_arguments("causvid", argv)
    check_quantization(args)
    with webrtc_session(args) as session:
        pipeline = build(args)
        quantize(pipeline, args)
        for job in jobs(args, pipeline, session):
            stream = pipeline.stream(
                job.prompts,
                num_rollout=job.num_rollout,
                num_overlap_frames=args.num_overlap_frames,
                num_frames=pipeline.config.image_or_video_shape[1],
                generator=job.generator,
            )
            with job.writer() as writer:
                for frames in stream:
                    writer.write(frames)


if __name__ == "__main__":
    raise SystemExit(run(main))
