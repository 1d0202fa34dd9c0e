"""Make the embedded default of partial-STEM: simulated high-angle annular dark-field micrographs, from a seed, cached.

An experiment must run on a machine with no micrographs and no network. specimens.py places atoms, microscope.py looks
at them; here each specimen gets a microscope, and what is made is kept in the user's cache. The user's page is
docs/simulated-data.md.

`python -m alrc_lab.data.simulated FOLDER` writes the micrographs as TIFF; `--sheet FILE` draws an overview of them.
"""

import argparse
import hashlib
import io
import json
import os
import re
import sys
import tempfile
import zipfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from platformdirs import user_cache_dir

from alrc_lab.data.crystals import Field
from alrc_lab.data.image_set import DataError
from alrc_lab.data.microscope import Optics, Recording, detect, scan_places, scattered_share
from alrc_lab.data.specimens import SCENES, Scene

LEAST_SIZE = 64
"""Smallest height and width in pixels."""

_PACKAGES = ("abtem", "ase", "numpy", "scipy")
_SOURCES = ("crystals.py", "microscope.py", "simulated.py", "specimens.py")
_SECONDS_EACH = 0.5  # at 512 × 512, on one core, to say how long it will take


class SimulatedMicrograph(NamedTuple):
    """Hold one micrograph, what it shows and how large its pixels are."""

    name: str
    image: NDArray[np.float32]
    """Shape (size, size), in the arbitrary units of a detector."""
    pixel_nm: float


def simulated_micrographs(
    count: int = 48,
    size: int = 512,
    seed: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    on_message: Callable[[str], None] | None = None,
) -> list[tuple[str, NDArray[np.float32]]]:
    """Return simulated micrographs, from the cache where they have been made before.

    The first ones of a longer list are those of a shorter one. Made by the same code and packages on the same kind of
    machine, they are the same to the last bit.

    Args:
        count: How many, at least 1; after each round of `SCENES` the next one draws other specimens.
        size: Height and width in pixels, an even number from `LEAST_SIZE`; pixel sizes do not depend on it.
        seed: A whole number from 0.
        cache_dir: Folder for the cache; None for the user's.
        on_message: Called with one sentence before anything that takes long; None writes it to stderr.

    Returns:
        Names and images, float32, shape (size, size), finite, not constant; the caller may write to them.

    Raises:
        DataError: A setting is impossible, a package is missing, or `cache_dir` cannot be written to.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [(name, image)] = simulated_micrographs(1, 64, cache_dir=folder, on_message=lambda sentence: None)
        >>> name, image.shape, image.dtype.name
        ('000 SrTiO3 [001]', (64, 64), 'float32')
    """
    return [(item.name, item.image) for item in _cached(count, size, seed, cache_dir, on_message)]


def simulate(index: int, size: int = 512, seed: int = 0) -> SimulatedMicrograph:
    """Make one micrograph, without the cache: number `index` of what `simulated_micrographs` returns.

    Args:
        index: From 0; its remainder by the number of `SCENES` chooses the scene.
        size: As for `simulated_micrographs`.
        seed: As for `simulated_micrographs`.

    Returns:
        The micrograph.

    Raises:
        DataError: A setting is impossible, or abTEM or ASE is missing.
    """
    _check("index", index, 0)
    _check_image(size, seed)
    scene = SCENES[index % len(SCENES)]
    rng = np.random.default_rng([seed, index])
    pixel = float(rng.uniform(*scene.pixel_A))
    field = Field(size * pixel, pixel)
    try:
        optics, imperfect = _optics(rng, scene, pixel), _recording(rng)
        places = scan_places(rng, size, imperfect)
        share = scattered_share(scene.build(rng, field), optics, field, places)
    except ImportError as error:
        raise DataError(f"simulated micrographs need abTEM and ASE ({error}): pip install 'alrc[lab]'") from error
    bright = np.exp(rng.uniform(*np.log(scene.counts)))
    recording = imperfect._replace(dose=bright / np.percentile(share, 99))
    image = detect(rng, share, recording).astype(np.float32)
    return SimulatedMicrograph(f"{index:03d} {scene.name}", image, pixel / 10)


