"""Find CIFAR-10 in one fixed order, check it, fetch it - or use the embedded patches, and always say which.

The order is: an explicit path, the folder that the environment variable ALRC_DATA names, the user's cache, the
embedded default. What was asked for by name and is missing or damaged is an error, never a reason to go on. Reads the
official binary layout, one label byte and 3,072 channel-major image bytes a record, whatever the record count.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from platformdirs import user_cache_dir

from alrc_lab.data.download import download, file_md5, reject, unpack
from alrc_lab.data.image_set import DataError, ImageSet, Source, Split

FOLDER = "cifar-10-batches-bin"
ARCHIVE = "cifar-10-binary.tar.gz"
URL = f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
FILES: dict[Split, tuple[str, ...]] = {
    "train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    "test": ("test_batch.bin",),
}
OFFICIAL_IMAGES: dict[Split, int] = {"train": 50_000, "test": 10_000}
RECORD_BYTES = 1 + 3 * 32 * 32

_FETCH = "move the folder away and run `alrc data fetch cifar10`"


class _Place(NamedTuple):
    """One place of the search order: a folder of batches, or why there is none (`error`: why searching stops)."""

    where: Source
    path: str
    folder: Path | None = None
    note: str = ""
    error: str | None = None


def load_cifar10(path: str | os.PathLike[str] | None = None, *, split: Split = "train") -> ImageSet:
    """Load the first CIFAR-10 copy of the search order, or the embedded patches where there is none.

    Args:
        path: A folder `cifar-10-batches-bin` or its parent; "embedded" for the embedded patches; None to search
            ALRC_DATA, the user's cache and the embedded patches, in this order.
        split: "train" (data_batch_1 to 5) or "test" (test_batch).

    Returns:
        The images with their source, path, count and checksum.

    Raises:
        DataError: `path` or ALRC_DATA names a folder that is missing, `path` holds no batches, or a batch file of the
            copy found is missing, truncated or not CIFAR-10.

    Example:
        >>> image_set = load_cifar10("embedded", split="test")
        >>> image_set.source, image_set.images.dtype.name, image_set.images.shape[1:]
        ('embedded', 'uint8', (3, 32, 32))
    """
    _check_split(split)
    searched: list[str] = []
    for place in _places(path):
        if place.error is not None:
            raise DataError(place.error)
        if place.folder is not None or place.where == "embedded":
            return _load(place, split, tuple(searched))
        searched.append(f"{place.where}: {place.note}")
    raise AssertionError("the search order ends with the embedded default")


def data_status(path: str | os.PathLike[str] | None = None, *, split: Split = "train") -> list[dict[str, Any]]:
    """Say for each place of the search order what it holds; a damaged copy is reported, not raised.

    Args:
        path: As for `load_cifar10`; adds a first entry.
        split: "train" or "test".

    Returns:
        One JSON-ready dict a place: `where`, `path` ("" where unset), `found`, `images` and `sha256` (None where
        nothing could be read), `note`, `error` (None where all is well), and `used`, true for the one that
        `load_cifar10` with the same arguments returns - for none where it raises.
    """
    _check_split(split)
    entries: list[dict[str, Any]] = []
    is_settled = False
    for place in _places(path):
        found = place.folder is not None or place.where == "embedded"
        images, sha256, note, error = None, None, place.note, place.error
        if found:
            try:
                image_set = _load(place, split, ())
                images, sha256, note = len(image_set.images), image_set.sha256, image_set.note
            except DataError as damage:
                error = str(damage)
        entries.append(
            {
                "where": place.where,
                "path": place.path,
                "found": found,
                "images": images,
                "sha256": sha256,
                "note": note,
                "error": error,
                "used": found and error is None and not is_settled,
            }
        )
        is_settled = is_settled or found or error is not None
    return entries


def fetch_cifar10(
    destination: str | os.PathLike[str] | None = None,
    *,
    url: str = URL,
    md5: str = MD5,
    on_progress: Callable[[int, int | None], None] | None = None,
    on_message: Callable[[str], None] | None = None,
) -> Path:
    """Download, check and unpack the official archive; do nothing where the whole of it is already there.

    An interrupted download goes on where it stopped. An archive placed by hand in `destination` is used instead of
    the network. The batches appear under their final name only when all of them have been read and found good.

    Args:
        destination: Folder to put `cifar-10-batches-bin` in; None for the user's cache, where `load_cifar10` looks.
        url: Address of the archive.
        md5: Its checksum.
        on_progress: Called with bytes present so far and bytes in all (None where the server does not say).
        on_message: Called with one sentence for each thing worth telling: already there, going on, starting again.

    Returns:
        The folder of the batches.

    Raises:
        DataError: In one line, the address and why it failed, and how to place the file by hand; or the archive is
            not the expected one; or the folder exists and is not the complete official set.
    """
    say = on_message or (lambda sentence: None)
    root = _cache() if destination is None else Path(destination).expanduser().absolute()
    folder, archive = root / FOLDER, root / ARCHIVE
    if folder.exists():
        say(f"already there: {_complete(folder)} in {folder}")
        return folder
    is_by_hand = archive.exists()
    if is_by_hand:
        say(f"using {archive}, which is already there")
        if (digest := file_md5(archive)) != md5:
            raise reject(archive, archive, digest=digest, expected=md5, origin=str(archive))
    else:
        try:
            download(url, archive, md5=md5, on_progress=on_progress or (lambda done, total: None), on_message=say)
        except DataError as error:
            raise DataError(
                f"{error}. By hand: get {ARCHIVE} on any machine, put it into {root} and repeat the command, "
                f"or unpack it there so that {folder / FILES['train'][0]} exists"
            ) from error
    _install(archive, folder)
    if not is_by_hand:
        archive.unlink()
    say(f"unpacked: {_complete(folder)} in {folder}")
    return folder


def _install(archive: Path, folder: Path) -> None:
    """Unpack beside the final folder, read every batch, then rename."""
    wanted = {name for names in FILES.values() for name in names}
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpacking-") as temporary:
            fresh = Path(temporary) / FOLDER
            fresh.mkdir()
            found = unpack(archive, fresh, top=FOLDER, names={*wanted, "batches.meta.txt", "readme.html"})
            if missing := wanted - found:
                names = ", ".join(sorted(missing))
                raise DataError(f"{archive} holds no {names}: it is not the CIFAR-10 binary archive")
            _complete(fresh)
            fresh.replace(folder)
    except OSError as error:
        raise DataError(f"{folder} could not be written: {error.strerror}. {archive} is kept") from error


def _complete(folder: Path) -> str:
    """Return a sentence on the complete official set in a folder; raise if it is anything less."""
    advice = f"Move {folder} away and fetch again"
    for split, official in OFFICIAL_IMAGES.items():
        try:
            count = len(_read(folder, split)[1])
        except DataError as error:
            raise DataError(f"{error}. {advice}") from error
        if count != official:
            raise DataError(
                f"{folder} holds {count:,} {split} images where the official set has {official:,}. {advice}, "
                "or go on using this part as it is"
            )
    return f"the {OFFICIAL_IMAGES['train']:,} training and {OFFICIAL_IMAGES['test']:,} test images of CIFAR-10"


def _check_split(split: str) -> None:
    """Refuse a split that does not exist."""
    if split not in FILES:
        raise DataError(f"split is {split!r}: use 'train' or 'test'")


def _cache() -> Path:
    """Return the user's cache folder, the one place this package ever writes to by itself."""
    return Path(user_cache_dir("alrc"))


