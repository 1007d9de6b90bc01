"""The models of arXiv 2512.01059 as names of timm; importing this module registers them.

    python -c "import mlpreduce.timm_models, runpy; runpy.run_path('train.py', run_name='__main__')" \\
        --model vit_base_patch16_224_grouped ...
"""

from __future__ import annotations

from mlpreduce.registration import register_model

register_model("vit_base_patch16_224_grouped", "vit_base_patch16_224", [("grouped", {"group": 2})])
register_model("vit_base_patch16_224_shallow", "vit_base_patch16_224", [("shallow", {"ratio": 0.5})])
register_model("vit_base_patch16_224_thin", "vit_base_patch16_224", [("thin", {"mlp_ratio": 2.0})])
