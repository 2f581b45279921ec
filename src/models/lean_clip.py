"""Leaner forward passes for the modules of OpenAI's CLIP: the same weights and features, fewer bytes moved and kept.

What a GPU loses most time and memory to in the clip package is not arithmetic but tensors written and read between
products. Here

- a BatchNorm whose statistics are frozen is carried by the convolution before it, which the ReLU after it follows in
  one operation; the BatchNorm's weight and bias go on learning (`Bottleneck`, `ModifiedResNet`);
- the weight and bias of a LayerNorm are carried by the linear layer after it, and QuickGELU's factors by the linear
  layers around it; what remains are the fused operations `layer_norm` and `silu`, which keep their input alone
  (`ResidualAttentionBlock`);
- attention takes batches first, so that heads are views instead of copies, and texts are masked by the kernel instead
  of by a table that is copied to the device in each block.

All of it is exact but for rounding.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.clip_package import (
    CLIP,
    Bottleneck,
    LayerNorm,
    ModifiedResNet,
    ResidualAttentionBlock,
    VisionTransformer,
)
from runtime.precision import product_type

QUICK_GELU = 1.702  # x * sigmoid(1.702 x) = silu(1.702 x) / 1.702


def make_lean(model: CLIP) -> CLIP:
    """Give the modules of a CLIP in eval mode the forward passes of this file, in place."""
    for module in model.modules():
        module.__class__ = LEAN.get(type(module), type(module))
    return model


class LeanCLIP(CLIP):
    """CLIP whose text encoder takes batches first and waits for nothing."""

    def encode_text(self, text: Tensor) -> Tensor:
        """Tokens (b, 77) -> features (b, D)."""
        x = self.token_embedding(text) + self.positional_embedding[: text.shape[1]]
        x = self.ln_final(self.transformer(x))  # (b, 77, W)
        ends = text.argmax(dim=1)  # the end of the text is the largest token
        return x[torch.arange(len(text), device=text.device), ends] @ self.text_projection


class LeanVisionTransformer(VisionTransformer):
    """The ViT with batches first."""

    def forward(self, x: Tensor) -> Tensor:
        """Images (b, 3, R, R) -> features (b, D)."""
        patches = self.conv1(x).flatten(2).transpose(1, 2)  # (b, L - 1, W)
        classes = self.class_embedding.to(patches.dtype).expand(len(x), 1, -1)
        x = torch.cat([classes, patches], dim=1) + self.positional_embedding.to(patches.dtype)
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj


class LeanBlock(ResidualAttentionBlock):
    """A block of either transformer, batches first. A block with a mask is one of the text encoder, and causal."""

    def forward(self, x: Tensor) -> Tensor:
        """(b, L, W) -> (b, L, W)."""
        attn, up, down = self.attn, self.mlp.c_fc, self.mlp.c_proj
        joint = _after_norm(x, self.ln_1, attn.in_proj_weight, bias=attn.in_proj_bias)  # (b, L, 3W)
        parts = joint.unflatten(-1, (3, attn.num_heads, -1)).transpose(1, 3)  # (b, heads, 3, L, d)
        query, key, value = parts.unbind(2)
        causal = self.attn_mask is not None
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        x = x + attn.out_proj(mixed.transpose(1, 2).flatten(2))
        hidden = _after_norm(
            x, self.ln_2, QUICK_GELU * up.weight, bias=QUICK_GELU * up.bias
        )  # (b, L, 4W)
        return x + silu_then_linear(hidden, down.weight / QUICK_GELU, down.bias)


def _after_norm(x: Tensor, norm: LayerNorm, weight: Tensor, *, bias: Tensor) -> Tensor:
    """`linear(norm(x), weight, bias)`. Means and variances are taken in float32, whatever the type of x."""
    with torch.autocast(x.device.type, enabled=False):
        normalised = F.layer_norm(x, norm.normalized_shape, eps=norm.eps)
        bias = bias + weight @ norm.bias
    return F.linear(normalised, weight * norm.weight, bias)


class LeanBottleneck(Bottleneck):
    """A residual block whose BatchNorms are carried by its convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        """(b, C, h, w) -> (b, 4 planes, h / stride, w / stride)."""
        identity = x
        if self.downsample is not None:
            pool, convolution, norm = self.downsample
            identity = F.conv2d(pool(x), *_carried(convolution, norm))
        out = convolution_then_relu(x, *_carried(self.conv1, self.bn1))
        out = convolution_then_relu(out, *_carried(self.conv2, self.bn2), padding=1)
        return convolution_then_relu(
            self.avgpool(out), *_carried(self.conv3, self.bn3), added=identity
        )


