"""OpenAI's clip package, which this file alone imports: without its warning, its question for a GPU, and torchvision.

The package takes torchvision's preprocessing, which `data_utils` does here to the same bits; to import torchvision
takes a second, because its models bring torch's compiler along.
"""

import sys
import warnings
from types import ModuleType
from unittest import mock

TORCHVISION_NAMES = (
    "Compose",
    "Resize",
    "CenterCrop",
    "ToTensor",
    "Normalize",
    "InterpolationMode",
)


def _stand_ins() -> dict[str, ModuleType]:
    """Return the modules to import in place of torchvision, unless it is loaded."""
    if "torchvision" in sys.modules:
        return {}
    transforms = ModuleType("torchvision.transforms")
    for name in TORCHVISION_NAMES:
        setattr(transforms, name, mock.Mock())
    package = ModuleType("torchvision")
    package.__path__ = []
    return {"torchvision": package, "torchvision.transforms": transforms}


stand_ins = _stand_ins()
sys.modules.update(stand_ins)
# The package asks for a GPU when it is imported. What a process that has asked forks cannot use one, and `demo.py`
# forks all of its commands: the package is told that there is none. No default of it that would follow is used.
with warnings.catch_warnings(), mock.patch("torch.cuda.is_available", return_value=False):
    # clip-anytorch imports pkg_resources, which warns that it is deprecated.
    warnings.simplefilter("ignore")
    import clip as clip
    from clip.model import CLIP as CLIP
    from clip.model import Bottleneck as Bottleneck
    from clip.model import LayerNorm as LayerNorm
    from clip.model import ModifiedResNet as ModifiedResNet
    from clip.model import ResidualAttentionBlock as ResidualAttentionBlock
    from clip.model import VisionTransformer as VisionTransformer
    from clip.model import convert_weights as convert_weights
for name in stand_ins:
    del sys.modules[name]
