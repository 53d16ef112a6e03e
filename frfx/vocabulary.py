"""The op vocabulary: every op that rules may speak of, and all its spellings.

A spelling is matched by object: the module class (exactly, not its subclasses), the function, the
method's name, and the ATen overload that `torch.export` leaves. What belongs to packages that frfx
does not import is matched by name, ``"package.module:name"``. In-place spellings are rewritten by
the tracer, so they do not occur here.
"""

from __future__ import annotations

import operator

import torch
from torch import nn
from torch.nn import functional as F

from frfx.ops import OpType, define, spell

aten = torch.ops.aten

linear = define(
    "linear",
    "input, weight, bias=None, **_",
    [nn.Linear, F.linear, aten.linear.default],
    parametric=True,
)
conv = define(
    "conv",
    "input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, "
    "padding_mode='zeros', **_",
    [nn.Conv1d, nn.Conv2d, nn.Conv3d, F.conv1d, F.conv2d, F.conv3d]
    + [aten.conv1d.default, aten.conv2d.default, aten.conv3d.default]
    + [aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding],
    parametric=True,
)
conv_transpose = define(
    "conv_transpose",
    "input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1, **_",
    [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]
    + [F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d]
    + [aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input],
    parametric=True,
)
batch_norm = define(
    "batch_norm",
    "input, running_mean, running_var, weight=None, bias=None, training=False, "
    "momentum=0.1, eps=1e-5, **_",
    [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, F.batch_norm],
)
layer_norm = define(
    "layer_norm",
    "input, normalized_shape, weight=None, bias=None, eps=1e-5, **_",
    [nn.LayerNorm, F.layer_norm],
)
spell(
    layer_norm,
    [torch.layer_norm, aten.layer_norm.default],
    "input, normalized_shape, weight=None, bias=None, eps=1e-5, _=True",
)
group_norm = define(
    "group_norm",
    "input, num_groups, weight=None, bias=None, eps=1e-5, **_",
    [nn.GroupNorm, F.group_norm],
)
spell(
    group_norm,
    [torch.group_norm, aten.group_norm.default],
    "input, num_groups, weight=None, bias=None, eps=1e-5, _=True",
)
instance_norm = define(
    "instance_norm",
    "input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, "
    "momentum=0.1, eps=1e-5, **_",
    [nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, F.instance_norm],
)
spell(
    instance_norm,
    [torch.instance_norm, aten.instance_norm.default],
    "input, weight, bias, running_mean, running_var, use_input_stats, momentum, eps, _",
)
rms_norm = define(
    "rms_norm",
    "input, normalized_shape, weight=None, eps=None",
    [nn.RMSNorm, F.rms_norm, torch.rms_norm, aten.rms_norm.default],
)
dropout = define(
    "dropout",
    "input, p=0.5, training=True, **_",
    [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout]
    + [F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout]
    + [aten.dropout.default],
)
stochastic_depth = define(
    "stochastic_depth",
    "input, p, mode, training=True",
    ["torchvision.ops.stochastic_depth:StochasticDepth"]
    + ["torchvision.ops.stochastic_depth:stochastic_depth"],
)
identity = define(
    "identity",
    "input, *_, **__",
    [nn.Identity, "contiguous", "clone", "detach", torch.clone, torch.detach]
    + [aten.clone.default, aten.alias.default, aten.detach.default, aten.contiguous.default],
)

max_pool = define(
    "max_pool",
    "input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, "
    "return_indices=False, **_",
    [nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d]
    + [torch.max_pool1d, torch.max_pool2d, torch.max_pool3d]
    + [aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default],
)
adaptive_max_pool = define(
    "adaptive_max_pool",
    "input, output_size, return_indices=False, **_",
    [nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d]
    + [F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d],
)
# These return the indices whatever they are told. The tracer replaces them where nobody reads them.
spell(
    max_pool,
    [F.max_pool1d_with_indices, F.max_pool2d_with_indices, F.max_pool3d_with_indices]
    + [torch.max_pool1d_with_indices, aten.max_pool1d_with_indices.default]
    + [aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default],
    "input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, _=None, "
    "indices=True, **__",
)
spell(
    adaptive_max_pool,
    [F.adaptive_max_pool1d_with_indices, F.adaptive_max_pool2d_with_indices]
    + [F.adaptive_max_pool3d_with_indices, torch.adaptive_max_pool1d]
    + [aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default]
    + [aten.adaptive_max_pool3d.default],
    "input, output_size, _=None, indices=True, **__",
)
avg_pool = define(
    "avg_pool",
    "input, kernel_size, stride=None, padding=0, ceil_mode=False, "
    "count_include_pad=True, divisor_override=None, **_",
    [nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d]
    + [aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default],
)
adaptive_avg_pool = define(
    "adaptive_avg_pool",
    "input, output_size, **_",
    [nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d]
    + [F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d]
    + [aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default]
    + [aten.adaptive_avg_pool3d.default],
)
mean = define(
    "mean",
    "input, dim=None, keepdim=False, **_",
    [torch.mean, "mean", aten.mean.dim],
)

