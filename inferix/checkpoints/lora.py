"""LoRA files (https://arxiv.org/abs/2106.09685) of every published layout, merged into a transformer's float weights.

A file holds, for a module with weight W [out, in], a matrix A [rank, in] (also called "down") and a matrix B [out, rank]
("up"): W' = W + strength * (alpha / rank) * B @ A. It may also hold differences, which are added as they are.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from inferix.checkpoints.files import StateDict, load_weights, safetensors_metadata
from inferix.checkpoints.json_files import load_json, parse_json
from inferix.checkpoints.keys import diffusers_names, strip_prefixes
from inferix.errors import InputError

ROLES = {
    "down": r"(\.lora_A(\.\w+)?|\.lora_down|[._]lora\.down)\.weight",
    "up": r"(\.lora_B(\.\w+)?|\.lora_up|[._]lora\.up)\.weight",
    "alpha": r"\.alpha",
    "weight": r"\.diff",
    "bias": r"\.diff_b",
    "modulation": r"\.diff_m",
}
"""What a tensor is (the last three: a difference to that parameter of the module), and how its name ends."""
KEY = re.compile("(?P<module>.+?)(" + "|".join(f"(?P<{role}>{ending})" for role, ending in ROLES.items()) + ")")
UNSUPPORTED = re.compile(r"dora_scale|lora_magnitude_vector|hada_w|lokr_w|lora_mid|lora_embedding")
"""Parts of names that other kinds of adapters have (DoRA, LoHa, LoKr, ...), whose rule is another."""
KOHYA = re.compile(r"lora_(unet|transformer)_+")
"""How names begin in which every dot is an underscore (kohya's sd-scripts, musubi-tuner)."""


@dataclass(frozen=True)
class LowRankUpdate:
    """What is added to a weight as the product of two matrices."""

    name: str
    """In the file, for messages."""
    parameter: str
    """What it is added to: diffusers' name, or that with underscores for dots."""
    down: Tensor
    up: Tensor
    scale: float | None = None
    """alpha / rank; None where the file does not say."""

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def complaint(self, weight: Tensor) -> str:
        """What keeps it from fitting ``weight``; "" where it fits."""
        rows, columns = len(self.up), self.down[0].numel()
        if weight.ndim > 1 and (rows, columns) == (len(weight), weight[0].numel()) and self.up[0].numel() == self.rank:
            return ""
        return f"{list(self.down.shape)} and {list(self.up.shape)} for a parameter of {list(weight.shape)}"

    def delta(self, device: torch.device) -> Tensor:
        """B @ A in float32, [out, in]; a convolution's kernel is flattened."""
        down, up = (matrix.to(device, torch.float32).flatten(1) for matrix in (self.down, self.up))
        return up @ down


@dataclass(frozen=True)
class Difference:
    """What is added to a parameter as it is."""

    name: str
    parameter: str
    value: Tensor
    scale: float = 1.0

    def complaint(self, weight: Tensor) -> str:
        fits = self.value.shape == weight.shape
        return "" if fits else f"{list(self.value.shape)} for a parameter of {list(weight.shape)}"

    def delta(self, device: torch.device) -> Tensor:
        return self.value.to(device, torch.float32)


Update = LowRankUpdate | Difference


def read_lora(path: str | Path) -> list[Update]:
    """Read what a LoRA adds to each parameter of a Wan transformer.

    Args:
        path: a ``.safetensors`` or ``.pt`` file, or a folder of PEFT (``adapter_model`` and ``adapter_config.json``).

    Raises InputError where it is missing, damaged, no plain LoRA, or lacks half of a pair.
    """
    path = Path(path)
    if path.is_dir():
        path = next(iter(sorted(path.glob("adapter_model.*"))), path / "adapter_model.safetensors")
    modules = _by_module(_select(load_weights(path), path), path)
    settings = _adapter_settings(path)
    dotted = {name: strip_prefixes(name) for name in modules if not KOHYA.match(name)}
    kohya = {name: KOHYA.sub("", name, count=1) for name in modules if KOHYA.match(name)}
    updates: list[Update] = []
    for names, separator in ((dotted, "."), (kohya, "_")):
        targets = [(name, role) for name in names for role in modules[name] if role not in ("down", "alpha")]
        parameters = [f"{names[name]}{separator}{'weight' if role == 'up' else role}" for name, role in targets]
        for (name, role), parameter in zip(targets, diffusers_names(parameters, separator)):
            part = modules[name]
            if role == "up":
                scale = _scale(part, names[name], settings, path)
                updates.append(LowRankUpdate(name, parameter, part["down"], part["up"], scale))
            else:
                updates.append(Difference(name, parameter, part[role]))
    return updates


def _select(content: dict, path: Path) -> StateDict:
    """The LoRA's tensors in what a file holds."""
    content = content.get("generator_lora", content)  # LongLive: beside those of a network that only training needs
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"{path} does not hold the tensors of a LoRA; is it the right file?")
    return content


