"""Leaner forward passes for the modules of OpenAI's CLIP: the same weights and features with less memory and traffic.

In the clip package, a GPU loses most time and memory not to arithmetic, but to tensors that are
written and read between matrix multiplications. Here

- a BatchNorm with frozen statistics is folded into the convolution before it, which is fused with the ReLU after it;
  the BatchNorm's weight and bias are still trained (`LeanBottleneck`, `LeanResNet`);
- the weight and bias of a LayerNorm are folded into the linear layer after it, and QuickGELU's factors into the linear
  layers around it; the fused operations `layer_norm` and `silu` remain, which keep only their input
  (`LeanBlock`);
- attention is batch-first, so that heads are views instead of copies, and the attention kernel applies the causal mask
  itself, instead of a mask tensor that each block copies to the device.

Results are exact up to rounding. In training, the weights are folded in each forward pass, so that
gradients reach the original weights; if nothing is trained, `folded` folds them once.
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
    """A module that computes with folded weights, into which other weights have been multiplied or added."""

    folded: tuple[Tensor, ...] = ()

    def fold(self) -> tuple[Tensor, ...]:
        """Compute the folded weights."""
        raise NotImplementedError

    def carrying(self) -> tuple[Tensor, ...]:
        """Return the stored folded weights, or compute them."""
        return self.folded or self.fold()


@torch.no_grad()
def fold(model: nn.Module, dtype: torch.dtype | None = None) -> list[Folding]:
    """Compute and store a model's folded weights for all later passes; none of its weights may change afterwards.

    Folded weights need as much memory again as the weights that they replace. Models of other
    packages are unchanged.

    Args:
        dtype: data type of matrix multiplications under autocast; None without autocast.

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
    """Fold the layers of a model within a context."""
    modules = fold(model, dtype)
    try:
        yield
    finally:
        for module in modules:
            module.folded = ()


@contextlib.contextmanager
def folded_to_learn(model: nn.Module) -> Iterator[None]:
    """Fold the layers once for several backward passes; at the end, propagate the gradients to the original weights."""
    modules = [module for module in model.modules() if isinstance(module, Folding)]
    made = [module.fold() for module in modules]
    for module, own in zip(modules, made, strict=True):
        module.folded = tuple(
            weight.detach().requires_grad_(weight.requires_grad) for weight in own
        )
    try:
        yield
        # One module at a time, so that few gradients are in memory twice.
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
    """CLIP with a batch-first text encoder that never waits for the device."""

    def encode_text(self, text: Tensor) -> Tensor:
        """Encode tokens (b, L) as features (b, D)."""
        x = self.token_embedding(text) + self.positional_embedding[: text.shape[1]]
        x = self.ln_final(self.transformer(x))  # (b, L, W)
        ends = text.argmax(dim=1)  # the end token has the largest number
        return x[torch.arange(len(text), device=text.device), ends] @ self.text_projection


class LeanVisionTransformer(VisionTransformer):
    """The batch-first ViT."""

    def forward(self, x: Tensor) -> Tensor:
        """Encode images (b, 3, R, R) as features (b, D)."""
        patches = self.conv1(x).flatten(2).transpose(1, 2)  # (b, L - 1, W)
        classes = self.class_embedding.to(patches.dtype).expand(len(x), 1, -1)
        x = torch.cat([classes, patches], dim=1) + self.positional_embedding.to(patches.dtype)
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj


