"""Which key of a qconfig_dict decides: the README's table, on the names of diffusers' Wan transformer."""

import re
from pathlib import Path

import pytest
import torch
from dax_layers import INT8_TOKEN
from diffusers import WanTransformer3DModel

from dax.quant.quantization import QConfig, convert, lookup, matching_modules, prepare, quantize_dynamic

README = Path(__file__).resolve().parents[2] / "3rd_party/DAX/README.md"


def table() -> list[tuple[list[str], str, str | None]]:
    """Return the README's examples: the keys, the layer, the key that decides (None: the layer stays in float)."""
    text = README.read_text()
    rows = re.search(r"\| keys \| layer \| which one wins \|\n\|[-|]+\|\n((?:\|.*\|\n)+)", text).group(1).splitlines()
    result = []
    for row in rows:
        keys, layer, winner = (
            [name.strip('"') for name in re.findall("`([^`]+)`", cell)] for cell in row[1:-1].split("|")
        )
        assert len(layer) == 1 and (len(winner) == 1 or "none" in row)
        result.append((keys, layer[0], winner[0] if winner else None))
    return result


EXAMPLES = table()


def wan() -> WanTransformer3DModel:
    with torch.device("meta"):
        return WanTransformer3DModel(num_attention_heads=2, attention_head_dim=12, ffn_dim=64, num_layers=2)


def test_the_table_has_examples():
    assert len(EXAMPLES) >= 10 and any(winner is None for *_, winner in EXAMPLES)


@pytest.mark.parametrize("reverse", [False, True], ids=["in order", "reversed"])
@pytest.mark.parametrize("keys, layer, winner", EXAMPLES, ids=[f"{'+'.join(keys)}" for keys, *_ in EXAMPLES])
def test_the_readmes_table(keys, layer, winner, reverse):
    kinds = [QConfig(), QConfig(torch.int8), QConfig(rotation=True)]
    settings = dict(list(zip(keys, kinds))[:: -1 if reverse else 1])
    expected = None if winner is None else settings[winner]
    assert lookup(layer, settings) == expected
    for model in (quantize_dynamic(wan(), settings), convert(prepare(wan(), settings))):
        assert getattr(model.get_submodule(layer), "qconfig", None) == expected
    if winner is not None:  # and None wins as any other value does
        model = quantize_dynamic(wan(), {**settings, "proj_out": INT8_TOKEN, winner: None})
        assert not hasattr(model.get_submodule(layer), "qweight")


def test_what_a_key_names():
    model = wan()
    assert matching_modules(model, "attn1.to_q") == ["blocks.0.attn1.to_q", "blocks.1.attn1.to_q"]
    assert matching_modules(model, "blocks.1") == ["blocks.1"]
    assert matching_modules(model, "") == [""]
    for key in ("locks", "locks.1", "to_q.", "attn", "blocks.2", "attn1 "):
        assert matching_modules(model, key) == []