def _by_module(tensors: StateDict, path: Path) -> dict[str, dict[str, Tensor]]:
    """Module names as in the file, each with the tensors that it has, by their role."""
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if UNSUPPORTED.search(str(key)):
            raise InputError(f"{path} is no plain LoRA ({key}), which is what is supported; use another file of it")
        match = KEY.fullmatch(str(key))
        if not match:
            raise InputError(f"{path} is no LoRA, or of an unknown layout: what {key} stands for is not known")
        role = next(role for role in ROLES if match[role])
        part = modules.setdefault(match["module"], {})
        if role in part:
            raise InputError(f"{path} holds the '{role}' of {match['module']} twice, under different names")
        if not tensor.float().isfinite().all():
            raise InputError(f"{path}: {key} holds a NaN or an infinity; download it again")
        part[role] = tensor
    for module, part in modules.items():
        if ("down" in part) != ("up" in part):
            there, lacking = ("down", "up") if "down" in part else ("up", "down")
            raise InputError(f"{path} is not whole: {module} has the '{there}' half of its pair and not '{lacking}'")
        if "alpha" in part and ("up" not in part or part["alpha"].numel() != 1):
            raise InputError(f"{path}: {module}.alpha is not the alpha of a pair")
        if "up" in part and not (part["down"].ndim > 1 < part["up"].ndim and part["down"].numel()):
            raise InputError(f"{path}: the pair of {module} is not two matrices")
    return modules


def _adapter_settings(path: Path) -> dict:
    """PEFT's settings of the LoRA at ``path``, such as ``lora_alpha``: from its metadata or from the file beside it."""
    text = safetensors_metadata(path).get("lora_adapter_metadata")
    if text is None:
        beside = path.with_name("adapter_config.json")
        settings = load_json(beside) if path.stem == "adapter_model" and beside.is_file() else {}
    else:
        metadata = parse_json(text, f"{path}: its lora_adapter_metadata")
        settings = {name.removeprefix("transformer."): value for name, value in metadata.items()}
    if not isinstance(settings.get("alpha_pattern") or {}, dict):
        raise InputError(f"{path}: its alpha_pattern is no JSON object; use another file of it")
    if settings.get("use_dora"):
        raise InputError(f"{path} is no plain LoRA (use_dora), which is what is supported; use another file of it")
    return settings


def _scale(part: dict[str, Tensor], module: str, settings: dict, path: Path) -> float | None:
    """alpha / rank of a pair; None where neither the pair nor ``settings`` has an alpha."""
    rank = part["down"].shape[0]
    if "alpha" in part:
        return part["alpha"].item() / rank
    alpha = settings.get("lora_alpha")
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if not re.fullmatch(r"[\w.]+", name):
            raise InputError(f"{path}: alpha_pattern '{pattern}' is no module's name, which is what is supported")
        if f".{module}".endswith(f".{name}"):
            alpha = value
            break
    if alpha is None:
        return None
    if not isinstance(alpha, int | float):
        raise InputError(f"{path}: its alpha for {module} is no number; use another file of it")
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


@torch.no_grad()
def merge_lora(model: nn.Module, path: str | Path, strength: float = 1.0, adapter: dict | None = None) -> list[str]:
    """Add a LoRA to the float weights of ``model``, a Wan transformer, for good.

    Sums are in float32 and are rounded once, to the weight's dtype. Each weight is replaced when its turn comes, so that
    beside the model there is one weight's worth of memory at a time; files that weights are mapped from stay as they are.

    Args:
        model: with diffusers' names, on any device.
        path: see ``read_lora``.
        strength: factor of everything that is added.
        adapter: ``rank`` and ``alpha`` of LoRAs of that rank whose file does not say an alpha (LongLive's config).

    Returns:
        The names of the modules that changed.

    Raises InputError, and leaves ``model`` as it was, where the file is damaged or does not fit the model.
    """
    if not math.isfinite(strength):
        raise InputError(f"the strength of {path} must be a number, not {strength}")
    if any(name.rpartition(".")[2] == "qweight" for name, _ in model.named_buffers()):
        raise InputError(f"{path}: a LoRA comes before quantization; load it into the float model, then quantize")
    plan = _match(model, read_lora(path), Path(path))
    for parameter, updates in plan.values():
        weight = parameter.float()
        for update in updates:
            scale = _adapter_scale(adapter, update.rank) if update.scale is None else update.scale
            weight = weight.add(update.delta(weight.device).view_as(weight), alpha=strength * scale)
        parameter.data = weight.to(parameter.dtype)
    return sorted({name.rpartition(".")[0] for name in plan})


def _match(model: nn.Module, updates: list[Update], path: Path) -> dict[str, tuple[nn.Parameter, list[Update]]]:
    """The names of the parameters that change, each with the parameter and what is added to it."""
    parameters = dict(model.named_parameters())
    underscored = {name.replace(".", "_"): name for name in parameters}
    plan: dict[str, tuple[nn.Parameter, list[Update]]] = {}
    unmatched = [u.name for u in updates if u.parameter not in parameters and u.parameter not in underscored]
    if unmatched:
        counted = f"{len(unmatched)} of {len(updates)} parts match nothing in this model, such as {unmatched[0]}"
        raise InputError(f"{path}: {counted}; it is a LoRA for another model")
    for update in updates:
        name = update.parameter if update.parameter in parameters else underscored[update.parameter]
        parameter = parameters[name]
        if parameter.is_meta:
            raise InputError(f"{path}: a LoRA is merged into weights; load a checkpoint first")
        if complaint := update.complaint(parameter):
            raise InputError(f"{path}: {update.name} does not fit ({complaint}); it is a LoRA for another model")
        plan.setdefault(name, (parameter, []))[1].append(update)
    return plan


def _adapter_scale(adapter: dict | None, rank: int) -> float:
    """alpha / rank of a LoRA of ``rank`` by a config's ``adapter``; 1 where that is of another rank or has no alpha."""
    adapter = adapter or {}
    applies = adapter.get("alpha") is not None and adapter.get("rank", rank) == rank
    return adapter["alpha"] / rank if applies else 1.0