def _optics(rng: np.random.Generator, scene: Scene, pixel: float) -> Optics:
    """Draw a microscope: aberration-corrected, or as often as not for other than single sheets, an older one."""
    energy = float(rng.choice(scene.energy_kv))
    common = {
        "energy_kv": energy,
        "source_rms_A": rng.uniform(0.3, 0.5) if pixel < 1 else pixel * np.exp(rng.uniform(-1, 1.5)),
        "broad": rng.uniform(0.15, 0.6) if energy > 100 else 0.0,
        "inner_mrad": rng.uniform(55, 90),
        "astigmatism_angle": rng.uniform(0, np.pi),
    }
    if energy > 100 and rng.random() < 0.3:
        optics = Optics(semiangle_mrad=10, defocus_A=rng.uniform(350, 520), spherical_A=1e7, **common)
        return optics._replace(astigmatism_A=rng.uniform(0, 40))
    optics = Optics(semiangle_mrad=rng.uniform(20, 30), defocus_A=rng.normal(0, 25), **common)
    return optics._replace(spherical_A=rng.normal(0, 5e3), astigmatism_A=rng.uniform(0, 25))


def _recording(rng: np.random.Generator) -> Recording:
    """Draw the imperfections of a scan and a detector; the dose is not known before the signal is."""
    gain = float(np.exp(rng.uniform(0, np.log(300))))
    return Recording(
        dose=0,
        gain=gain,
        offset=gain * rng.uniform(2, 30),
        readout=rng.uniform(0.3, 1.5),
        afterglow=rng.choice([0, 0, 0.15, 0.3]),
        flicker=rng.uniform(0, 0.03) * rng.integers(2),
        jitter=rng.uniform(0.05, 0.5),
        drift=rng.uniform(0, 0.006),
    )


def _check(name: str, value: object, least: int) -> None:
    """Refuse what is not a whole number large enough."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise DataError(f"{name} is {value!r}: use a whole number from {least}")


def _check_image(size: int, seed: int) -> None:
    """Refuse impossible settings of an image."""
    _check("size", size, LEAST_SIZE)
    _check("seed", seed, 0)
    if size % 2:
        raise DataError(f"size is {size}: use an even number")


# ------------------------------------------------------------------------------------------------------------- cache


def _cached(
    count: int,
    size: int,
    seed: int,
    cache_dir: str | os.PathLike[str] | None,
    on_message: Callable[[str], None] | None,
) -> list[SimulatedMicrograph]:
    """Read the micrographs of these settings, or make and keep them; of two processes that want them one does it."""
    _check("count", count, 1)
    _check_image(size, seed)
    say = on_message or (lambda sentence: print(sentence, file=sys.stderr, flush=True))
    folder = Path(user_cache_dir("alrc")) / "simulated" if cache_dir is None else Path(cache_dir).expanduser()
    file = folder / f"micrographs-{_key(count, size, seed)}.npz"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):
            found = _read(file, count, size, say)
            if found is None:
                about = max(1, round(2 + _SECONDS_EACH * count * max(0.2, (size / 512) ** 2)))
                say(f"simulating {count} micrographs of {size}×{size} pixels, about {about} s, to be kept in {file}")
                found = [simulate(index, size, seed) for index in range(count)]
                _write(file, found)
            return found
    except OSError as error:
        if cache_dir is not None:
            raise DataError(f"cache_dir {folder} cannot be used ({error.strerror}): give another folder") from error
        say(f"simulating {count} micrographs that cannot be kept: {folder} cannot be used ({error.strerror})")
        return [simulate(index, size, seed) for index in range(count)]


def _key(count: int, size: int, seed: int) -> str:
    """Hash everything that decides about a pixel: settings, packages and this package's own text."""
    digest = hashlib.sha256()
    try:
        versions = [version(package) for package in _PACKAGES]
    except PackageNotFoundError as error:
        raise DataError(f"simulated micrographs need {error.name}: pip install 'alrc[lab]'") from error
    digest.update(json.dumps([int(count), int(size), int(seed), versions]).encode())
    for name in _SOURCES:
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()[:16]


def _read(file: Path, count: int, size: int, say: Callable[[str], None]) -> list[SimulatedMicrograph] | None:
    """Return what a file of the cache holds; None where there is none, or one that is damaged."""
    if not file.exists():
        return None
    try:
        with file.open("rb") as handle, np.load(handle, allow_pickle=False) as held:
            names, images, pixels = (held[key] for key in ("names", "images", "pixel_nm"))
        if images.shape != (count, size, size) or images.dtype != np.float32 or not len(names) == len(pixels) == count:
            raise ValueError(f"it holds {images.dtype} {images.shape}")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as damage:
        say(f"{file} is damaged ({damage}); it is made again")
        return None
    return [SimulatedMicrograph(str(n), np.array(i), float(p)) for n, i, p in zip(names, images, pixels, strict=True)]


