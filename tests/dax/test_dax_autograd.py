"""Gradients: those of a float Linear that holds the dequantized weight."""

import pytest
import torch
import torch.nn.functional as F
from dax_layers import DYNAMIC, FP8_TOKEN, INT8_TOKEN, STATIC, both_types, every_device, seed  # noqa: F401
from test_dax_promises import every_layer, pair
from torch import nn

from dax.quant.quantization import quantize_dynamic


def twin(quantized):
    """Return the float Linear that holds the weight which `quantized` computes with."""
    linear = nn.Linear(quantized.in_features, quantized.out_features, device=quantized.qweight.device)
    linear.load_state_dict({"weight": quantized.weight.float(), "bias": quantized.bias})
    return linear


def gradients(function, layer, x, grad_y):
    """Return the gradients of `x` and of the layer's bias."""
    x = x.detach().requires_grad_()
    layer.bias.grad = None
    y = function(x)
    y.backward(grad_y.to(y.dtype))
    return x.grad, layer.bias.grad


@every_device
@every_layer
@pytest.mark.parametrize(
    "shape, compiled", [((64,), False), ((19, 64), False), ((2, 3, 64), False), ((2, 3, 64), True)]
)
def test_the_gradients_are_the_dequantized_linears(qconfig, shape, compiled, device):
    _, quantized = pair(64, 24, qconfig, device)
    linear = twin(quantized)
    torch.compiler.reset()
    call = torch.compile(quantized, fullgraph=True, backend="aot_eager") if compiled else quantized
    x, grad_y = torch.randn(shape, device=device), torch.randn(*shape[:-1], 24, device=device)
    torch.testing.assert_close(
        gradients(call, quantized, x, grad_y), gradients(linear, linear, x, grad_y), rtol=1e-4, atol=1e-5
    )
    with torch.no_grad():
        expected = quantized(x)
    assert call(x.requires_grad_()).detach().equal(expected)  # wanting gradients changes no value


@pytest.mark.parametrize("qconfig", DYNAMIC.values(), ids=DYNAMIC)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_gradient_goes_through_gelu(qconfig, compiled):
    _, quantized = pair(64, 24, qconfig)
    linear = twin(quantized)
    call = quantized.forward_gelu
    if compiled:
        torch.compiler.reset()
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
    x, grad_y = torch.randn(19, 64), torch.randn(19, 24)
    expected = gradients(lambda x: linear(F.gelu(x, approximate="tanh")), linear, x, grad_y)
    torch.testing.assert_close(gradients(call, quantized, x, grad_y), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("qconfig", [FP8_TOKEN, STATIC["static"]], ids=["dynamic", "static"])
def test_types_of_gradients(qconfig):
    _, quantized = pair(64, 24, qconfig, dtype=torch.bfloat16)
    x = torch.randn(5, 64, dtype=torch.bfloat16, requires_grad=True)
    quantized(x).sum().backward()
    assert x.grad.dtype == quantized.bias.grad.dtype == torch.bfloat16
    _, quantized = pair(64, 24, qconfig)
    linear = twin(quantized)
    x = torch.randn(5, 64)

    def amp(layer):
        def call(x):
            with torch.autocast("cpu", torch.bfloat16):
                return layer(x)

        return gradients(call, layer, x, torch.ones(5, 24))

    result, expected = amp(quantized), amp(linear)
    assert [grad.dtype for grad in result] == [grad.dtype for grad in expected] == [torch.float32] * 2
    torch.testing.assert_close(result, expected, rtol=0.05, atol=0.05)


@both_types
def test_an_adapter_trains_before_and_beside_quantized_layers(qconfig):
    """The loss falls as far as with the float twin: the gradients lead somewhere."""

    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.front, self.base = nn.Linear(32, 32), base
            self.down, self.up = nn.Linear(32, 4, bias=False), nn.Linear(4, 16, bias=False)
            nn.init.zeros_(self.up.weight)

        def forward(self, x):
            x = self.front(x)
            return self.base(x) + self.up(self.down(x))

    _, quantized = pair(32, 16, qconfig)
    quantized.requires_grad_(False)
    x, losses = torch.randn(64, 32), {}
    target = torch.tanh(x @ torch.randn(32, 16) / 5)
    for name, base in {"8-bit": quantized, "float": twin(quantized).requires_grad_(False)}.items():
        torch.manual_seed(1)
        model = Adapted(base)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(150):
            loss = F.mse_loss(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[name] = loss.item()
    assert losses["8-bit"] < 1.2 * losses["float"] + 1e-3


def test_what_follows_may_change_the_output_in_place():
    quantized = pair(16, 8, INT8_TOKEN)[1]
    x = torch.randn(3, 16, requires_grad=True)
    quantized(x).mul_(2).relu_().sum().backward()
    active = (quantized(x) > 0).float() * 2
    torch.testing.assert_close(x.grad, active @ quantized.weight)


@both_types
def test_gradients_where_only_some_are_wanted(qconfig):
    _, quantized = pair(16, 8, qconfig)
    x = torch.randn(3, 16)
    quantized(x).sum().backward()
    assert quantized.bias.grad.equal(torch.full((8,), 3.0))
    quantized.requires_grad_(False)
    assert not quantized(x).requires_grad
    quantized.bias.grad = None
    quantized(x.requires_grad_()).sum().backward()
    assert x.grad.abs().sum() > 0 and quantized.bias.grad is None
    with torch.no_grad():
        assert not quantized(x).requires_grad


@both_types
def test_second_derivatives(qconfig):
    _, quantized = pair(16, 8, qconfig)
    linear = twin(quantized)
    x = torch.randn(3, 16, requires_grad=True)
    results = []
    for layer in (quantized, linear):
        y = layer(x) if layer is linear else layer(x) - layer(x).detach() + linear(x).detach()  # the same values
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), x)[0])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


def test_what_has_no_gradient_says_so():
    _, quantized = pair(16, 8, FP8_TOKEN)
    x = torch.randn(3, 16, requires_grad=True)
    with pytest.raises(RuntimeError, match="call the layer itself"):
        quantized.quantize_input(x)
    xq, x_scale = quantized.quantize_input(x.detach())
    quantized.forward_quantized(xq, x_scale, torch.float32).sum().backward()
    assert quantized.bias.grad.equal(torch.full((8,), 3.0))


def test_a_whole_model_trains_compiled():
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    quantize_dynamic(model, {"2": FP8_TOKEN, "4": INT8_TOKEN})
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(7, 16)
    grads = []
    for call in (model, compiled):
        model.zero_grad()
        call(x).square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1])
    assert all(grad.abs().sum() > 0 for grad in grads[0])