interpolate = define(
    "interpolate",
    "input, size=None, scale_factor=None, mode='nearest', align_corners=None, "
    "recompute_scale_factor=None, antialias=False, **_",
    [nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, F.interpolate],
)
for _name, _mode in {
    **{f"upsample_nearest{d}d": "nearest" for d in (1, 2, 3)},
    **{f"_upsample_nearest_exact{d}d": "nearest-exact" for d in (1, 2, 3)},
}.items():
    spell(
        interpolate,
        [getattr(aten, _name).vec],
        f"input, size=None, scale_factor=None, mode={_mode!r}, align_corners=None, "
        "recompute_scale_factor=None, antialias=False",
    )
for _name, _mode, _antialias in (
    ("upsample_linear1d", "linear", False),
    ("upsample_bilinear2d", "bilinear", False),
    ("upsample_trilinear3d", "trilinear", False),
    ("upsample_bicubic2d", "bicubic", False),
    ("_upsample_bilinear2d_aa", "bilinear", True),
    ("_upsample_bicubic2d_aa", "bicubic", True),
):
    spell(
        interpolate,
        [getattr(aten, _name).vec],
        f"input, size=None, align_corners=False, scale_factor=None, mode={_mode!r}, "
        f"recompute_scale_factor=None, antialias={_antialias}",
    )

pad = define(
    "pad",
    "input, pad, mode='constant', value=None",
    [F.pad, aten.pad.default],
)
spell(
    pad,
    [torch.constant_pad_nd, aten.constant_pad_nd.default],
    "input, pad, value=0, mode='constant'",
)
for _dims in (1, 2, 3):
    for _kind, _mode in (
        ("ZeroPad", "constant"),
        ("ConstantPad", "constant"),
        ("ReflectionPad", "reflect"),
        ("ReplicationPad", "replicate"),
        ("CircularPad", "circular"),
    ):
        spell(pad, [getattr(nn, f"{_kind}{_dims}d")], f"input, padding, mode={_mode!r}, value=None")

pixel_shuffle = define(
    "pixel_shuffle",
    "input, upscale_factor",
    [nn.PixelShuffle, F.pixel_shuffle, aten.pixel_shuffle.default],
)
pixel_unshuffle = define(
    "pixel_unshuffle",
    "input, downscale_factor",
    [nn.PixelUnshuffle, F.pixel_unshuffle, aten.pixel_unshuffle.default],
)
channel_shuffle = define(
    "channel_shuffle",
    "input, groups",
    [nn.ChannelShuffle, F.channel_shuffle, torch.channel_shuffle, aten.channel_shuffle.default],
)

reshape = define(
    "reshape",
    "input, *shape, **_",
    [nn.Flatten, nn.Unflatten, torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze]
    + ["flatten", "reshape", "view", "squeeze", "unsqueeze", "unflatten", torch.unflatten]
    + ["ravel", torch.ravel]
    + [aten.flatten.using_ints, aten.view.default, aten.reshape.default, aten._unsafe_view.default]
    + [aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default],
)
spell(reshape, ["view_as", "reshape_as", aten.view_as.default], "input, _")
permute = define("permute", "input, *dims, **_", [torch.permute, "permute", aten.permute.default])
transpose = define(
    "transpose",
    "input, dim0, dim1",
    [torch.transpose, torch.swapaxes, torch.swapdims, "transpose", "swapaxes", "swapdims"]
    + [aten.transpose.int],
)

movedim = define(
    "movedim",
    "input, source, destination",
    [torch.movedim, torch.moveaxis, "movedim", "moveaxis"]
    + [aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist],
)
roll = define("roll", "input, shifts, dims=()", [torch.roll, "roll", aten.roll.default])
flip = define("flip", "input, *dims, **_", [torch.flip, "flip", aten.flip.default])
rot90 = define("rot90", "input, k=1, dims=(0, 1)", [torch.rot90, "rot90", aten.rot90.default])
cast = define(
    "cast",
    "input, *args, **kwargs",
    ["to", "type_as", "float", "double", "half", "bfloat16"]
    + [aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.other]
    + [aten.type_as.default],
)

