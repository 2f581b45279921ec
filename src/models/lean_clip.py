"""Leaner forward passes for the modules of OpenAI's CLIP: the same weights and features, fewer bytes moved and kept.

What a GPU loses most time and memory to in the clip package is not arithmetic but tensors written and read between
products. Here

- a BatchNorm whose statistics are frozen is carried by the convolution before it, which the ReLU after it follows in
  one operation; the BatchNorm's weight and bias go on learning (`LeanBottleneck`, `LeanResNet`);
- the weight and bias of a LayerNorm are carried by the linear layer after it, and QuickGELU's factors by the linear
  layers around it; what remains are the fused operations `layer_norm` and `silu`, which keep their input alone
  (`LeanBlock`);
- attention takes batches first, so that heads are views instead of copies, and texts are masked by the kernel instead
  of by a table that is copied to the device in each block.

All of it is exact but for rounding. Weights that carry others are made in each pass, through which the others learn;
where nothing learns, `folded` makes them once.
"""

import contextlib
from collections.abc import Iterator

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


class Folding:
    """A module whose products are with weights that carry other weights."""

    folded: tuple[Tensor, ...] = ()

    def fold(self) -> tuple[Tensor, ...]:
        """Make the weights that carry others."""
        raise NotImplementedError

    def carrying(self) -> tuple[Tensor, ...]:
        """Return those that `folded` has made, or make them."""
        return self.folded or self.fold()


@torch.no_grad()
def fold(model: nn.Module, dtype: torch.dtype | None = None) -> list[Folding]:
    """Make the weights of a model that carry others, for all passes from now on; none of its weights may change.

    They take as much memory again as those that they are made of. Other models stay as they are.

    Args:
        dtype: that products are computed in under autocast, None without it.

    Returns:
        The modules that were not folded before.
    """
    modules: list[Folding] = []
    for module in model.modules():
        if isinstance(module, Folding) and not module.folded:
            module.folded = tuple(weight.to(dtype or weight.dtype) for weight in module.fold())
            modules.append(module)
    return modules


@contextlib.contextmanager
def folded(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Fold the layers of a model for the forward passes of a context."""
    modules = fold(model, dtype)
    try:
        yield
    finally:
        for module in modules:
            module.folded = ()


@contextlib.contextmanager
def folded_to_learn(model: nn.Module) -> Iterator[None]:
    """Fold the layers for several backward passes; at the end, their gradients are carried on to all weights."""
    modules = [module for module in model.modules() if isinstance(module, Folding)]
    made = [module.fold() for module in modules]
    for module, own in zip(modules, made, strict=True):
        module.folded = tuple(
            weight.detach().requires_grad_(weight.requires_grad) for weight in own
        )
    try:
        yield
        # One after the other, so that few gradients are there twice.
        for module in reversed(modules):
            pairs = list(zip(made.pop(), module.folded, strict=True))
            module.folded = ()
            learned = [pair for pair in pairs if pair[1].grad is not None]
            weights = [weight for weight, _ in learned]
            torch.autograd.backward(weights, [leaf.grad for _, leaf in learned])
    finally:
        for module in modules:
            module.folded = ()


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


class LeanBlock(Folding, ResidualAttentionBlock):
    """A block of either transformer, batches first. A block with a mask is one of the text encoder, and causal."""

    def fold(self) -> tuple[Tensor, ...]:
        """Weight and bias of the projection to query, key and value, and of the layers around QuickGELU."""
        attn, up, down = self.attn, self.mlp.c_fc, self.mlp.c_proj
        return (
            *_carry_norm(self.ln_1, attn.in_proj_weight, attn.in_proj_bias),
            *_carry_norm(self.ln_2, QUICK_GELU * up.weight, QUICK_GELU * up.bias),
            down.weight / QUICK_GELU,
        )

    def forward(self, x: Tensor) -> Tensor:
        """(b, L, W) -> (b, L, W)."""
        attn = self.attn
        in_weight, in_bias, up_weight, up_bias, down_weight = self.carrying()
        joint = F.linear(_normalised(x, self.ln_1), in_weight, in_bias)  # (b, L, 3W)
        # Taken apart before they are transposed: so their gradients lie side by side again as they come.
        parts = joint.unflatten(-1, (3, attn.num_heads, -1)).unbind(2)
        query, key, value = (part.transpose(1, 2) for part in parts)  # (b, heads, L, d) each
        causal = self.attn_mask is not None
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        x = x + attn.out_proj(mixed.transpose(1, 2).flatten(2))
        hidden = F.linear(_normalised(x, self.ln_2), up_weight, up_bias)  # (b, L, 4W)
        return x + silu_then_linear(hidden, down_weight, self.mlp.c_proj.bias)


def _carry_norm(norm: LayerNorm, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of one linear layer that does what a LayerNorm's own and a linear layer do."""
    with torch.autocast(weight.device.type, enabled=False):
        return weight * norm.weight, bias + weight @ norm.bias


def _normalised(x: Tensor, norm: LayerNorm) -> Tensor:
    """A LayerNorm without its weight and bias. Means and variances are taken in float32, whatever the type of x."""
    with torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x, norm.normalized_shape, eps=norm.eps)