def _places(path: str | os.PathLike[str] | None) -> list[_Place]:
    """Return the search order as it stands on this machine now."""
    embedded = _Place("embedded", "embedded")
    if path is not None and os.fspath(path) == "embedded":
        return [embedded]
    explicit = [] if path is None else [_explicit_place(os.fspath(path))]
    return [*explicit, _environment_place(), _cache_place(), embedded]


def _explicit_place(path: str) -> _Place:
    """Locate the batches under a path the user gave; anything but batches is an error."""
    if not path:
        return _Place("path", path, error="the data path is empty: give a folder, or 'embedded'")
    root = Path(path).expanduser().absolute()
    folder, problem = _locate(root)
    if folder is None:
        problem = problem or f"holds neither {FOLDER} nor {FILES['train'][0]}"
        error = f"data path {root} {problem}: give the folder {FOLDER} or its parent, or 'embedded'"
        return _Place("path", str(root), error=error)
    return _Place("path", str(folder), folder)


def _environment_place() -> _Place:
    """Locate the batches under the folder that ALRC_DATA names; that folder must exist."""
    value = os.environ.get("ALRC_DATA", "")
    if not value:
        return _Place("ALRC_DATA", "", note="not set")
    root = Path(value).expanduser().absolute()
    folder, problem = _locate(root)
    if problem:
        return _Place("ALRC_DATA", str(root), error=f"ALRC_DATA names {root}, which {problem}: correct or unset it")
    if folder is None:
        return _Place("ALRC_DATA", str(root), note=f"{root} holds no {FOLDER}")
    return _Place("ALRC_DATA", str(folder), folder)