cat = define(
    "cat",
    "tensors, dim=0, **_",
    [torch.cat, torch.concat, torch.concatenate, aten.cat.default, aten.concat.default],
)
stack = define("stack", "tensors, dim=0, **_", [torch.stack, aten.stack.default])
chunk = define(
    "chunk",
    "input, chunks, dim=0",
    [torch.chunk, "chunk", aten.chunk.default],
    several=True,
)
split = define(
    "split",
    "input, split_size, dim=0",
    [torch.split, torch.split_with_sizes, "split", "split_with_sizes"]
    + [aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default],
    several=True,
)
tensor_split = define(
    "tensor_split",
    "input, indices_or_sections, dim=0",
    [torch.tensor_split, "tensor_split", aten.tensor_split.sections, aten.tensor_split.indices],
    several=True,
)
unbind = define("unbind", "input, dim=0", [torch.unbind, "unbind", aten.unbind.int], several=True)
getitem = define("getitem", "input, index", [operator.getitem, "__getitem__"])
spell(getitem, [aten.index.Tensor], "input, indices")
spell(getitem, [aten.slice.Tensor], "input, dim=0, start=None, end=None, step=1")
select = define("select", "input, dim, index", [torch.select, "select", aten.select.int])
index_select = define(
    "index_select",
    "input, dim, index",
    [torch.index_select, "index_select", aten.index_select.default],
)
narrow = define(
    "narrow", "input, dim, start, length", [torch.narrow, "narrow", aten.narrow.default]
)
expand = define(
    "expand",
    "input, *size, **_",
    ["expand", "broadcast_to", torch.broadcast_to]
    + [aten.expand.default, aten.broadcast_to.default],
)
spell(expand, ["expand_as", aten.expand_as.default], "input, _")
repeat = define(
    "repeat",
    "input, *repeats, **_",
    ["repeat", "tile", torch.tile, aten.repeat.default, aten.tile.default],
)
repeat_interleave = define(
    "repeat_interleave",
    "input, repeats, dim=None, **_",
    [torch.repeat_interleave, "repeat_interleave", aten.repeat_interleave.self_int],
)

patch_merging = define(
    "patch_merging",
    "input",
    ["torchvision.models.swin_transformer:_patch_merging_pad"],
)

add = define(
    "add",
    "input, other, alpha=1, **_",
    [operator.add, torch.add, "add", aten.add.Tensor, aten.add.Scalar],
)
sub = define(
    "sub",
    "input, other, alpha=1, **_",
    [operator.sub, torch.sub, torch.subtract, "sub", aten.sub.Tensor, aten.sub.Scalar],
)
spell(
    sub,
    [torch.rsub, aten.rsub.Scalar, aten.rsub.Tensor],
    "other, input, alpha=1, **_",
)
mul = define(
    "mul",
    "input, other, **_",
    [operator.mul, torch.mul, torch.multiply, "mul", aten.mul.Tensor, aten.mul.Scalar],
)
div = define(
    "div",
    "input, other, rounding_mode=None, **_",
    [operator.truediv, torch.div, torch.divide, torch.true_divide, "div"]
    + [aten.div.Tensor, aten.div.Scalar],
)
neg = define("neg", "input", [operator.neg, torch.neg, "neg", aten.neg.default])

matmul = define(
    "matmul",
    "input, other",
    [operator.matmul, torch.matmul, torch.linalg.matmul, "matmul", aten.matmul.default],
)
spell(
    matmul,
    [torch.mm, torch.bmm, "mm", "bmm", aten.mm.default, aten.bmm.default],
    "input, mat2",
)
addmm = define(
    "addmm",
    "input, mat1, mat2, beta=1, alpha=1",
    [torch.addmm, "addmm", aten.addmm.default],
)
spell(
    addmm,
    [torch.baddbmm, "baddbmm", aten.baddbmm.default],
    "input, batch1, batch2, beta=1, alpha=1",
)
einsum = define(
    "einsum",
    "equation, left, right=None, *others, **_",
    [torch.einsum],
)
spell(einsum, [aten.einsum.default], "equation, left, path=None")
scaled_dot_product_attention = define(
    "scaled_dot_product_attention",
    "query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, "
    "enable_gqa=False",
    [F.scaled_dot_product_attention, aten.scaled_dot_product_attention.default],
)
multi_head_attention = define(
    "multi_head_attention",
    "query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None, "
    "average_attn_weights=True, is_causal=False",
    [nn.MultiheadAttention],
    several=True,
)
shifted_window_attention = define(
    "shifted_window_attention",
    "input, qkv_weight, proj_weight, relative_position_bias, window_size, num_heads, shift_size, "
    "attention_dropout=0.0, dropout=0.0, qkv_bias=None, proj_bias=None, logit_scale=None, "
    "training=True",
    ["torchvision.models.swin_transformer:shifted_window_attention"],
)

