"""Class folders: what they must hold, looked at before anything is started."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from pathlib import Path

from mlpreduce.errors import ReductionError

__all__ = ["check_folders", "check_places", "compare_classes", "split_folders"]

_NAMED = 5  # classes that a message names


def check_folders(root: str, val_share: float = 0.0) -> None:
    """Check that `root` holds train/ and val/ with the same class folders, or class folders to hold images out of.

    Each class folder is read up to its first image only; `check_places` looks at every image once they are listed.

    Args:
        root: the directory.
        val_share: share of each class that is held out for validation; above 0, `root` holds the class folders themselves.

    Raises:
        ReductionError: something is missing, cannot be read, or differs between train/ and val/, or there is one class only.
    """
    folders = split_folders(root)
    if val_share:
        _check_undivided(root, val_share, folders)
        return
    missing = [f"{name}/" for name, folder in folders.items() if folder is None]
    if missing:
        fact = (
            "is not set"
            if not root
            else "does not exist"
            if not os.path.lexists(root)
            else f"has no {' and no '.join(missing)}"
        )
        raise ReductionError(
            f"data.root={root!r} {fact}; it must hold train/ and val/ (or validation/), each with one folder of images "
            "per class, as ImageNet's; or one folder of images per class, with data.val_share=0.2, the share of each class to "
            "hold out for validation. Without data: the recipes `digits` (real images, no download) and "
            "`paper_vitb16_tiny` (synthetic images)"
        )
    train, val = (_classes(folder) for folder in folders.values() if folder is not None)
    compare_classes(train, val, f"data.root={root!r}")
    _check_several(train, f"data.root={root!r}", "train/ and val/ hold")


def check_places(root: str, files: Iterable[str]) -> None:
    """Check that every image is directly in a class folder of `root`: timm names a class by the innermost folder.

    Args:
        root: the folder of the class folders.
        files: the paths of the images, each beginning with `root`.

    Raises:
        ReductionError: an image is deeper, beside the class folders, or in a hidden folder; the message names the folders.
    """
    folders = (os.path.relpath(folder, root) for folder in {os.path.dirname(file) for file in files})
    if found := sorted(name for name in folders if os.path.dirname(name) or name.startswith(".")):
        raise _misplaced(root, found)


def compare_classes(train: Collection[str], val: Collection[str], call: str) -> None:
    """Whether training and validation have the same classes; labels are their positions and would shift silently.

    Raises:
        ReductionError: they differ; the message counts and names them.
    """
    lacks = [("val", sorted(set(train) - set(val)), len(train)), ("train", sorted(set(val) - set(train)), len(val))]
    facts = [
        f"{split}/ has no folder for {len(names)} of the {count} classes of the other ({_some(names)})"
        for split, names, count in lacks
        if names
    ]
    if facts:
        raise ReductionError(
            f"{call}: {' and '.join(facts)}; a label is the position of its folder, so the labels of train/ and val/ would "
            "mean different classes. Give both the same class folders"
        )


def split_folders(root: str) -> dict[str, Path | None]:
    """Find the folders of the training set, "train", and of the validation set, "val"; None where there is none.

    Raises:
        ReductionError: `root` cannot be read.
    """
    entries = _entries(Path(root)) if root and os.path.lexists(root) else []
    found = {entry.name for entry in entries if entry.is_dir()}
    names = {"train": ["train"], "val": ["val", "validation"]}
    return {
        split: next((Path(root, folder) for folder in wanted if folder in found), None)
        for split, wanted in names.items()
    }


def _check_undivided(root: str, val_share: float, folders: dict[str, Path | None]) -> None:
    """Refuse a directory whose images cannot be held out: no class folders, or divided into train/ and val/ already."""
    call = f"data.val_share={val_share:g}"
    if not root or not os.path.lexists(root):
        fact = "does not exist" if root else "is not set"
        raise ReductionError(f"{call}: data.root={root!r} {fact}; it must hold one folder of images per class")
    if any(folders.values()):
        remedy = "use data.val_share=0" if folders["val"] is not None else f"use data.root={str(folders['train'])!r}"
        inside = " and ".join(f"{path.name}/" for path in folders.values() if path is not None)
        raise ReductionError(
            f"{call}: data.root={root!r} holds {inside}, which would become classes, and images are held out of the class "
            f"folders in data.root itself; {remedy}"
        )
    _check_several(_classes(Path(root)), f"{call}: data.root={root!r}", "it holds")


def _check_several(names: list[str], call: str, what: str) -> None:
    if len(names) < 2:
        raise ReductionError(
            f"{call}: {what} 1 class folder ({names[0]}); a model needs at least 2 classes to tell apart"
        )


def _misplaced(root: str | Path, names: list[str]) -> ReductionError:
    """Make the error for folders below `root` that hold images and are not class folders."""
    hidden = (
        ""
        if not any(part.startswith(".") for name in names for part in Path(name).parts)
        else ("; remove hidden folders, or move them out of data.root")
    )
    count = "1 folder holds" if len(names) == 1 else f"{len(names)} folders hold"
    return ReductionError(
        f"data.root: {count} images in {str(root)!r}, and {'is' if len(names) == 1 else 'are'} not a class folder of it "
        f"({_some(names)}); the images would be labelled by the innermost folder, so put them directly into their class "
        f"folder{hidden}"
    )


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: OSError) -> ReductionError:
    return ReductionError(
        f"data.root: {str(folder)!r} cannot be read ({error.strerror}); it must be a directory that this user may list"
    )


def _classes(folder: Path) -> list[str]:
    """The names of the class folders.

    Raises:
        ReductionError: there is none, one holds no image or only deeper ones, or images are beside them.
    """
    from timm.data.readers.img_extensions import get_img_extensions

    types = tuple(get_img_extensions())
    entries = _entries(folder)
    beside = [entry.name for entry in entries if entry.name.lower().endswith(types) and not entry.is_dir()]
    folders = [entry.name for entry in entries if entry.is_dir()]
    first = {name: _folder_of_image(folder / name, types) for name in folders}
    misplaced = [path for name, path in first.items() if path is not None and (path != folder / name or name[0] == ".")]
    names = [name for name in folders if not name.startswith(".")]  # .cache and the like are not classes
    empty = [name for name in names if first[name] is None]
    suffix = f"images end in {', '.join(types)}"
    call = f"data.root: {str(folder)!r}"
    if len(empty) == len(names) and not beside:
        fact = f"{len(names)} class folder(s) and no image in any of them" if names else "no class folder and no image"
        raise ReductionError(f"{call} has {fact}; it must hold one folder of images per class; {suffix}")
    if beside:
        raise ReductionError(
            f"{call} has {len(beside)} image(s) beside the class folders ({_some(beside)}), which would become a "
            "class of their own; move them into the folder of their class"
        )
    if misplaced:
        raise _misplaced(folder, [str(path.relative_to(folder)) for path in misplaced])
    if empty:
        raise ReductionError(
            f"{call} has {len(empty)} class folder(s) of {len(names)} without an image ({_some(empty)}), which would not count "
            f"as classes; fill or remove them, in train/ and val/ alike; {suffix}"
        )
    return names


def _folder_of_image(folder: Path, types: tuple[str, ...]) -> Path | None:
    """The folder itself if it holds an image, else one below it that does, or None."""
    deeper = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:  # not to the end: a class may have many images
                if entry.is_dir():
                    deeper.append(folder / entry.name)
                elif entry.name.lower().endswith(types):
                    return folder
    except OSError as error:
        raise _unreadable(folder, error) from error
    found = (_folder_of_image(below, types) for below in deeper)
    return next((path for path in found if path is not None), None)


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