def _cache_place() -> _Place:
    """Locate the batches in the user's cache, which need not exist."""
    folder, problem = _locate(_cache())
    if folder is None:
        note = f"{_cache()} {problem}" if problem else f"{_cache()} holds no {FOLDER}"
        return _Place("cache", str(_cache() / FOLDER), note=note)
    return _Place("cache", str(folder), folder)


def _locate(root: Path) -> tuple[Path | None, str]:
    """Return the folder of batches that `root` is or holds, and what is wrong with `root` itself, if anything."""
    try:
        if not root.is_dir():
            return None, "is not a folder" if root.exists() else "does not exist"
        if any((root / name).exists() for names in FILES.values() for name in names):
            return root, ""
        return (root / FOLDER if (root / FOLDER).exists() else None), ""
    except OSError as error:
        return None, f"cannot be opened ({error.strerror})"


def _load(place: _Place, split: Split, searched: tuple[str, ...]) -> ImageSet:
    """Read what a place holds into an image set."""
    if place.folder is None:
        return _embedded(split, searched)
    images, labels, sha256 = _read(place.folder, split)
    count, official = len(images), OFFICIAL_IMAGES[split]
    kind = "training" if split == "train" else "test"
    of_all = f"all {count:,}" if count == official else f"{count:,}"
    return ImageSet(
        name="CIFAR-10",
        slug=f"cifar10-{count}" if split == "train" else f"cifar10-test-{count}",
        source=place.where,
        path=place.path,
        images=images,
        labels=labels,
        sha256=sha256,
        split=split,
        note=f"{of_all} of CIFAR-10's {official:,} {kind} images",
        searched=searched,
    )


def _embedded(split: Split, searched: tuple[str, ...]) -> ImageSet:
    """Wrap the embedded patches into an image set."""
    from alrc_lab.data.patches import PHOTOGRAPHS, natural_patches

    images = natural_patches(split)
    return ImageSet(
        name="natural-image patches",
        slug=f"patches-{len(images)}" if split == "train" else f"patches-test-{len(images)}",
        source="embedded",
        path="embedded",
        images=images,
        labels=None,
        sha256=hashlib.sha256(images.tobytes()).hexdigest(),
        split=split,
        note=f"{len(images):,} patches of {len(PHOTOGRAPHS)} photographs from scikit-image, not CIFAR-10",
        searched=searched,
    )


def _read(folder: Path, split: Split) -> tuple[np.ndarray, np.ndarray, str]:
    """Read and check a split's batch files: images (N, 3, 32, 32), labels (N,), SHA-256 of the bytes."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: remove it and run `alrc data fetch cifar10`")
    missing = [name for name in FILES[split] if not (folder / name).exists()]
    if missing:
        raise DataError(f"{folder} lacks {', '.join(missing)}. Put the missing files there, or {_FETCH}")
    digest = hashlib.sha256()
    batches: list[np.ndarray] = []
    for name in FILES[split]:
        data = _read_batch(folder / name)
        digest.update(data)
        batches.append(np.frombuffer(data, np.uint8).reshape(-1, RECORD_BYTES))
    images = np.concatenate([batch[:, 1:] for batch in batches]).reshape(-1, 3, 32, 32)
    labels = np.concatenate([batch[:, 0] for batch in batches])
    return images, labels, digest.hexdigest()


def _read_batch(file: Path) -> bytes:
    """Return a batch file's bytes once they are whole records with labels 0 to 9."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}. Replace it, or {_FETCH}") from error
    if not data or len(data) % RECORD_BYTES:
        raise DataError(
            f"{file} has {len(data):,} bytes, not a positive multiple of {RECORD_BYTES:,} (one label byte and "
            f"3,072 image bytes a record): it is truncated or not CIFAR-10's binary version. Replace it, or {_FETCH}"
        )
    labels = np.frombuffer(data, np.uint8)[::RECORD_BYTES]
    if labels.max() > 9:
        record = int(np.argmax(labels > 9))
        raise DataError(
            f"{file} ({len(data):,} bytes) has label {labels[record]} in record {record:,}, where labels are 0 to 9: "
            f"it is damaged or not CIFAR-10's binary version. Replace it, or {_FETCH}"
        )
    return data
