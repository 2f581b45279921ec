"""The only import of OpenAI's clip package, without its deprecation warning, its check for a GPU, and torchvision.

The package imports torchvision for preprocessing. Here, `data_utils` does the preprocessing with
bit-identical results, and importing torchvision takes a second, because its models load torch's
compiler.
"""

import sys
import warnings
from unittest import mock

# The modules to import in place of torchvision; none if it is already loaded.
stand_ins = {name: mock.MagicMock() for name in ("torchvision", "torchvision.transforms")}
if "torchvision" in sys.modules:
    stand_ins = {}
sys.modules.update(stand_ins)
# On import, the package checks for a GPU. After such a check, forked processes cannot use a GPU, and `demo.py` forks
# all of its commands. So the check is patched to find none; it only sets package defaults, which are not used.
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