class LeanBottleneck(Folding, Bottleneck):
    """A residual block whose BatchNorms are carried by its convolutions."""

    def fold(self) -> tuple[Tensor, ...]:
        """Weight and bias of three convolutions, and of that of the way past them where there is one."""
        own = ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3))
        past = () if self.downsample is None else (tuple(self.downsample)[1:],)
        return _carry_norms(*own, *past)

    def forward(self, x: Tensor) -> Tensor:
        """(b, C, h, w) -> (b, 4 planes, h / stride, w / stride)."""
        carrying = self.carrying()
        out, identity = pointwise_beside(x, *carrying[:2])
        if self.downsample is not None:
            weight, bias = carrying[6:]
            identity = F.conv2d(self.downsample[0](identity), weight, bias)
        out = convolution_then_relu(out, *carrying[2:4], padding=1)
        return convolution_then_relu(self.avgpool(out), *carrying[4:6], added=identity)


class LeanResNet(Folding, ModifiedResNet):
    """The ResNet whose BatchNorms are carried by its convolutions."""

    def fold(self) -> tuple[Tensor, ...]:
        """Weight and bias of the three convolutions before the blocks."""
        return _carry_norms((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3))

    def forward(self, x: Tensor) -> Tensor:
        """Images (b, 3, R, R) -> features (b, D)."""
        carrying = self.carrying()
        x = convolution_then_relu(x, *carrying[:2], stride=2, padding=1)
        x = convolution_then_relu(x, *carrying[2:4], padding=1)
        x = convolution_then_relu(x, *carrying[4:], padding=1)
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


def _carry_norms(*pairs: tuple[nn.Conv2d, nn.BatchNorm2d]) -> tuple[Tensor, ...]:
    """Weight and bias of one convolution for each pair: it does what the convolution and its frozen BatchNorm do."""
    carrying: list[Tensor] = []
    for convolution, norm in pairs:
        scale = norm.weight * (norm.get_buffer("running_var") + norm.eps).rsqrt()  # (channels,)
        carrying.append(convolution.weight * scale[:, None, None, None])
        carrying.append(norm.bias - norm.get_buffer("running_mean") * scale)
    return tuple(carrying)


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
        out = F.conv2d(x, weight, bias, stride, padding)
        return F.relu(out if added is None else out + added)
    return _ConvolutionThenReLU.apply(*_in_half(x, weight, bias, added), stride, padding)


def has_fused_kernel(x: Tensor) -> bool:
    """Check whether cuDNN may have one kernel for a convolution of x, a sum and a ReLU."""
    return x.is_cuda and x.dtype != torch.float32