class LeanBlock(Folding, ResidualAttentionBlock):
    """A batch-first block of either transformer. Only blocks of the text encoder have a mask, which is causal."""

    def fold(self) -> tuple[Tensor, ...]:
        """Return the folded weights and biases.

        These are weight and bias of the projection to query, key and value, weight and bias of the
        MLP's first layer, and the weight of its second layer, whose bias does not change.
        """
        attn, up, down = self.attn, self.mlp.c_fc, self.mlp.c_proj
        return (
            *_carry_norm(self.ln_1, attn.in_proj_weight, attn.in_proj_bias),
            *_carry_norm(self.ln_2, QUICK_GELU * up.weight, QUICK_GELU * up.bias),
            down.weight / QUICK_GELU,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block, (b, L, W) -> (b, L, W)."""
        attn = self.attn
        in_weight, in_bias, up_weight, up_bias, down_weight = self.carrying()
        joint = F.linear(_normalised(x, self.ln_1), in_weight, in_bias)  # (b, L, 3W)
        # Split before transposing, so that the gradients of the three parts have the memory layout of `joint`.
        parts = joint.unflatten(-1, (3, attn.num_heads, -1)).unbind(2)
        query, key, value = (part.transpose(1, 2) for part in parts)  # (b, heads, L, d) each
        causal = self.attn_mask is not None
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        x = x + attn.out_proj(mixed.transpose(1, 2).flatten(2))
        hidden = F.linear(_normalised(x, self.ln_2), up_weight, up_bias)  # (b, L, 4W)
        return x + silu_then_linear(hidden, down_weight, self.mlp.c_proj.bias)


def _carry_norm(norm: LayerNorm, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Fold a LayerNorm's weight and bias into the linear layer after it; return that layer's new weight and bias."""
    with torch.autocast(weight.device.type, enabled=False):
        return weight * norm.weight, bias + weight @ norm.bias


def _normalised(x: Tensor, norm: LayerNorm) -> Tensor:
    """Apply a LayerNorm without its weight and bias; means and variances are float32, whatever the type of x."""
    with torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x, norm.normalized_shape, eps=norm.eps)


class LeanBottleneck(Folding, Bottleneck):
    """A residual block whose BatchNorms are folded into its convolutions."""

    def fold(self) -> tuple[Tensor, ...]:
        """Return weight and bias of the three convolutions, and of the skip connection's convolution if it has one."""
        own = ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3))
        past = () if self.downsample is None else (tuple(self.downsample)[1:],)
        return _carry_norms(*own, *past)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block, (b, C, h, w) -> (b, 4 planes, h / stride, w / stride)."""
        carrying = self.carrying()
        out, identity = pointwise_beside(x, *carrying[:2])
        if self.downsample is not None:
            weight, bias = carrying[6:]
            identity = F.conv2d(self.downsample[0](identity), weight, bias)
        out = convolution_then_relu(out, *carrying[2:4], padding=1)
        return convolution_then_relu(self.avgpool(out), *carrying[4:6], added=identity)


class LeanResNet(Folding, ModifiedResNet):
    """The ResNet whose BatchNorms are folded into its convolutions."""

    def fold(self) -> tuple[Tensor, ...]:
        """Return weight and bias of the three convolutions before the blocks."""
        return _carry_norms((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3))

    def forward(self, x: Tensor) -> Tensor:
        """Encode images (b, 3, R, R) as features (b, D)."""
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
    """Fold the frozen BatchNorm of each pair into its convolution; return weight and bias of each convolution."""
    carrying: list[Tensor] = []
    for convolution, norm in pairs:
        scale = norm.weight * (norm.get_buffer("running_var") + norm.eps).rsqrt()  # (channels,)
        carrying.append(convolution.weight * scale[:, None, None, None])
        carrying.append(norm.bias - norm.get_buffer("running_mean") * scale)
    return tuple(carrying)


def _in_half(x: Tensor, *weights: Tensor | None) -> list[Tensor | None]:
    """Cast tensors to the type of matrix multiplications, since autocast ignores custom autograd functions."""
    dtype = product_type(x)
    return [tensor if tensor is None else tensor.to(dtype) for tensor in (x, *weights)]


def silu_then_linear(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute `linear(silu(hidden), weight, bias)`, (..., H) -> (..., W).

    Of the activations, only `hidden` is kept for the backward pass.
    """
    if torch.compiler.is_compiling():
        return F.linear(F.silu(hidden), weight, bias)  # the compiler chooses what to keep
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
    """Compute `relu(conv2d(x, weight, bias) + added)`.

    Of the activations, only `x` and the output are kept for the backward pass.
    """
    if torch.compiler.is_compiling():
        out = F.conv2d(x, weight, bias, stride, padding)
        return F.relu(out if added is None else out + added)
    return _ConvolutionThenReLU.apply(*_in_half(x, weight, bias, added), stride, padding)


