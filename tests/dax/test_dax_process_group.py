"""Per-tensor activation scales that several ranks share."""

import copy
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from dax_layers import DYNAMIC, INT8_TOKEN, layer
from torch import nn

from dax.quant.quantization import QConfig, quantize_dynamic, set_process_group

TENSOR = DYNAMIC["int8-tensor"]


def rank_main(rank: int, folder: str) -> None:
    """Compute one half of the rows, with and without a shared scale."""
    torch.set_grad_enabled(False)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    model = quantize_dynamic(nn.Sequential(nn.Linear(32, 16)), {"": TENSOR})
    x = torch.randn(10, 32)
    x[7, 3] = 50.0  # the largest is in the second half
    mine = x.chunk(2)[rank]
    whole, alone = model(x).chunk(2)[rank], model(mine)
    set_process_group(model, dist.group.WORLD)
    shared = model(mine)
    assert copy.deepcopy(model)[0].process_group is None
    set_process_group(model, None)
    assert model(mine).equal(alone)
    torch.save({"whole": whole, "shared": shared, "alone": alone}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_ranks_share_the_scale_of_all_their_rows(tmp_path):
    mp.start_processes(rank_main, (str(tmp_path),), nprocs=2, start_method="fork")  # no second import of torch
    for rank in (0, 1):
        result = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(result["shared"], result["whole"])
        assert result["alone"].equal(result["whole"]) == (rank == 1)


def test_sharing_a_scale_compiles_without_a_graph_break():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = quantize_dynamic(nn.Sequential(nn.Linear(32, 16)), {"": TENSOR}).requires_grad_(False)
        x = torch.randn(5, 32)
        expected = model(x)
        set_process_group(model, dist.group.WORLD)
        torch.compiler.reset()
        assert torch.compile(model, fullgraph=True, backend="aot_eager")(x).equal(expected)
    finally:
        dist.destroy_process_group()


def test_a_process_group_is_no_part_of_the_settings(tmp_path: Path):
    assert "process_group" not in [field.name for field in fields(QConfig)]
    group = object()  # what it is shows only where ranks communicate
    first, second = layer(32, 16, TENSOR), layer(32, 16, INT8_TOKEN)
    set_process_group(nn.ModuleList([first, second, nn.Linear(2, 2)]), group)
    assert first.process_group is group
    assert second.process_group is None  # has a scale for each row
    torch.save(first, tmp_path / "layer.pt")
    assert torch.load(tmp_path / "layer.pt", weights_only=False).process_group is None
    assert type(first).fuse([first, first]).process_group is group
    with pytest.raises(ValueError, match="agree"):
        type(first).fuse([first, copy.deepcopy(first)])
