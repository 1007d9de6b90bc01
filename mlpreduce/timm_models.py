"""Reduced models and baselines as names of timm; importing this module registers them.

- `vit_base_patch16_224_grouped`, `_shallow`, `_thin`: arXiv 2512.01059. `vit_*_patch16_224_dgmlp` are `grouped` as its code
  has it, with a factor of 0.707.
- `vit_*_patch16_224_revit`: the rule that NViT (arXiv 2110.04869) reads from what it prunes: MLPs of 3 times the embedding
  in the first and the last three blocks, of 6 times in between; attention stays as it is.

    python -c "import mlpreduce.timm_models, runpy; runpy.run_path('train.py', run_name='__main__')" \\
        --model vit_base_patch16_224_grouped ...
"""

from __future__ import annotations

from mlpreduce.building.registration import Steps, register_model
from mlpreduce.registry import Origin, registering

with registering(Origin("package", __name__), __name__):  # so that these names are not a plug-in's that imports this
    register_model("vit_base_patch16_224_grouped", "vit_base_patch16_224", [("grouped", {"group": 2})])
    register_model("vit_base_patch16_224_shallow", "vit_base_patch16_224", [("shallow", {"ratio": 0.5})])
    register_model("vit_base_patch16_224_thin", "vit_base_patch16_224", [("thin", {"mlp_ratio": 2.0})])

    for size, width in (("tiny", 192), ("small", 384), ("base", 768)):
        architecture = f"vit_{size}_patch16_224"
        register_model(f"{architecture}_dgmlp", architecture, [("grouped", {"group": 2, "scale": "paper"})])
        narrow_at_the_ends = [3 * width] * 3 + [6 * width] * 6 + [3 * width] * 3
        steps: Steps = [("thin", {"mlp_ratio": 6.0}), ("shallow", {"widths": narrow_at_the_ends})]
        register_model(f"{architecture}_revit", architecture, steps)