argmax = define(
    "argmax",
    "input, dim=None, keepdim=False, **_",
    [torch.argmax, "argmax", aten.argmax.default],
)
softmax = define(
    "softmax",
    "input, dim=None, *_, **__",
    [nn.Softmax, nn.Softmax2d, F.softmax, torch.softmax, "softmax", aten.softmax.int]
    + [aten._softmax.default],
)
log_softmax = define(
    "log_softmax",
    "input, dim=None, *_, **__",
    [nn.LogSoftmax, F.log_softmax, torch.log_softmax, "log_softmax", aten.log_softmax.int]
    + [aten._log_softmax.default],
)

relu = define("relu", "input, **_", [nn.ReLU, F.relu, torch.relu, "relu", aten.relu.default])
leaky_relu = define(
    "leaky_relu",
    "input, negative_slope=0.01, **_",
    [nn.LeakyReLU, F.leaky_relu, aten.leaky_relu.default],
)
prelu = define(
    "prelu",
    "input, weight",
    [nn.PReLU, F.prelu, torch.prelu, "prelu", aten.prelu.default],
)
elu = define("elu", "input, alpha=1.0, **_", [nn.ELU, F.elu, aten.elu.default])
selu = define("selu", "input, **_", [nn.SELU, F.selu, torch.selu, aten.selu.default])
celu = define("celu", "input, alpha=1.0, **_", [nn.CELU, F.celu, torch.celu, aten.celu.default])
softplus = define(
    "softplus",
    "input, beta=1.0, threshold=20.0",
    [nn.Softplus, F.softplus, aten.softplus.default],
)
softsign = define("softsign", "input", [nn.Softsign, F.softsign])
logsigmoid = define("logsigmoid", "input", [nn.LogSigmoid, F.logsigmoid, aten.log_sigmoid.default])
hardtanh = define(
    "hardtanh",
    "input, min_val=-1.0, max_val=1.0, **_",
    [nn.Hardtanh, F.hardtanh, aten.hardtanh.default],
)
clamp = define(
    "clamp",
    "input, min=None, max=None, **_",
    [torch.clamp, torch.clip, "clamp", "clip", aten.clamp.default],
)
relu6 = define("relu6", "input, **_", [nn.ReLU6, F.relu6, aten.relu6.default])
hardsigmoid = define(
    "hardsigmoid",
    "input, **_",
    [nn.Hardsigmoid, F.hardsigmoid, aten.hardsigmoid.default],
)
sigmoid = define(
    "sigmoid",
    "input, **_",
    [nn.Sigmoid, F.sigmoid, torch.sigmoid, torch.special.expit, "sigmoid", aten.sigmoid.default],
)
silu = define("silu", "input, **_", [nn.SiLU, F.silu, aten.silu.default])
gelu = define("gelu", "input, approximate='none', **_", [nn.GELU, F.gelu, aten.gelu.default])
mish = define("mish", "input, **_", [nn.Mish, F.mish, aten.mish.default])
hardswish = define("hardswish", "input, **_", [nn.Hardswish, F.hardswish, aten.hardswish.default])


def _unary(name: str, *aliases: str, module: type[nn.Module] | None = None) -> OpType:
    """Define a function of one tensor under all its names in torch, as function and as method."""
    spellings: list = [] if module is None else [module]
    for alias in (name, *aliases):
        spellings += [getattr(torch, alias), alias]
        if hasattr(F, alias):
            spellings.append(getattr(F, alias))
    return define(name, "input, **_", [*spellings, getattr(aten, name).default])


tanh = _unary("tanh", module=nn.Tanh)
atan = _unary("atan", "arctan")
sin = _unary("sin")
sinh = _unary("sinh")
asinh = _unary("asinh", "arcsinh")
absolute = _unary("abs", "absolute")
spell(absolute, [operator.abs])

max_over = define(
    "max", "input, dim=None, keepdim=False", [torch.max, "max", aten.max.dim], several=True
)
min_over = define(
    "min", "input, dim=None, keepdim=False", [torch.min, "min", aten.min.dim], several=True
)
amax = define("amax", "input, dim=(), keepdim=False", [torch.amax, "amax", aten.amax.default])
amin = define("amin", "input, dim=(), keepdim=False", [torch.amin, "amin", aten.amin.default])

region = define("region", "input, *_", [])
"""A part of the network that is inverted as one op; no program spells it."""

HEADS = (softmax, log_softmax, argmax)
"""Op types that may close a classifier after its logits: labels pass through them unchanged."""
