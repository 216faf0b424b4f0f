"""Shared by the benchmarks and the comparison: errors and their limits, tables, plots, JSON."""

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAX_ERROR = {
    "int8": 0.03,
    "fp8": 0.07,
    "int8-tensor": 0.05,
    "fp8-tensor": 0.09,
    "bf16": 0.03,
    "bf16+fp8kv": 0.045,
    "fp8kv": 0.045,
    "int8+fp8kv": 0.05,
    "fp8+fp8kv": 0.075,
    "fp8+fp8kv+offload": 0.075,
    "torchao-fp8": 0.07,
}
"""Relative error of a block's latents, by setting, above which a table marks it."""
OTHER_MAX_ERROR = 0.1
"""The limit of settings that are not in ``MAX_ERROR``."""
MAX_GAIN_ERROR = 0.02
"""Distance of a block's gain from 1 above which a table marks it."""


def relative_error_and_gain(actual: Tensor, exact: Tensor) -> tuple[float, float]:
    """Return |actual - exact| / |exact|, and <actual, exact> / <exact, exact>, which shows a loss of magnitude."""
    actual, exact = actual.double().flatten(), exact.double().flatten()
    return ((actual - exact).norm() / exact.norm()).item(), (actual @ exact / (exact @ exact)).item()


def errors_by_block(actual: Sequence[Tensor], exact: Sequence[Tensor]) -> tuple[list[float], list[float]]:
    """Return relative error and gain of every block."""
    pairs = [relative_error_and_gain(*pair) for pair in zip(actual, exact, strict=True)]
    return [error for error, _ in pairs], [gain for _, gain in pairs]


def format_error(error: float, setting: str) -> str:
    """Return a relative error as text, marked where it exceeds the limit of ``setting`` or is no number."""
    limit = MAX_ERROR.get(setting, OTHER_MAX_ERROR)
    return f"{error:.4f}" if error <= limit else f"{error:.4f} **above {limit:g}**"


def format_gain(gain: float) -> str:
    """Return a gain as text, marked where it is too far from 1 or is no number."""
    return f"{gain:.4f}" if abs(gain - 1) <= MAX_GAIN_ERROR else f"{gain:.4f} **not 1 ± {MAX_GAIN_ERROR:g}**"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def block_table(results: Mapping[str, Sequence[str]]) -> str:
    """Return a Markdown table with a row for each setting and a column for each block."""
    blocks = max(map(len, results.values()))
    header = ["setting", *(f"block {number}" for number in range(1, blocks + 1))]
    return markdown_table(header, [[setting, *cells] for setting, cells in results.items()])


@contextmanager
def axes(path: Path, rows: int = 1, width: float = 8, height: float = 4) -> Iterator:
    """Give ``rows`` matplotlib axes to draw on, below each other, and write the picture to ``path``.

    One row: the axes; several: a list of them that share the horizontal axis.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(rows, sharex=True, figsize=(width, height), layout="constrained", squeeze=False)
    yield panels[0, 0] if rows == 1 else list(panels[:, 0])
    handles, labels = panels[0, 0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot_errors_by_block(
    errors: Mapping[str, Sequence[float]], gains: Mapping[str, Sequence[float]], path: Path
) -> None:
    """Draw relative error and gain of the latents, block by block, of every setting."""
    with axes(path, rows=2, height=7) as (upper, lower):
        for panel, results in ((upper, errors), (lower, gains)):
            for name, values in results.items():
                panel.plot(range(1, len(values) + 1), values, marker="o", label=name)
        upper.set_ylabel("relative error of the latents")
        upper.set_ylim(bottom=0)
        lower.axhline(1, color="gray", linewidth=0.8)
        lower.set_ylabel("gain of the latents")
        lower.set_xlabel("block")
        lower.xaxis.get_major_locator().set_params(integer=True)


def machine_name() -> str:
    """Return the name of the GPU, or the number of threads on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def write_report(path: Path, results: Mapping) -> None:
    """Write ``results`` as JSON, with the machine, the PyTorch version and the command. NaN and infinities become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine_name(), "torch": torch.__version__, "command": sys.argv, **results}
    complete = path.with_suffix(".tmp")  # a run that is cut off leaves the last report whole
    complete.write_text(json.dumps(_finite(report), indent=1, allow_nan=False))
    complete.replace(path)


def _finite(content: Any) -> Any:
    """Return ``content`` with None in place of NaN and infinities, which JSON cannot hold."""
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