class LeanResNet(ModifiedResNet):
    """The ResNet whose BatchNorms are carried by its convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        """Images (b, 3, R, R) -> features (b, D)."""
        x = convolution_then_relu(x, *_carried(self.conv1, self.bn1), stride=2, padding=1)
        x = convolution_then_relu(x, *_carried(self.conv2, self.bn2), padding=1)
        x = convolution_then_relu(x, *_carried(self.conv3, self.bn3), padding=1)
        x = self.avgpool(x)
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
        return self.attnpool(x)


LEAN = {
    CLIP: LeanCLIP,
    VisionTransformer: LeanVisionTransformer,
    ResidualAttentionBlock: LeanBlock,
    ModifiedResNet: LeanResNet,
    Bottleneck: LeanBottleneck,
}


def _carried(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of one convolution that does what a convolution and its frozen BatchNorm do."""
    scale = norm.weight * (norm.get_buffer("running_var") + norm.eps).rsqrt()  # (channels,)
    weight = convolution.weight * scale[:, None, None, None]
    return weight, norm.bias - norm.get_buffer("running_mean") * scale


def _in_half(x: Tensor, *weights: Tensor | None) -> list[Tensor | None]:
    """Tensors in the type that products have here: autocast does not look into functions of our own."""
    dtype = product_type(x)
    return [tensor if tensor is None else tensor.to(dtype) for tensor in (x, *weights)]


def silu_then_linear(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`linear(silu(hidden), weight, bias)`, (..., H) -> (..., W), which keeps `hidden` for the backward pass alone."""
    if torch.compiler.is_compiling():
        return F.linear(F.silu(hidden), weight, bias)  # the compiler decides what is kept
    return _SiluThenLinear.apply(*_in_half(hidden, weight, bias))


class _SiluThenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias):
        ctx.save_for_backward(hidden, weight)
        return F.linear(F.silu(hidden), weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        hidden, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)  # (n, W)
        of_weight = rows.T @ F.silu(hidden).flatten(0, -2) if ctx.needs_input_grad[1] else None
        of_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        of_hidden = torch.ops.aten.silu_backward(gradient @ weight, hidden)
        return of_hidden, of_weight, of_bias


def convolution_then_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    added: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
) -> Tensor:
    """`relu(conv2d(x, weight, bias) + added)`, which keeps `x` and its own output for the backward pass alone."""
    if torch.compiler.is_compiling():
        out = F.conv2d(x, weight, bias, stride=stride, padding=padding)
        return F.relu(out if added is None else out + added)
    return _ConvolutionThenReLU.apply(*_in_half(x, weight, bias, added), stride, padding)


class _ConvolutionThenReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, added, stride, padding):
        shape: dict[str, Any] = {
            "stride": [stride, stride],
            "padding": [padding, padding],
            "dilation": [1, 1],
            "groups": 1,
        }
        if x.is_cuda and x.dtype != torch.float32:  # cuDNN does all of it in one kernel
            if added is None:
                out = torch.cudnn_convolution_relu(x, weight, bias, **shape)
            else:
                out = torch.cudnn_convolution_add_relu(
                    x, weight, added, alpha=1.0, bias=bias, **shape
                )
        else:
            out = F.conv2d(x, weight, bias, stride=stride, padding=padding)
            out = (out if added is None else out.add_(added)).relu_()
        ctx.save_for_backward(x, weight, out)
        ctx.shape = shape
        return out

    @staticmethod
    def backward(ctx, gradient):
        x, weight, out = ctx.saved_tensors
        gradient = torch.ops.aten.threshold_backward(gradient, out, 0)
        gradients = torch.ops.aten.convolution_backward(
            gradient,
            x,
            weight,
            bias_sizes=[len(weight)],
            transposed=False,
            output_padding=[0, 0],
            output_mask=ctx.needs_input_grad[:3],
            **ctx.shape,
        )
        return *gradients, gradient if ctx.needs_input_grad[3] else None, None, None
