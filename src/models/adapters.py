"""LoRA: low-rank changes of a CLIP's weights, which learn in the weights' place (Hu et al. 2021, arXiv 2106.09685)."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from settings.groups import Lora
from utils import UserError

NAME = "default"  # that peft gives an adapter


class Adapter(nn.Module):
    """A weight W (out, in) as W + B A, of which A and B learn, and B begins as zeros.

    It parametrizes the weight, so that all that reads the weight has the sum: layers that are called, and those whose
    weights are read, as attention's packed projections and what `lean_clip` folds.
    """

    def __init__(self, lora_A: nn.Linear, lora_B: nn.Linear) -> None:
        super().__init__()
        self.lora_A = lora_A
        self.lora_B = lora_B

    def forward(self, weight: Tensor) -> Tensor:
        # The sum is as exact as the weight that is saved of it.
        with torch.autocast(weight.device.type, enabled=False):
            return torch.addmm(weight, self.lora_B.weight, self.lora_A.weight)


def add_adapters(model: nn.Module, lora: Lora) -> None:
    """Freeze all weights of a model, and give those that have learned and are targets adapters of peft's, in place.

    peft itself would replace layers by its own, whose adapters act only where a layer is called.

    Raises:
        UserError: there is no such weight.
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
    # As much as the rank, so that the change is B A itself.
    config = LoraConfig(r=lora.lora_rank, lora_alpha=lora.lora_rank, target_modules=r"\d+")
    adapted = inject_adapter_in_model(config, linear)
    for (layer, name), made in zip(targets, adapted, strict=True):
        adapter = Adapter(made.lora_A[NAME], made.lora_B[NAME])
        # Not tried out at once: autocast knows no weights without data, which `plan.py` counts.
        parametrize.register_parametrization(layer, name, adapter, unsafe=True)


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's weights by the names that they have without adapters, and merged with these."""
    state = model.state_dict()
    for path, layer in model.named_modules():
        if parametrize.is_parametrized(layer):
            for name in layer.parametrizations:
                state[f"{path}.{name}"] = getattr(layer, name)
    for name in [name for name in state if ".parametrizations." in name]:
        del state[name]
    return state


def _layers(module: nn.Module, kind: str = "") -> Iterator[tuple[nn.Module, str]]:
    """Each layer of a module with what it is a part of, told by the classes around it: one of LORA_TARGETS.

    What no class tells is "mlp" within numbered blocks, and "none" without.
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
    """Check whether a weight of a layer is a matrix that features are multiplied with."""
    is_weight = name.endswith("weight") and layer.get_parameter(name).dim() == 2
    return is_weight and not isinstance(layer, nn.Embedding)


def _as_linear(weight: nn.Parameter) -> nn.Linear:
    """The weight as that of a layer that peft knows."""
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = weight
    return linear