def _write(file: Path, found: list[SimulatedMicrograph]) -> None:
    """Put micrographs into a file that appears whole or not at all."""
    names, images, pixels = zip(*found, strict=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=".making-", suffix=".npz", delete=False) as temporary:
        try:
            np.savez(temporary, names=np.array(names), images=np.stack(images), pixel_nm=np.array(pixels))
            temporary.close()
            Path(temporary.name).replace(file)
        except BaseException:
            temporary.close()
            Path(temporary.name).unlink(missing_ok=True)
            raise


# ----------------------------------------------------------------------------------------------------- files to see


def write_micrographs(
    folder: str | os.PathLike[str],
    count: int = 48,
    size: int = 512,
    seed: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
) -> list[Path]:
    """Write simulated micrographs as float32 TIFF files that carry their pixel size, in nm, the way ImageJ reads it.

    Args:
        folder: Where to; it is created, and files of the same name are replaced.
        count: As for `simulated_micrographs`.
        size: As for `simulated_micrographs`.
        seed: As for `simulated_micrographs`.
        cache_dir: As for `simulated_micrographs`.

    Returns:
        The files, in order.

    Raises:
        DataError: A setting is impossible, or a folder cannot be written to.
    """
    import tifffile

    written: list[Path] = []
    root = Path(folder).expanduser()
    for item in _cached(count, size, seed, cache_dir, None):
        file = root / f"{re.sub('[^A-Za-z0-9]+', '_', item.name).strip('_')}.tif"
        per_nm = 1 / item.pixel_nm
        try:
            root.mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(
                file, item.image, imagej=True, resolution=(per_nm, per_nm), metadata={"unit": "nm", "Info": item.name}
            )
        except OSError as error:
            raise DataError(f"{file} cannot be written ({error.strerror}): give another folder") from error
        written.append(file)
    return written


def draw_contact_sheet(
    file: str | os.PathLike[str],
    count: int = 48,
    size: int = 512,
    seed: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """Draw simulated micrographs side by side, each from its 0.2nd to its 99.8th percentile, as a PNG.

    Args:
        file: The picture to write.
        count: As for `simulated_micrographs`.
        size: As for `simulated_micrographs`.
        seed: As for `simulated_micrographs`.
        cache_dir: As for `simulated_micrographs`.

    Returns:
        The picture.

    Raises:
        DataError: A setting is impossible, or the file cannot be written.
    """
    from matplotlib.figure import Figure
    from PIL import Image

    items = _cached(count, size, seed, cache_dir, None)
    columns = min(6, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(2.4 * columns, 2.55 * rows), dpi=80, layout="constrained")
    for place, item in enumerate(items):
        axes = figure.add_subplot(rows, columns, place + 1)
        low, high = np.percentile(item.image, (0.2, 99.8))
        axes.imshow(item.image, cmap="gray", vmin=low, vmax=high)
        axes.set_title(f"{item.name}, {size * item.pixel_nm:.0f} nm", fontsize=6.5)
        axes.set_axis_off()
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    try:
        # 32 greys are as many as the eye tells apart at this size, and a third of the bytes.
        Image.open(drawn).convert("L").quantize(32).save(file, format="png", optimize=True)
    except OSError as error:
        raise DataError(f"{file} cannot be written ({error.strerror}): give another file") from error
    return Path(file)


def main(arguments: list[str] | None = None) -> int:
    """Write the micrographs, the overview, or both, as the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m alrc_lab.data.simulated", description="Write simulated micrographs."
    )
    parser.add_argument("folder", nargs="?", help="folder for the TIFF files; it is created")
    parser.add_argument("--sheet", help="PNG file for an overview")
    for name, default in (("count", 48), ("size", 512), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args(arguments)
    if not (given.folder or given.sheet):
        parser.error("name a folder, or a file with --sheet")
    try:
        if given.folder:
            written = write_micrographs(given.folder, given.count, given.size, given.seed)
            print(f"{len(written)} micrographs in {given.folder}")
        if given.sheet:
            print(draw_contact_sheet(given.sheet, given.count, given.size, given.seed))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
