"""What the published training script does (arXiv 2512.01059), and what is done here: the table of docs/fidelity.md.

`python -m mlpreduce.train.fidelity` prints the page; a test holds it, and that the named tests exist.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FACTS", "Fact", "page"]


@dataclass(frozen=True)
class Fact:
    """One fact of the published runs.

    Attributes:
        subject: what it is about.
        published: what the script does; `train.fidelity="published"` does the same unless `same` says otherwise.
        corrected: what is done by default; empty where it is the same.
        tests: the tests that hold it, as file::name.
        never: why the published behaviour is not offered, where it is not.
    """

    subject: str
    published: str
    corrected: str = ""
    tests: tuple[str, ...] = ()
    never: str = ""


FACTS = (
    Fact(
        "moving average of tied tensors",
        "timm's average walks the state dict, where a tied tensor stands once per block that uses it: with groups of g its "
        "decay is 0.9998**g (0.9996 for 2)",
        "once per update, decay 0.9998",
        ("test_train.py::test_ema_decays_a_tied_tensor_once",),
    ),
    Fact(
        "the same on a GPU",
        "one fused update of lists that name a tensor twice: a race, whose result depends on the build of torch",
        "no tensor is named twice",
        ("test_train.py::test_ema_decays_a_tied_tensor_once",),
        never="`published` averages once per use in turn, without the race: a race cannot be reproduced",
    ),
    Fact(
        "order of the images",
        "the sampler of repeated augmentation is seeded by the epoch alone: the same order for seeds 42 and 123",
        "seeded by seed and epoch",
        ("test_train.py::test_the_order_of_images_is_the_same_for_all_seeds_only_where_published",),
    ),
    Fact(
        "initial weights of thin",
        "drawn for its own shapes: all weights behind the first MLP differ from the baseline's",
        "outside of the MLPs those of the baseline",
        ("test_train.py::test_variants_of_a_seed_see_the_same",),
    ),
    Fact(
        "initial weights of baseline, grouped, shallow",
        "equal outside of the MLPs: the reductions draw no random numbers. Each process seeds itself with seed + rank, and "
        "DDP hands the weights of process 0 to all",
        tests=("test_train.py::test_variants_of_a_seed_see_the_same",),
    ),
    Fact(
        "scale of grouped",
        '0.707, on fc1.weight, fc1.bias and fc2.weight: `scale = "paper"` in the recipe, for both fidelities',
        tests=("test_paper.py::test_grouped",),
    ),
    Fact(
        "moving average, start",
        "the first update copies the weights, then decay 0.9998 without warm-up",
        tests=("test_train.py::test_twenty_updates_equal_the_loop_written_with_timm",),
    ),
    Fact(
        "reported accuracy",
        "that of the averaged weights; the best epoch is chosen on the validation set",
        tests=("test_train.py::test_fit_learns_and_reports",),
    ),
    Fact(
        "learning rate",
        "moves each epoch: 1e-5, 2.08e-4, 4.06e-4, 6.04e-4, 8.02e-4, 9.993e-4 ... 2.7e-8; the warm-up is part of the 300 "
        "epochs. (The text says that it starts from 1e-3.)",
        tests=("test_train.py::test_published_learning_rates", "test_recipes.py::test_published_run_in_numbers"),
    ),
    Fact(
        "batch",
        "2 GPUs x 256 x 2 accumulation steps = 1,024; 1,251 updates an epoch, 375,300 in all; the mean over micro-batches, "
        "exchanged in the last one only",
        tests=(
            "test_recipes.py::test_published_run_in_numbers",
            "test_train.py::test_accumulation_gives_the_gradient_of_the_whole_batch",
        ),
    ),
    Fact(
        "repeated augmentation",
        "3 copies of an image, which go to different processes; an epoch has 1,281,024 samples of about 427,000 images. (Not "
        "in the text.)",
        tests=(
            "test_data.py::test_repeated_augmentation_needs_several_workers",
            "test_data.py::test_published_batch_arithmetic",
        ),
    ),
    Fact(
        "other augmentation",
        "random erasing 0.25 (pixel, 1), label smoothing 0.1 inside Mixup, RandAugment m9 mstd0.5 inc1, mixup 0.8 and cutmix "
        "1.0 with probability 1, switched at 0.5, to the end; random interpolation, crop area 0.08 to 1, flip 0.5; no colour "
        "jitter",
        tests=("test_recipes.py::test_published_settings_stand_in_the_recipe",),
    ),
    Fact(
        "optimizer",
        "AdamW, eps 1e-8, no clipping; vectors, position embedding and class token are not decayed, a tied MLP is once",
        tests=("test_train.py::test_optimizer_decays_a_tied_tensor_once",),
    ),
    Fact(
        "images in validation",
        "mean and std 0.5, bicubic, crop 0.9: resized to 248, the centre 224",
        tests=("test_recipes.py::test_published_settings_stand_in_the_recipe",),
    ),
    Fact(
        "drop path",
        "0 to 0.1, linear over the blocks; blocks that share an MLP keep their own rates and draws",
        tests=("test_train.py::test_variants_of_a_seed_see_the_same",),
    ),
    Fact(
        "precision",
        "float16 with a scaler, TF32, channels last; cuDNN chooses algorithms by time, so runs are not bit-reproducible",
        tests=("test_recipes.py::test_published_settings_stand_in_the_recipe",),
    ),
    Fact(
        "resuming",
        "weights, optimizer and average are restored, random states are not: an interrupted run ends elsewhere",
        "random states of all workers are restored: on CPUs the same bits",
        ("test_train.py::test_resumed_run_is_exact",),
        never="it would only make interrupted runs differ",
    ),
    Fact(
        "resuming without the flags of the reduction",
        "a tied checkpoint loads into an untied model, silently with --no-resume-opt; an untied one into a tied model, where "
        "the last block's weights win; a grouped one given as initial checkpoint is scaled a second time",
        "the plan lies in the checkpoint and is compared; a state dict that would untie is refused",
        ("test_train.py::test_checkpoint_of_other_settings_is_refused", "test_life.py"),
        never="it loses weights",
    ),
    Fact(
        "validation on several processes",
        "shards are padded to equal length, and padding counts (not with 50,000 images on 2 GPUs)",
        "each image counts once",
        ("test_data.py::test_validation_shards_are_exact",),
        never="the published runs are not concerned",
    ),
    Fact(
        "mean and spread",
        "over two seeds, standard deviation with ddof=0",
        "ddof=1, named so in each table",
        ("test_report.py",),
        never="a matter of the report, which shows both",
    ),
    Fact(
        "strongest posterize",
        "a black image in the Pillow of that time; Pillow 13 raises",
        "a black image",
        ("test_data.py::test_strongest_posterize_gives_a_black_image",),
        never="the same with today's Pillow",
    ),
)

_HEAD = """\
# Fidelity: the published runs, and ours

The published training script is timm's of August 2025 with 46 lines added. `train.fidelity="published"` repeats what it
does where that changes numbers; `"corrected"`, the default, differs only where that is a defect. Settings (rates,
augmentation, batch) stand in the recipe and are the same for both. What a test holds is named; `train.fidelity` was not
run at full size by us.

```sh
python -m mlpreduce.recipe paper_vitb16 --dry-run train.fidelity=published
```

All variants of one seed start from the same weights outside of their MLPs, are fed the same augmented batches, and draw as
many random numbers: `record.json` has the fingerprints, `weights_digest` once and `batch_digest` (the first batch of an
epoch) and `random_digest` (all random states at its end) for each epoch.

| subject | published | corrected (default) | held by |
|---|---|---|---|
"""


def page() -> str:
    """The text of docs/fidelity.md."""
    lines = []
    for fact in FACTS:
        corrected = fact.corrected or "the same"
        if fact.never:
            corrected += f". Not offered as published: {fact.never}"
        tests = ", ".join(f"`{name}`" for name in fact.tests)
        lines.append(f"| {fact.subject} | {fact.published} | {corrected} | {tests} |")
    return _HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
