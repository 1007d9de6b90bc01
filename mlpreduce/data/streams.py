"""WebDataset shards: read in a stream by timm's reader, with exact counts in validation and named damaged images.

What is exact, and what is not:

- Training: each loading process gives ceil(images / processes), rounded up to whole batches, and repeats its shards where
  they hold less. Where shards are of unequal size, some images are seen twice in an epoch and others not at all.
- The order of the shards follows from (seed, epoch), that of the images in a process from the process's seed, which torch
  draws from the random state that checkpoints hold. So a run goes on from a whole epoch to the same bits.
- Validation: the shards are dealt to the workers, and each image counts once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from timm.data import IterableImageDataset
from timm.data.readers.reader_wds import ReaderWds

from mlpreduce.data.reading import REMEDIES, Tally, UnreadableImage
from mlpreduce.data.settings import DataSettings
from mlpreduce.errors import ReductionError

__all__ = ["ShardReader", "open_streams", "stream_order"]

_LOG = logging.getLogger(__name__)


def open_streams(
    data: DataSettings, micro_batch: int, rank: int, world: int, tally: Tally | None
) -> tuple[Any, Any, int, int]:
    """Training and validation set of worker `rank` of `world`, and how many images each has over all workers.

    Args:
        data: where the shards lie.
        micro_batch: images per training batch of this worker; the reader rounds up to it.
        rank: number of this worker.
        world: number of workers.
        tally: counts damaged training images; None = they are an error.

    Raises:
        ReductionError: the shards are not listed, or fewer than there are processes to read them.
    """
    train = _reader(data, data.train_split, tally, is_training=True, batch_size=micro_batch)
    val = _reader(data, data.val_split, None)
    train.dist_rank, train.dist_num_replicas = rank, world
    train.set_loader_cfg(num_workers=data.workers)
    processes = world * max(1, data.workers)
    for split, reader, needed in ((data.train_split, train, processes), (data.val_split, val, world)):
        shards = len(reader.split_info.filenames)
        if shards < needed:
            raise ReductionError(
                f"data.name={data.name!r}: split {split!r} has {shards} shard(s) for {needed} reading process(es); a shard "
                "is read by one process, so use a smaller data.workers or launch.workers, or cut the data into more shards"
            )
    # timm would give each worker as many images, some twice, others not at all. Each gets whole shards of its own instead.
    val.dist_rank, val.dist_num_replicas = 0, 1
    val.split_info.filenames = tuple(val.split_info.filenames)[rank::world]
    val.split_info.shard_lengths = tuple(val.split_info.shard_lengths)[rank::world]
    sets = [IterableImageDataset(data.root, reader=reader) for reader in (train, val)]
    # Images of an epoch: what the processes give after rounding, so that a schedule counts right.
    return sets[0], sets[1], len(train) * world, val.num_samples


def stream_order(reader: ShardReader) -> Callable[[int, int], None]:
    """How the order of an epoch is set."""

    def set_epoch(seed: int, epoch: int) -> None:
        # Without loading processes the shuffling of the last epoch would go on, and no checkpoint knows where it is.
        reader.ds = None
        reader.common_seed = seed * 1_000_003  # the reader adds the epoch
        reader.worker_seed = seed * 1_000_003 + epoch  # loading processes have their own
        reader.set_epoch(epoch)  # type: ignore[no-untyped-call]

    return set_epoch


class ShardReader(ReaderWds):
    """timm's reader, which logs and drops what it cannot read, made to tell.

    Args:
        root: directory of the shards.
        split: a split in _info.json, or shards and number of images: "part-{00..09}.tar|1000".
        classes: labels lie below it.
        tally: counts damaged images; None = they are an error.
        options: as timm's reader takes them.
    """

    def __init__(self, root: str, split: str, classes: int, tally: Tally | None, **options: Any) -> None:
        super().__init__(root, split=split, input_key="jpg;jpeg;png;webp", **options)
        self._split = split
        self._classes = classes
        self._tally = tally
        self._at = ""  # the image that is being decoded

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        count = 0
        for image, label in super().__iter__():  # type: ignore[no-untyped-call]
            if not 0 <= label < self._classes:
                raise UnreadableImage(
                    f"{self.root}: an image of split {self._split!r} has label {label}; data.classes={self._classes} allows "
                    f"0 to {self._classes - 1}"
                )
            yield image, label
            count += 1
        # A shard that was cut between two images reads well, and the accuracy would be of fewer images.
        expected = sum(self.split_info.shard_lengths[self.global_worker_id :: self.global_num_workers])
        if not self.is_training and self.split_info.shard_lengths and count != expected:
            files = ", ".join(self.split_info.filenames[self.global_worker_id :: self.global_num_workers])
            raise UnreadableImage(
                f"{self.root}: {files} of split {self._split!r} hold {count} labelled images, _info.json says {expected}; copy "
                "the shards anew, or correct _info.json"
            )

    def _lazy_init(self) -> None:
        from webdataset import DataPipeline

        super()._lazy_init()  # type: ignore[no-untyped-call]
        *before, decode, rename = self.ds.pipeline  # type: ignore[attr-defined]
        for stage in (*before, decode):
            if "handler" in getattr(stage, "kw", {}):
                stage.kw["handler"] = self._tell_image if stage is decode else self._tell_shard
        self.ds = DataPipeline(*before, self._remember, decode, rename)

    def _remember(self, samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for sample in samples:
            self._at = f"{sample['__url__']}: {sample['__key__']}"
            yield sample

    def _tell_image(self, error: Exception) -> bool:
        kind = "training" if self.is_training else "validation"
        fact = f"({type(error).__name__}: {error})"
        if not isinstance(error, OSError | SyntaxError | EOFError):
            raise UnreadableImage(
                f"{self._at}: a sample of the {kind} set cannot be used {fact}; each needs an image (.jpg, .png, .webp) and a "
                "label (.cls)"
            ) from error
        fact = f"{self._at}: an image of the {kind} set cannot be read {fact}"
        if self._tally is None:
            raise UnreadableImage(f"{fact}; {REMEDIES[kind]}") from error
        self._tally.add()
        _LOG.warning("%s; a later one takes its place", fact)
        return True

    def _tell_shard(self, error: Exception) -> bool:
        if isinstance(error, ReductionError):  # told before; webdataset has added to its arguments
            raise UnreadableImage(str(error.args[0])) from error
        if len(error.args) < 2:
            raise error  # webdataset adds which shard it was, and asks again
        where = next((str(part) for part in reversed(error.args) if isinstance(part, str)), self.root)
        raise UnreadableImage(
            f"{where}: a shard of split {self._split!r} is damaged ({_text(error)}); copy it anew"
        ) from error


def _reader(data: DataSettings, split: str, tally: Tally | None, **options: Any) -> ShardReader:
    try:
        return ShardReader(data.root, split, data.classes, tally, **options)
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise ReductionError(
            f"data.name={data.name!r}, data.root={data.root!r}: the shards of split {split!r} are not known ({error}); "
            "list them in _info.json, or give shards and number of images: data.train_split='part-{00..09}.tar|1000'"
        ) from error


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error.args[0] if error.args else ''}"
