"""LoRA: low-rank updates that are trained in place of a CLIP's weights (Hu et al. 2021, arXiv 2106.09685)."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from settings.groups import Lora
from utils import UserError

NAME = "default"  # peft's name for an adapter


class Adapter(nn.Module):
    """Parametrization of a weight W (out, in) as W + B A. Only A and B are trained, and B is initialised to zeros.

    All code that reads the weight gets the sum: layers that are called, and also code that reads
    weights directly, such as attention's packed projections and the folding in `lean_clip`.
    """

    def __init__(self, lora_A: nn.Linear, lora_B: nn.Linear) -> None:
        super().__init__()
        self.lora_A = lora_A
        self.lora_B = lora_B

    def forward(self, weight: Tensor) -> Tensor:
        # Without autocast, training uses exactly the merged weight that will be saved.
        with torch.autocast(weight.device.type, enabled=False):
            return torch.addmm(weight, self.lora_B.weight, self.lora_A.weight)


def add_adapters(model: nn.Module, lora: Lora) -> None:
    """Freeze a model and add peft's adapters to the matrices of the target layers that were trainable, in place.

    Trainable weights of normalisation layers stay trainable with `lora_norms`. peft itself would
    replace layers by its own, whose adapters act only when the layer is called.

    Raises:
        UserError: no trainable matrix is in a target layer.
    """
    from peft import LoraConfig, inject_adapter_in_model

    targets = []
    norms = []
    for layer, kind in _layers(model):
        for name, weight in layer.named_parameters(recurse=False):
            if weight.requires_grad and kind in lora.lora_targets and _is_matrix(layer, name):
                targets.append((layer, name))
            elif weight.requires_grad and "Norm" in type(layer).__name__:
                norms.append(weight)
    if not targets:
        raise UserError(
            f"--lora-targets {lora.lora_targets}: the trained encoders have no such layers: choose others"
        )
    model.requires_grad_(False)
    for weight in norms:
        weight.requires_grad_(lora.lora_norms)
    linear = nn.ModuleList(_as_linear(layer.get_parameter(name)) for layer, name in targets)
    # With alpha equal to the rank, peft's scaling factor is 1, so the update is B A itself.
    config = LoraConfig(r=lora.lora_rank, lora_alpha=lora.lora_rank, target_modules=r"\d+")
    adapted = inject_adapter_in_model(config, linear)
    for (layer, name), made in zip(targets, adapted, strict=True):
        adapter = Adapter(made.lora_A[NAME], made.lora_B[NAME])
        # `unsafe` skips a trial run: autocast does not support weights without data, which `plan.py` uses.
        parametrize.register_parametrization(layer, name, adapter, unsafe=True)


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's state dict with the adapters merged into the weights, under the names without adapters."""
    state = model.state_dict()
    for path, layer in model.named_modules():
        if parametrize.is_parametrized(layer):
            for name in layer.parametrizations:
                state[f"{path}.{name}"] = getattr(layer, name)
    for name in [name for name in state if ".parametrizations." in name]:
        del state[name]
    return state


def _layers(module: nn.Module, kind: str = "") -> Iterator[tuple[nn.Module, str]]:
    """Yield each layer of a module and its kind: "attention", "mlp" or "none".

    The kind follows from the class names of the layer and of the modules around it. If no class
    name decides, a layer inside a numbered block is "mlp", and any other layer is "none".
    """
    own = type(module).__name__
    if "Attention" in own and not own.endswith("Block"):
        kind = "attention"
    elif "mlp" in own.lower():
        kind = "mlp"
    yield module, kind or "none"
    for name, child in module.named_children():
        yield from _layers(child, kind or ("mlp" if name.isdigit() else ""))


def _is_matrix(layer: nn.Module, name: str) -> bool:
    """Check whether a weight of a layer is a matrix that multiplies features."""
    is_weight = name.endswith("weight") and layer.get_parameter(name).dim() == 2
    return is_weight and not isinstance(layer, nn.Embedding)


def _as_linear(weight: nn.Parameter) -> nn.Linear:
    """Return a linear layer that has the weight, since peft supports only certain types of layers."""
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = weight
    return linear
