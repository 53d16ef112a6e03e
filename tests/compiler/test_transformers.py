"""torch's transformer layers are traced into, and the graph computes what they compute."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

import frfx
from frfx.compiler.trace import trace
from frfx.view import evaluation_view
from tests.oracles import normal

LATER = torch.ones(5, 5, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 1, 0, 0]], dtype=torch.bool)


class Encode(nn.Module):
    """An encoder, or one of its layers, with masks."""

    def __init__(self, encoder, **masks):
        super().__init__()
        self.encoder = encoder
        self.names = tuple(masks)
        for name, value in masks.items():
            self.register_buffer(name, value)

    def forward(self, x):
        return self.encoder(x, **{name: getattr(self, name) for name in self.names})


class Decode(nn.Module):
    """A decoder, or one of its layers, which attends to a function of its input."""

    def __init__(self, decoder, **masks):
        super().__init__()
        self.decoder, self.masks = decoder, masks

    def forward(self, x):
        return self.decoder(x, torch.tanh(x), **self.masks)


class Padded(nn.Module):
    """An encoder whose mask is computed from its input."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x):
        return self.encoder(x, src_key_padding_mask=x[:, :, 0] > 0.5)


class Branching(nn.Module):
    """Cannot be traced."""

    def forward(self, x):
        return x if x.sum() > 0 else -x


def layer(kind=nn.TransformerEncoderLayer, **options):
    torch.manual_seed(0)
    return kind(8, 2, 16, **{"batch_first": True, "dtype": torch.float64, **options})


def encoder(**options):
    return nn.TransformerEncoder(layer(**options), 2, norm=nn.LayerNorm(8, dtype=torch.float64))


def decoder():
    return nn.TransformerDecoder(layer(nn.TransformerDecoderLayer), 2)


NETWORKS = {
    "layer": lambda: Encode(layer()),
    "norm first": lambda: Encode(layer(norm_first=True)),
    "gelu": lambda: Encode(layer(activation="gelu")),
    "no bias": lambda: Encode(layer(bias=False)),
    "L, N, E": lambda: Encode(layer(batch_first=False)),
    "masked layer": lambda: Encode(layer(), src_mask=LATER, src_key_padding_mask=PADDING),
    "encoder": lambda: Encode(encoder()),
    "without norm": lambda: Encode(nn.TransformerEncoder(layer(), 2)),
    "masked encoder": lambda: Encode(encoder(), mask=LATER.roll(1, 0)),
    "causal encoder": lambda: Encode(encoder(), mask=LATER),
    "padded encoder": lambda: Encode(encoder(), src_key_padding_mask=PADDING),
    "decoder layer": lambda: Decode(layer(nn.TransformerDecoderLayer)),
    "decoder": lambda: Decode(decoder()),
    "causal decoder": lambda: Decode(decoder(), tgt_mask=LATER, tgt_is_causal=True),
    "decoder that looks back": lambda: Decode(decoder(), memory_mask=LATER),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_the_graph_computes_what_the_model_computes(make):
    model = make().eval().requires_grad_(False)
    x = normal(0, 5, 2, 8) if make is NETWORKS["L, N, E"] else normal(0, 2, 5, 8)
    traced = trace(evaluation_view(model))
    opaque = (nn.TransformerEncoder, nn.TransformerDecoder, nn.TransformerEncoderLayer)
    modules = [
        traced.root.get_submodule(n.target) for n in traced.graph.nodes if n.op == "call_module"
    ]
    assert any(isinstance(module, nn.MultiheadAttention) for module in modules)
    assert not any(isinstance(module, opaque) for module in modules)
    output = fx.Interpreter(traced.root, graph=traced.graph).run(x)
    torch.testing.assert_close(output, model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_the_layers_inside_have_names():
    found = frfx.layers(Encode(encoder(norm_first=True)).eval(), normal(0, 2, 5, 8))
    names = {row.name for row in found}
    assert {"encoder.layers.0.self_attn", "encoder.layers.1.linear2", "encoder.norm"} <= names


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("kind", [layer, encoder])
def test_masks_that_come_with_the_samples_leave_layers_whole(kind):
    model, x = Padded(kind()).eval().requires_grad_(False), normal(0, 2, 5, 8)
    traced = trace(evaluation_view(model))
    modules = [
        traced.root.get_submodule(n.target) for n in traced.graph.nodes if n.op == "call_module"
    ]
    assert any(isinstance(module, nn.TransformerEncoderLayer) for module in modules)
    output = fx.Interpreter(traced.root, graph=traced.graph).run(x)
    torch.testing.assert_close(output, model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_a_stack_with_hooks_stays_whole():
    model, x = Encode(encoder()).eval().requires_grad_(False), normal(0, 2, 5, 8)
    model.encoder.register_forward_hook(lambda module, args, output: output * 2)
    traced = trace(evaluation_view(model))
    (node,) = (node for node in traced.graph.nodes if node.op == "call_module")
    assert node.target == "encoder"
    output = fx.Interpreter(traced.root, graph=traced.graph).run(x)
    torch.testing.assert_close(output, model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("enabled", [True, False])
def test_tracing_leaves_the_fused_kernels_as_they_are(enabled):
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        trace(evaluation_view(Encode(layer()).eval()))
        assert torch.backends.mha.get_fastpath_enabled() is enabled
        with pytest.raises(frfx.TraceError):
            trace(evaluation_view(Branching()))
        assert torch.backends.mha.get_fastpath_enabled() is enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
