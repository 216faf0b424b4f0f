"""Rename a Wan transformer's or VAE's weights from the spellings in files to diffusers', which the engine uses.

Wan's own names are those of https://github.com/Wan-Video/Wan2.1 (``blocks.0.self_attn.q.weight``), diffusers' those of
``WanTransformer3DModel`` (``blocks.0.attn1.to_q.weight``) and ``AutoencoderKLWan``.
"""

import re
from collections.abc import Iterable
from functools import cache

WAN_TO_DIFFUSERS = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
    "modulation": "scale_shift_table",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "norm2": "norm3",  # the two count the norms of a block in a different order
    "norm3": "norm2",
}
for wan, diffusers in (("self_attn", "attn1"), ("cross_attn", "attn2")):
    WAN_TO_DIFFUSERS |= {f"{wan}.{part}": f"{diffusers}.to_{part}" for part in "qkv"}
    WAN_TO_DIFFUSERS |= {f"{wan}.o": f"{diffusers}.to_out.0", wan: diffusers}

VAE_TO_DIFFUSERS = {
    r"^conv1\.": "quant_conv.",
    r"^conv2\.": "post_quant_conv.",
    r"coder\.conv1\.": "coder.conv_in.",
    r"\.head\.0\.": ".norm_out.",
    r"\.head\.2\.": ".conv_out.",
    r"\.middle\.0\.": ".mid_block.resnets.0.",
    r"\.middle\.1\.": ".mid_block.attentions.0.",
    r"\.middle\.2\.": ".mid_block.resnets.1.",
    r"\.downsamples\.": ".down_blocks.",
    r"\.residual\.0\.": ".norm1.",
    r"\.residual\.2\.": ".conv1.",
    r"\.residual\.3\.": ".norm2.",
    r"\.residual\.6\.": ".conv2.",
    r"\.shortcut\.": ".conv_shortcut.",
}
"""Patterns in the names of a VAE's weights, besides the decoder's blocks, which Wan counts through (``vae_name``)."""

WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
"""What FSDP, activation checkpointing and torch.compile insert into the names of the modules that they wrap."""

PREFIXES = re.compile(r"((model|diffusion_model|transformer|unet|base_model|module)\.)+")
"""Prefixes that training code and other programs add to a transformer's names; there may be several in a row."""

ONLY_DIFFUSERS = re.compile(r"(?<![^._])(attn[12]|condition_embedder|proj_out|scale_shift_table|ffn[._]net)(?![^._])")
"""Parts of names that occur in diffusers' spelling alone."""


def strip_prefixes(name: str) -> str:
    """Return ``name`` without the names of what wraps the transformer."""
    name = WRAPPERS.sub("", name)
    prefix = PREFIXES.match(name)
    return name[prefix.end() :] if prefix else name


def diffusers_names(names: Iterable[str], separator: str = ".") -> list[str]:
    """Return ``names``, all from one file and without prefixes, in diffusers' spelling.

    Names that are in it already, and unknown names, are returned unchanged. ``separator`` is "_" for names that
    have an underscore in place of every dot.
    """
    names = list(names)
    if any(ONLY_DIFFUSERS.search(name) for name in names):
        return names
    pattern, renamed = _renaming(separator)
    return [pattern.sub(lambda match: renamed[match[0]], name) for name in names]


def substitute(name: str, patterns: dict[str, str]) -> str:
    """Return ``name`` with every regular expression in ``patterns`` replaced, one after the other."""
    for pattern, replacement in patterns.items():
        name = re.sub(pattern, replacement, name)
    return name


def vae_name(name: str) -> str:
    """Return Wan's name of a VAE's weight in diffusers' spelling, an unknown one unchanged."""
    name = substitute(name, VAE_TO_DIFFUSERS)
    return re.sub(r"\.upsamples\.(\d+)\.", lambda match: f".{_up_block(int(match[1]))}.", name)


def _up_block(index: int) -> str:
    """Return the place of the decoder's block ``index``: of each four, three are residual and one upsamples."""
    block, part = divmod(index, 4)
    return f"up_blocks.{block}." + (f"resnets.{part}" if part < 3 else "upsamplers.0")


@cache
def _renaming(separator: str) -> tuple[re.Pattern, dict[str, str]]:
    """Return the pattern of the parts of a name to be replaced, and the replacement of each."""
    renamed = {old.replace(".", separator): new.replace(".", separator) for old, new in WAN_TO_DIFFUSERS.items()}
    longest_first = sorted(renamed, key=len, reverse=True)
    edge = re.escape(separator)
    return re.compile(f"(?<![^{edge}])({'|'.join(map(re.escape, longest_first))})(?![^{edge}])"), renamed