def _in_one_kernel(
    x: Tensor, weight: Tensor, bias: Tensor, added: Tensor | None, *, stride: int, padding: int
) -> Tensor | None:
    """`relu(conv2d(x, weight, bias) + added)`, None where cuDNN has no such kernel for this GPU and these sizes."""
    scale = 1.0
    if added is None:
        # The kernel adds something whatever is asked for, and `cudnn_convolution_relu` hands it memory that nobody has
        # written to: 0 * NaN is NaN.
        scale = 0.0
        sides = [(side + 2 * padding - weight.shape[2]) // stride + 1 for side in x.shape[2:]]
        shape_out = (len(x), len(weight), *sides)
        added = torch.empty(
            shape_out, dtype=x.dtype, device=x.device, memory_format=torch.channels_last
        ).zero_()
    try:
        return torch.cudnn_convolution_add_relu(
            x, weight, added, scale, bias, [stride] * 2, [padding] * 2, [1, 1], 1
        )
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # cuDNN's "unable to find an engine"
        return None


def _computed(
    x: Tensor, weight: Tensor, bias: Tensor, added: Tensor | None, *, stride: int, padding: int
) -> Tensor:
    """`relu(conv2d(x, weight, bias) + added)`, in one kernel where there is one."""
    if has_fused_kernel(x):
        out = _in_one_kernel(x, weight, bias, added, stride=stride, padding=padding)
        if out is not None:
            return out
    out = F.conv2d(x, weight, bias, stride, padding)
    return (out if added is None else out.add_(added)).relu_()


class _ConvolutionThenReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, added, stride, padding):
        out = _computed(x, weight, bias, added, stride=stride, padding=padding)
        ctx.save_for_backward(x, weight, out)
        ctx.shape = [stride, stride], [padding, padding], [1, 1]
        return out

    @staticmethod
    def backward(ctx, gradient):
        x, weight, out = ctx.saved_tensors
        gradient = torch.ops.aten.threshold_backward(gradient, out, 0)
        gradients = torch.ops.aten.convolution_backward(
            gradient,
            x,
            weight,
            [len(weight)],
            *ctx.shape,
            False,
            [0, 0],
            1,
            ctx.needs_input_grad[:3],
        )
        return *gradients, gradient if ctx.needs_input_grad[3] else None, None, None


def pointwise_beside(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """`relu(conv2d(x, weight, bias))` with a kernel of 1 x 1, and x for the way past it.

    In the backward pass the product adds its part to the gradient of that way, which is to be used once: a sum of both
    would read and write all of it again.
    """
    if torch.compiler.is_compiling():
        return F.relu(F.conv2d(x, weight, bias)), x
    return _PointwiseBeside.apply(*_in_half(x, weight, bias))


class _PointwiseBeside(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        out = _computed(x, weight, bias, None, stride=1, padding=0)
        ctx.save_for_backward(x, weight, out)
        return out, x

    @staticmethod
    def backward(ctx, gradient, of_past):
        x, weight, out = ctx.saved_tensors
        of_x, *of_weights = ctx.needs_input_grad
        gradient = torch.ops.aten.threshold_backward(gradient, out, 0)
        joins = of_x and of_past.is_contiguous(memory_format=torch.channels_last)
        gradients = torch.ops.aten.convolution_backward(
            gradient,
            x,
            weight,
            [len(weight)],
            [1, 1],
            [0, 0],
            [1, 1],
            False,
            [0, 0],
            1,
            [of_x and not joins, *of_weights],
        )
        if joins:
            rows = gradient.permute(0, 2, 3, 1).flatten(0, 2)  # (n, channels out)
            past = of_past.permute(0, 2, 3, 1)  # (b, h, w, C)
            # Into the memory of a gradient that nobody else has: the block's sum made it, or a pooling.
            joined = past.flatten(0, 2).addmm_(rows, weight.flatten(1))
            return joined.view(past.shape).permute(0, 3, 1, 2), *gradients[1:]
        return (gradients[0] + of_past if of_x else None), *gradients[1:]
