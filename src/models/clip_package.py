"""OpenAI's clip package, which this file alone imports: without its warning, and without its question for a GPU."""

import warnings
from unittest import mock

# The package asks for a GPU when it is imported. What a process that has asked forks cannot use one, and `demo.py`
# forks all of its commands: the package is told that there is none. No default of it that would follow is used.
with warnings.catch_warnings(), mock.patch("torch.cuda.is_available", return_value=False):
    # clip-anytorch imports pkg_resources, which warns that it is deprecated.
    warnings.simplefilter("ignore")
    import clip
    from clip.model import (
        CLIP,
        Bottleneck,
        LayerNorm,
        ModifiedResNet,
        ResidualAttentionBlock,
        VisionTransformer,
        build_model,
        convert_weights,
    )

__all__ = [
    "CLIP",
    "Bottleneck",
    "LayerNorm",
    "ModifiedResNet",
    "ResidualAttentionBlock",
    "VisionTransformer",
    "build_model",
    "clip",
    "convert_weights",
]
