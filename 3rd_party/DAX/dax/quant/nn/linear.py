"""What both quantized Linear layers share: the stored weight, how it moves and loads, and the product."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from dax.quant import functional as QF
from dax.quant.qscheme import per_channel_symmetric


def check_device(dtype: torch.dtype, device: torch.device) -> None:
    """Raises RuntimeError if `device` is a GPU that cannot multiply `dtype`."""
    if dtype == torch.int8 or device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        raise RuntimeError(
            f"fp8 needs a GPU of compute capability 8.9 or more; {device} has {capability[0]}.{capability[1]}: use int8"
        )


class QuantizedLinear(nn.Module):
    """y = x Wᵀ + b with W in 8 bits. For inference: no gradient flows through it.

    Buffers: `qweight` [out, in] in `qconfig.dtype`; `weight_scale` float32, [out, 1] per channel or [1, 1] per tensor.
    Moving the module moves them; casting it (`.half()`, `.to(torch.bfloat16)`) casts `bias` alone.
    Subclasses say how the activation is quantized: `quantize_input`.
    """

    def __init__(self, in_features, out_features, bias=True, *, qconfig, device=None, dtype=None):
        super().__init__()
        self.in_features, self.out_features, self.qconfig = in_features, out_features, qconfig
        scales = out_features if qconfig.weight_scheme is per_channel_symmetric else 1
        self.register_buffer("qweight", torch.zeros(out_features, in_features, dtype=qconfig.dtype, device=device))
        self.register_buffer("weight_scale", torch.ones(scales, 1, dtype=torch.float32, device=device))
        # The weight as the product wants it, where its shape is not that already. Never saved, and made again
        # whenever `qweight` is replaced.
        self.register_buffer("padded_qweight", None, persistent=False)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None
        self.dtype = dtype or torch.get_default_dtype()  # of the model around it; nothing stored has it without a bias
        self._pad()

    @classmethod
    @torch.no_grad()
    def from_float(cls, linear: nn.Linear, qconfig) -> "QuantizedLinear":
        """The quantized twin of `linear`, on its device (meta included). The two share the bias.

        Raises ValueError for a weight that is not finite, RuntimeError where its device cannot multiply the type.
        """
        weight = linear.weight.detach()
        check_device(qconfig.dtype, weight.device)
        if not weight.is_meta and not weight.abs().amax().isfinite():
            raise ValueError("the weight holds a NaN or an infinity")
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
    def fuse(cls, linears: "list[QuantizedLinear]") -> "QuantizedLinear":
        """One layer [out₁+out₂+…, in] for several that read the same input, so that it takes one product.

        The originals' weights, biases and per-channel scales become views of the new layer's: no memory is added, what
        is loaded into them reaches it, and what they compute and save stays as it was. A per-tensor scale is copied,
        once for each channel. Fuse again after moving the originals, after `load_state_dict(assign=True)`, and after
        any loading where scales are per tensor or a side of the weight is no multiple of 16.

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
            fused.bias = nn.Parameter(torch.cat(biases))
        fused._pad()
        for i, linear in enumerate(linears):
            linear.qweight = fused.qweight.split(widths)[i]
            if first.qconfig.weight_scheme is per_channel_symmetric:
                linear.weight_scale = fused.weight_scale.split(widths)[i]
            if linear.bias is not None:
                linear.bias.data = fused.bias.data.split(widths)[i]
        return fused.train(first.training)

    def _fuse_key(self):
        return type(self), self.qconfig, self.in_features, self.qweight.device

    @property
    def weight(self) -> Tensor:
        """The weight that the layer computes with, [out, in], in the model's float type: worked out on each access."""
        weight = self.qweight.float() * self.weight_scale
        return (QF.rotate(weight) if self.qconfig.rotation else weight).to(self.dtype)

    def quantize_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x` [..., in] → codes and scale for `forward_quantized`, here or in any layer of the same qconfig."""
        raise NotImplementedError

    def forward_quantized(self, xq: Tensor, x_scale: Tensor, out_dtype: torch.dtype) -> Tensor:
        """`forward` for an input quantized before: [..., in] → [..., out] in `out_dtype`."""
        return QF.linear(
            xq, x_scale, self.qweight, self.weight_scale, self.bias, out_dtype, padded_wq=self.padded_qweight
        )

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., in] of any float type → [..., out] of the same type."""
        xq, x_scale = self.quantize_input(x)
        return self.forward_quantized(xq, x_scale, x.dtype)

    def _pad(self) -> None:
        padded = QF.pad_weight(self.qweight)
        self.padded_qweight = None if padded is self.qweight else padded

    def _apply(self, fn, recurse=True):
        # `.half()` and `.to(dtype)` cast every floating buffer, fp8 codes and float32 scales too: move, never cast.
        buffers = {id(buffer) for buffer in self.buffers()}

        def move(tensor):
            if id(tensor) in buffers and (probe := fn(tensor.new_empty(0))).dtype != tensor.dtype:
                return tensor.to(probe.device)
            return fn(tensor)

        super()._apply(move, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.qweight.device)).dtype
        check_device(self.qweight.dtype, self.qweight.device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        for name, buffer in self.named_buffers():
            given = state_dict.get(prefix + name, buffer)
            if given.dtype != buffer.dtype:  # a copy would cast the codes of one type to those of another
                errors.append(f"{prefix}{name} is {given.dtype}, this model's is {buffer.dtype}")
                return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        self._pad()

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.qconfig}"