def has_fused_kernel(x: Tensor) -> bool:
    """Check whether cuDNN may have a single kernel for a convolution of x, a sum and a ReLU."""
    return x.is_cuda and x.dtype != torch.float32


def _computed(
    x: Tensor, weight: Tensor, bias: Tensor, added: Tensor | None, *, stride: int, padding: int
) -> Tensor:
    """Compute `relu(conv2d(x, weight, bias) + added)`, in one cuDNN kernel if there is one for these sizes."""
    if has_fused_kernel(x):
        scale, term = 1.0, added
        if term is None:
            # The kernel always adds a tensor. `cudnn_convolution_relu` would pass it uninitialised memory with factor
            # 0, but that memory may contain NaN, and 0 * NaN is NaN.
            scale = 0.0
            sides = [(side + 2 * padding - weight.shape[2]) // stride + 1 for side in x.shape[2:]]
            term = torch.empty(
                (len(x), len(weight), *sides),
                dtype=x.dtype,
                device=x.device,
                memory_format=torch.channels_last,
            ).zero_()
        try:
            return torch.cudnn_convolution_add_relu(
                x, weight, term, scale, bias, [stride] * 2, [padding] * 2, [1, 1], 1
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # cuDNN's "unable to find an engine"
            pass
    out = F.conv2d(x, weight, bias, stride, padding)
    return (out if added is None else out.add_(added)).relu_()


def _gradients(
    gradient: Tensor, x: Tensor, weight: Tensor, *, stride: int, padding: int, needed: list[bool]
) -> tuple[Tensor | None, ...]:
    """Return the needed gradients of a convolution's input, weight and bias; None for each of the others."""
    shape = [stride] * 2, [padding] * 2, [1, 1]
    return torch.ops.aten.convolution_backward(
        gradient, x, weight, [len(weight)], *shape, False, [0, 0], 1, needed
    )


class _ConvolutionThenReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, added, stride, padding):
        out = _computed(x, weight, bias, added, stride=stride, padding=padding)
        ctx.save_for_backward(x, weight, out)
        ctx.stride, ctx.padding = stride, padding
        return out

    @staticmethod
    def backward(ctx, gradient):
        x, weight, out = ctx.saved_tensors
        gradient = torch.ops.aten.threshold_backward(gradient, out, 0)
        needed = ctx.needs_input_grad[:3]
        gradients = _gradients(
            gradient, x, weight, stride=ctx.stride, padding=ctx.padding, needed=needed
        )
        return *gradients, gradient if ctx.needs_input_grad[3] else None, None, None


def pointwise_beside(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return `relu(conv2d(x, weight, bias))` for a 1 x 1 kernel, and x for the skip connection.

    The backward pass adds the convolution's gradient to the skip connection's gradient in place, so
    use the second output only once. A separate sum would read and write the whole gradient again.
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
        needed = [of_x and not joins, *of_weights]
        gradients = _gradients(gradient, x, weight, stride=1, padding=0, needed=needed)
        if joins:
            rows = gradient.permute(0, 2, 3, 1).flatten(0, 2)  # (n, channels out)
            past = of_past.permute(0, 2, 3, 1)  # (b, h, w, C)
            # In place is safe: this gradient comes from the block's sum or from pooling, and nothing else uses it.
            joined = past.flatten(0, 2).addmm_(rows, weight.flatten(1))
            return joined.view(past.shape).permute(0, 3, 1, 2), *gradients[1:]
        return (gradients[0] + of_past if of_x else None), *gradients[1:]
