"""The report that the runners print at their end, and the counts it is made of."""

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from torch import nn

from inferix.runtime.memory import num_bytes

if TYPE_CHECKING:
    from inferix.cli.jobs import Job
    from inferix.pipelines.pipeline import Pipeline


def full_precision_bytes(model: nn.Module, itemsize: int) -> int:
    """Return the bytes of the same model with nothing quantized, at ``itemsize`` bytes a weight."""
    count = 0
    module: Any
    for module in model.modules():
        if is_linear(module):
            count += module.in_features * module.out_features + (0 if module.bias is None else module.bias.numel())
        else:
            tensors = {**module._parameters, **module._buffers}
            kept = tensors.keys() - module._non_persistent_buffers_set
            count += sum(tensor.numel() for name in kept if (tensor := tensors[name]) is not None)
    return count * itemsize


def is_linear(module: nn.Module) -> bool:
    """Return whether ``module`` is a Linear, quantized or not."""
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def linear_names(model: nn.Module) -> list[str]:
    """Return the names of all Linears, quantized or not."""
    return [name for name, module in model.named_modules() if is_linear(module)]


def float_linear_names(model: nn.Module) -> list[str]:
    """Return the names of the Linears that are not quantized."""
    return [name for name, module in model.named_modules() if type(module) is nn.Linear]


def common_prefixes(names: list[str], among: list[str]) -> list[str]:
    """Return the shortest dotted prefixes that cover all of ``names`` and nothing else of ``among``."""
    prefixes: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            prefix = ".".join(parts[:depth])
            if all(other in names for other in among if f"{other}.".startswith(f"{prefix}.")):
                prefixes[prefix] = None
                break
    return list(prefixes)


def format_bytes(size: int) -> str:
    """Return ``size`` in GB, below a gigabyte in MB (powers of ten)."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


def quantization_name(args: Namespace) -> str:
    """Return how the flags quantize the transformer, in words."""
    if file := args.qconfig or args.load_quantized:
        return f"as in {file.name}"
    return "none" if args.no_quantize else f"{args.quant_type}, {args.quant_granularity.replace('_', ' ')}"


class Report:
    """What was generated, how fast, and what quantization did to the transformer.

    Args:
        args: the flags.
        pipeline: quantized, ready to generate.
    """

    def __init__(self, args: Namespace, pipeline: "Pipeline"):
        transformer = pipeline.transformer
        linears, unquantized = linear_names(transformer), float_linear_names(transformer)
        self.pipeline = pipeline
        self.quantization = quantization_name(args)
        self.bytes_before = full_precision_bytes(transformer, pipeline.dtype.itemsize)
        self.bytes_after = num_bytes(transformer)
        self.kept = "everything" if unquantized == linears else ", ".join(common_prefixes(unquantized, linears))
        self.frames = 0
        self.seconds = 0.0

    def add(self, job: "Job") -> None:
        """Finish the files of a job, and count its frames and seconds."""
        self.frames += job.finish()
        self.seconds += job.seconds

    def print(self) -> None:
        """Print seconds, frames a second, memory of the weights, and what stayed in high precision."""
        cache = str(self.pipeline.pipeline.kv_cache_dtype).removeprefix("torch.")
        print(f"seconds            {self.seconds:.1f} for {self.frames} frames")
        print(f"frames per second  {self.frames / self.seconds if self.seconds else 0:.1f}")
        for path, strength, count in self.pipeline.loras:
            print(f"LoRA               {path.name}, strength {strength:g}: {count} modules changed")
        print(f"quantization       {self.quantization}")
        print(f"key-value cache    {cache}")
        print(
            f"weight memory      {format_bytes(self.bytes_before)} before quantization, {format_bytes(self.bytes_after)} after"
        )
        print(f"high precision     {self.kept or 'nothing'}")
        print_stages(self.pipeline.stage_seconds or {})


def print_stages(stage_seconds: dict[str, list[float]]) -> None:
    """Print a line for every stage that ``Pipeline.stage_seconds`` recorded: seconds in all, calls, and each call's."""
    for stage, seconds in stage_seconds.items():
        each = " ".join(f"{second:.3f}" for second in seconds)
        print(f"{stage:<18} {sum(seconds):.3f} s in {len(seconds)}: {each}")
