"""What both quantized Linear layers share: the stored weight, how it moves and loads, the product and its gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dax.quant import functional as QF
from dax.quant.devices import check_device
from dax.quant.qscheme import per_channel_symmetric

if TYPE_CHECKING:
    from typing import Self

    from dax.quant.quantization.qconfig import QConfig


class StraightThrough(torch.autograd.Function):
    """A quantized layer's output with the gradient of the float Linear that holds the dequantized weight.

    Rounding has no useful derivative, so it counts as the identity (Bengio et al., arXiv 1308.3432).
    """

    @staticmethod
    def forward(
        compute: Callable[[Tensor], Tensor],
        x: Tensor,
        bias: Tensor | None,
        qweight: Tensor,
        weight_scale: Tensor,
        rotation: bool,
    ) -> Tensor:
        return compute(x).clone()  # of a view, what follows could not be computed in place

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, _, bias, qweight, weight_scale, ctx.rotation = inputs
        ctx.save_for_backward(qweight, weight_scale)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        rows = grad_y.reshape(-1, grad_y.shape[-1])
        grad_x = grad_bias = None
        if ctx.needs_input_grad[1]:
            qweight, weight_scale = ctx.saved_tensors
            weight = dequantize_weight(qweight, weight_scale, ctx.rotation, grad_y.dtype)
            grad_x = (rows @ weight).view(*grad_y.shape[:-1], weight.shape[1])
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0).to(ctx.bias_dtype)
        return None, grad_x, grad_bias, None, None, None


def dequantize_weight(qweight: Tensor, weight_scale: Tensor, rotation: bool, dtype: torch.dtype) -> Tensor:
    """Return the float weight [out, in] that `qweight` and `weight_scale` stand for, in `dtype`."""
    weight = qweight.float() * weight_scale
    return (QF.rotate(weight) if rotation else weight).to(dtype)


def is_empty(x: Tensor) -> bool:
    """Return whether `x` has no element, which reductions and kernels refuse; False in a trace, which would keep it."""
    return not torch.jit.is_tracing() and x.numel() == 0


class QuantizedLinear(nn.Module):
    """y = x Wᵀ + b with W in 8 bits: an `nn.Linear` whose weight is frozen.

    Buffers: `qweight` [out, in] in `qconfig.dtype`; `weight_scale` float32, [out, 1] per channel or [1, 1] per tensor.
    Moving the module moves them; casting it (`.half()`, `.to(torch.bfloat16)`) casts `bias` alone.

    Gradients flow to the input and to `bias` as through a float Linear that holds the dequantized weight. Under
    autocast the output has the type that a float Linear's has.

    Subclasses say how the activation is quantized: `quantize_input`.
    """

    qweight: Tensor
    weight_scale: Tensor
    padded_qweight: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        qconfig: QConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.qconfig = in_features, out_features, qconfig
        scales = out_features if qconfig.weight_scheme is per_channel_symmetric else 1
        self.register_buffer("qweight", torch.zeros(out_features, in_features, dtype=qconfig.dtype, device=device))
        self.register_buffer("weight_scale", torch.ones(scales, 1, dtype=torch.float32, device=device))
        # `qweight` padded to the shape that the product takes, if it needs padding. Never saved, and made again
        # whenever `qweight` is replaced.
        self.register_buffer("padded_qweight", None, persistent=False)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None
        self.dtype = dtype or torch.get_default_dtype()  # of `.weight`; without a bias no stored tensor has it
        self._pad()

    @classmethod
    def validate(cls, linear: nn.Linear, qconfig: QConfig) -> None:
        """Raises what `from_float` would raise, without quantizing.

        Raises:
            ValueError: the weight is empty, or holds a NaN or an infinity.
            RuntimeError: the weight's device cannot multiply the type.
        """
        weight = linear.weight.detach()
        check_device(qconfig.dtype, weight.device)
        if weight.numel() == 0:
            raise ValueError("the weight is empty")
        if not weight.is_meta and not torch.stack(weight.aminmax()).isfinite().all():
            raise ValueError("the weight holds a NaN or an infinity")

    @classmethod
    @torch.no_grad()
    def from_float(cls, linear: nn.Linear, qconfig: QConfig) -> Self:
        """Return `linear` quantized, on the same device (meta included). The two share the bias. Raises as `validate`."""
        cls.validate(linear, qconfig)
        weight = linear.weight.detach()
        per_channel = qconfig.weight_scheme is per_channel_symmetric
        biased = linear.bias is not None
        new = cls(linear.in_features, linear.out_features, biased, qconfig=qconfig, device="meta", dtype=weight.dtype)
        quantize = QF.quantize_per_token if per_channel else QF.quantize_per_tensor
        weight = QF.rotate(weight.float()) if qconfig.rotation else weight
        new.qweight, scale = quantize(weight.contiguous(), qconfig.dtype)
        new.weight_scale = scale.reshape(-1, 1)
        new.bias = linear.bias
        new._pad()
        return new.train(linear.training)

    @classmethod
    @torch.no_grad()
    def fuse(cls, linears: Sequence[Self]) -> Self:
        """Return one layer [out₁+out₂+…, in] for several that read the same input, so that it takes one product.

        The originals' weights, biases and per-channel scales become views of the new layer's: no memory is added, what
        is loaded into them reaches it, and what they compute and save stays as it was. A per-tensor scale is copied,
        once for each channel. Fuse again after moving the originals, after `load_state_dict(assign=True)`, after
        `set_process_group`, and after any loading where scales are per tensor or a side of the weight is no multiple
        of 16. It is for inference: the new layer's bias is a parameter of its own.

        Raises ValueError if the layers differ in anything but their width, values and bias.
        """
        first = linears[0]
        if any(other._fuse_key() != first._fuse_key() for other in linears):
            raise ValueError("fuse: the layers must agree in type, qconfig, in_features and device")
        widths = [linear.out_features for linear in linears]
        biased = next((linear.bias for linear in linears if linear.bias is not None), None)
        qconfig = replace(first.qconfig, weight_scheme=per_channel_symmetric)
        fused = cls(
            first.in_features, sum(widths), biased is not None, qconfig=qconfig, device="meta", dtype=first.dtype
        )
        fused.qweight = torch.cat([linear.qweight for linear in linears])
        fused.weight_scale = torch.cat([linear.weight_scale.expand(n, 1) for linear, n in zip(linears, widths)])
        if biased is not None:
            biases = [biased.new_zeros(n) if linear.bias is None else linear.bias for linear, n in zip(linears, widths)]
            fused.bias = nn.Parameter(torch.cat(biases), requires_grad=biased.requires_grad)
        fused._pad()
        for i, linear in enumerate(linears):
            linear.qweight = fused.qweight.split(widths)[i]
            if first.qconfig.weight_scheme is per_channel_symmetric:
                linear.weight_scale = fused.weight_scale.split(widths)[i]
            if linear.bias is not None and fused.bias is not None:
                linear.bias.data = fused.bias.data.split(widths)[i]
        return fused.train(first.training)

    def _fuse_key(self) -> tuple:
        return type(self), self.qconfig, self.in_features, self.qweight.device

    @property
    def weight(self) -> Tensor:
        """The dequantized weight [out, in] in the model's float type, computed on each access."""
        return dequantize_weight(self.qweight, self.weight_scale, self.qconfig.rotation, self.dtype)

    def quantize_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize `x` [..., in] to qdata and scale for `forward_quantized`, of this layer or any of the same qconfig.

        Raises RuntimeError if `x` is to get a gradient, which only `forward` gives.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("quantize_input gives no gradient: call the layer itself, or use torch.no_grad()")
        return self._quantize_input(x)

    def _quantize_input(self, x: Tensor, in_float: bool = False) -> tuple[Tensor, Tensor]:
        """Quantize; with `in_float` as in `functional.quantize`."""
        raise NotImplementedError

    def forward_quantized(self, xq: Tensor, x_scale: Tensor, out_dtype: torch.dtype) -> Tensor:
        """Compute `forward` for an input that `quantize_input` gave: [..., in] → [..., out] in `out_dtype`."""

        def compute(xq: Tensor) -> Tensor:
            weight, scale, padded = self.qweight, self.weight_scale, self.padded_qweight
            return QF.linear(xq, x_scale, weight, scale, self.bias, out_dtype, padded_wq=padded)

        return self._differentiable(compute, xq)

    def forward(self, input: Tensor) -> Tensor:
        """Map `input` [..., in] of any float type to [..., out] of the same type (under autocast, of autocast's).

        Raises RuntimeError if the last dimension is not `in_features`, or the type is no float type.
        """
        return self._differentiable(self._forward, self._checked(input))

    def _forward(self, x: Tensor) -> Tensor:
        if is_empty(x):
            return x.new_zeros(*x.shape[:-1], self.out_features)
        xq, x_scale = self._quantize_input(x, QF.float_product(self.qconfig.activation_dtype, x.device))
        return self.forward_quantized(xq, x_scale, x.dtype)

    def _checked(self, x: Tensor) -> Tensor:
        """Return `x` in the type that a float Linear would compute in. Raises as `forward`."""
        QF.check_width(x, self.qweight)
        if not x.is_floating_point():
            raise RuntimeError(f"input must be of a float type, but got {x.dtype}")
        if QF.in_autocast(x) and x.dtype != torch.float64:  # which autocast leaves alone
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return x

    def _differentiable(self, compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return `compute(x)`, with the gradients for `x` and the bias where they are wanted."""
        if not torch.is_grad_enabled() or not (x.requires_grad or (self.bias is not None and self.bias.requires_grad)):
            return compute(x)
        if torch.jit.is_tracing():  # TorchScript cannot hold a Python function
            return compute(x.detach())
        return StraightThrough.apply(compute, x, self.bias, self.qweight, self.weight_scale, self.qconfig.rotation)

    def share_weight(self, other: Self) -> None:
        """Hold the quantized weight of `other`, made from the same float weight, instead of a copy."""
        self.qweight, self.weight_scale, self.padded_qweight = other.qweight, other.weight_scale, other.padded_qweight

    def _pad(self) -> None:
        padded = QF.pad_weight(self.qweight)
        self.padded_qweight = None if padded is self.qweight else padded

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `.half()` and `.to(dtype)` cast every floating buffer, fp8 values and float32 scales too: move, never cast.
        buffers = {id(buffer) for buffer in self.buffers()}

        def move(tensor: Tensor) -> Tensor:
            if id(tensor) in buffers and (probe := fn(tensor.new_empty(0))).dtype != tensor.dtype:
                return tensor.to(probe.device)
            return fn(tensor)

        super()._apply(move, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.qweight.device)).dtype
        check_device(self.qweight.dtype, self.qweight.device)
        return self

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name, buffer in self.named_buffers():
            given = state_dict.get(prefix + name, buffer)
            if given.dtype != buffer.dtype:  # a copy would cast the values of one type to those of another
                error_msgs.append(f"{prefix}{name} is {given.dtype}, this model's is {buffer.dtype}")
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._pad()

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.qconfig}"
