"""Do what `alrc complete` and `alrc simulate-scan` promise: partial scans made, and completed, from file to file.

As in commands.py: plain values in, words or one JSON document out, an exit code back. torch is loaded when a run is,
so that other commands start quickly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from numpy.typing import NDArray

from alrc_lab.completion_files import (
    MARK,
    ScanFile,
    check_absent,
    check_outputs,
    read_scan,
    write_image,
    write_preview,
)
from alrc_lab.completion_scan import (
    PreparedScan,
    Span,
    in_units,
    mask_doubt,
    prepare_scan,
    rms_percent,
    simulate_detector,
    size_words,
)
from alrc_lab.data.scan import blur, is_constant, normalise, simulate_scan, spiral_coverage, spiral_mask
from alrc_lab.live import finish, open_console, say

_TIFF, _PNG = (".tif", ".tiff"), (".png",)
_Out = Annotated[Path | None, tyro.conf.arg(aliases=("-o",))]


def complete_scan(
    run: Path,
    scan: Path,
    *,
    mask: Path | None = None,
    spiral: float | None = None,
    out: _Out = None,
    values: Literal["auto", "detector", "normalised"] = "auto",
    span: tuple[float, float] | None = None,
    units: Literal["normalised", "scan"] = "normalised",
    nan_as_unscanned: bool = False,
    truth: Path | None = None,
    preview: Path | None = None,
    no_preview: bool = False,
    device: str = "cpu",
    force: bool = False,
    json: bool = False,
) -> int:
    """Complete a partial scan with a trained partial-STEM run, into a float32 TIFF and a PNG preview.

    What lies between the scanned pixels is invented: likely, not measured. docs/complete.md says what that means.

    For example:

        alrc complete results/runs/stem96-huber-alrc-s0-d9a6f91dff scan.tif --mask scan-mask.tif -o completed.tif

    Args:
        run: Folder of a finished run of partial-stem, or the weights.safetensors that it kept.
        scan: TIFF, NPY, DM3, DM4, EMD or HSPY file of the size that was trained.
        mask: File of dwell times: 0 to 1, 8 or 16 bits, or scanned or not. Give this or --spiral.
        spiral: Pitch in pixels of the published spiral, such as 20, instead of a mask.
        out: TIFF file to write; by default the scan's name with -completed, in the current folder.
        values: What the scan holds: intensities of a detector, or a scan in [0, 1] as simulate-scan makes it. auto asks
            the file, and takes detector where it does not say.
        span: Lowest and highest intensity of the whole field, if known; else those of the pixels of long dwell.
        units: Whether the completion is from -1 to 1, or in intensities of the scan.
        nan_as_unscanned: Take scanned pixels that are not finite out of the mask.
        truth: The whole micrograph, if there is one, to print the error of the completion.
        preview: PNG file to write; by default beside the TIFF.
        no_preview: Write no PNG.
        device: Device that completes: cpu, cuda, cuda:1.
        force: Replace files that exist.
        json: Print one JSON document instead of text.
    """
    console = open_console(json)
    if (mask is None) == (spiral is None):
        got = "both" if mask else "neither"
        raise ValueError(f"give either --mask FILE or --spiral PITCH, such as --spiral 20; got {got}")
    target = Path(f"{scan.stem}-completed.tif") if out is None else out
    outputs = {"--out": target} | ({} if no_preview else {"--preview": preview or target.with_suffix(".png")})
    if no_preview and preview is not None:
        raise ValueError(f"give --preview {preview} or --no-preview, not both")
    check_outputs(outputs, [path for path in (scan, mask, truth) if path], {"--out": _TIFF, "--preview": _PNG})
    check_absent(list(outputs.values()), force)

    source = read_scan(scan)
    dwell = _spiral(source.image.shape, spiral) if spiral is not None else read_scan(mask or scan).image
    whole = None if truth is None else read_scan(truth).image
    kind = _kind_of(source, values)
    prepared = prepare_scan(source.image, dwell, values=kind, span=span, nan_as_unscanned=nan_as_unscanned)

    from alrc_lab.completion import load_completer

    completer = load_completer(run, device=device)
    completer.check_size(source.image.shape)
    completion = completer.complete(prepared.inputs)
    image = in_units(units, completion, source.image, prepared)
    trained = _training_words(completer.description)
    say(console, f"run: {completer.source} · {trained}")
    told = "as its file says" if values == "auto" and source.mark else f"--values {values}"
    say(console, f"scan: {scan} · {size_words(source.image.shape)} {source.image.dtype} · {kind} values ({told})")
    doubts = completer.mask_remark(prepared.inputs[1]), mask_doubt(source.image, prepared.inputs[1])
    warnings = [doubt for doubt in doubts if doubt is not None]
    for line in _scan_lines(prepared, warnings, span is not None):
        say(console, line)
    document: dict[str, Any] = {"weights": str(completer.source), "scan": str(scan), "values": kind, "units": units}
    document |= {"span": prepared.span, "scanned": float((prepared.inputs[1] > 0).mean()), "warnings": warnings}
    if whole is not None:
        error, constant = rms_percent(completion, whole)
        say(console, f"error: {error:.2f} % RMS of the full range; of the best constant image {constant:.2f} %")
        document |= {"rms_percent": error, "constant_rms_percent": constant}
    notes = {
        "made by": "alrc complete",
        "weights": f"{completer.source} ({trained})",
        "scan": f"{scan} ({kind} values)",
        "mask": mask or f"spiral of pitch {spiral:g}",
        "units": _unit_words(units, prepared),
        "caution": "what lies between the scanned pixels is inferred, not measured",
    }
    kept = write_image(target, image, source, notes)
    document |= {"out": str(target), "kept": kept, "range": [float(image.min()), float(image.max())]}
    say(
        console, f"wrote {target}: float32, from {image.min():.4g} to {image.max():.4g}; {_unit_words(units, prepared)}"
    )
    say(console, f"kept of the input: {', '.join(kept) or 'nothing (its file has neither pixel size nor description)'}")
    if "--preview" in outputs:
        q, m = prepared.inputs
        panels = [("scan, as the network sees it", np.where(m > 0, q, np.nan)), ("dwell times", m)]
        panels.append((f"completion, {image.min():.3g} to {image.max():.3g}", image))
        panels += [] if whole is None else [("truth, blurred", blur(normalise(whole)))]
        write_preview(outputs["--preview"], panels)
        shown = "scan, mask, completion" + ", truth" * (whole is not None)
        say(console, f"wrote {outputs['--preview']}: {shown}, side by side")
        document["preview"] = str(outputs["--preview"])
    return finish(json, document)


def simulate_partial_scan(
    image: Path,
    *,
    size: int = 96,
    spiral: float = 20,
    seed: int = 0,
    part: str = "centre",
    values: Literal["normalised", "detector"] = "normalised",
    out: _Out = None,
    force: bool = False,
    json: bool = False,
) -> int:
    """Make a partial scan of a part of a micrograph, to try `alrc complete` on: scan, mask and truth as TIFF files.

    It is the published noise model that runs are trained with; docs/stem-data.md has it.

    For example:

        alrc simulate-scan image.dm4 --size 96 --spiral 20 -o scan.tif

    Args:
        image: TIFF, NPY, DM3, DM4, EMD or HSPY file of a whole micrograph.
        size: Side of the part in pixels: that of the run that will complete it.
        spiral: Pitch of the spiral in pixels; 20 is the published one of nominal coverage 1/20.
        seed: Seed of the noise.
        part: `centre`, or row and column of the upper left pixel, such as 128,0.
        values: What to write: the normalised scan in [0, 1], or intensities as of a detector.
        out: TIFF file to write; by default the micrograph's name with -scan, in the current folder. Mask and truth get
            its name with -mask and -truth.
        force: Replace files that exist.
        json: Print one JSON document instead of text.
    """
    console = open_console(json)
    target = Path(f"{image.stem}-scan.tif") if out is None else out
    names = {part_name: target.with_name(f"{target.stem}-{part_name}.tif") for part_name in ("mask", "truth")}
    outputs = {"--out": target} | names
    check_outputs(outputs, [image], dict.fromkeys(outputs, _TIFF))
    check_absent(list(outputs.values()), force)
    if seed < 0:
        raise ValueError(f"--seed must be 0 or more, got {seed}")
    source = read_scan(image)
    row, column = _corner(part, source.image.shape, size)
    crop = source.image[row : row + size, column : column + size]
    place = f"rows {row} to {row + size - 1}, columns {column} to {column + size - 1}"
    if is_constant(crop):
        raise ValueError(f"{image} has no contrast in {place}: choose another --part")
    mask = _spiral(crop.shape, spiral)
    if mask.all():
        raise ValueError(f"a spiral of pitch {spiral:g} scans every pixel: give a larger --spiral, such as 20")
    truth = normalise(crop)
    parts = truth, blur(truth, renormalise=True), mask, np.random.default_rng(seed).random(mask.shape)
    finite = np.where(np.isfinite(crop), crop, 0)
    span = Span(float(finite.min()), float(finite.max()))
    scan = simulate_scan(*parts) if values == "normalised" else simulate_detector(*parts, span)

    notes = {"made by": "alrc simulate-scan", "micrograph": image, "part": place}
    notes |= {
        "span": f"{span.low:.9g} to {span.high:.9g}",
        "spiral": f"pitch {spiral:g} pixels",
        "noise": f"seed {seed}",
    }
    kept = write_image(target, scan, source, notes | {MARK: values})
    write_image(names["mask"], mask, source, notes | {"this is": "the mask: dwell times"})
    write_image(names["truth"], truth, source, notes | {"this is": "the whole part, -1 to 1, not blurred"})
    found = spiral_coverage(size, 1 / spiral)
    say(console, f"micrograph: {image} · {size_words(source.image.shape)} {source.image.dtype} · {source.scale_words}")
    say(console, f"part: {place} · intensities from {span.low:.6g} to {span.high:.6g}")
    say(
        console,
        f"spiral: pitch {spiral:g} pixels (nominally 1/{spiral:g}); line {found.line:.1%} of the pixels, "
        f"{found.pixels:.1%} have any dwell, {found.turns:.1f} turns",
    )
    if crop.dtype.kind == "f" and not np.isfinite(crop).all():
        say(console, f"warning: {np.sum(~np.isfinite(crop)):,} pixels that are not finite were taken as 0")
    say(console, f"wrote {target}: {values} values; {names['mask']}, {names['truth']}")
    say(console, f"kept of the input: {', '.join(kept) or 'nothing (its file has neither pixel size nor description)'}")
    document = {"scan": str(target)} | {name: str(path) for name, path in names.items()}
    document |= {"row": row, "column": column, "size": size, "values": values, "span": span, "seed": seed}
    document |= {"coverage": found._asdict(), "kept": kept}
    return finish(json, document)


def _kind_of(source: ScanFile, values: Literal["auto", "detector", "normalised"]) -> Literal["detector", "normalised"]:
    """Return what a scan holds: as told, as its file says, or else intensities."""
    if values != "auto":
        return values
    return "normalised" if source.mark == "normalised" else "detector"


def _spiral(shape: tuple[int, ...], pitch: float) -> NDArray[np.float32]:
    """Draw the published spiral for an image."""
    if not pitch >= 1:
        raise ValueError(f"--spiral is the pitch in pixels, 1 or more, such as 20; got {pitch:g}")
    if shape[0] != shape[1]:
        raise ValueError(f"a spiral needs a square scan, this one has {size_words(shape)} pixels: give --mask FILE")
    return spiral_mask(shape[0], 1 / pitch)


def _corner(part: str, shape: tuple[int, ...], size: int) -> tuple[int, int]:
    """Return row and column where a part begins."""
    height, width = shape
    if size < 3 or size > min(shape):
        raise ValueError(f"--size must be from 3 to {min(shape)}, the micrograph has {size_words(shape)}; got {size}")
    if part.casefold() in {"centre", "center"}:
        return (height - size) // 2, (width - size) // 2
    words = part.split(",")
    if len(words) != 2 or not all(word.strip().isdecimal() for word in words):
        raise ValueError(f"--part must be centre, or row and column such as 128,0; got {part!r}")
    row, column = (int(word) for word in words)
    if row > height - size or column > width - size:
        raise ValueError(
            f"--part {part} with --size {size} leaves the micrograph of {size_words(shape)}: give at most "
            f"{height - size},{width - size}"
        )
    return row, column


def _scan_lines(prepared: PreparedScan, warnings: list[str], is_given: bool) -> list[str]:
    """Say what was made of scan and mask."""
    m = prepared.inputs[1]
    lines = [f"mask: {(m > 0).mean():.1%} of the pixels scanned, longest dwell {m.max():.3g}, mean {m.mean():.3g}"]
    lines += [f"warning: {warning}" for warning in warnings]
    if prepared.span is not None:
        source = "as given" if is_given else f"darkest and brightest of {prepared.strong:,} pixels of long dwell"
        lines.append(f"span of intensities: {prepared.span.low:.6g} to {prepared.span.high:.6g} ({source})")
    return lines


def _training_words(description: dict[str, Any]) -> str:
    """Say in a few words what a run was trained on, and how well it does."""
    config, data, error = (
        description["config"],
        description["data"],
        description["summary"].get("held_out_rms_percent"),
    )
    words = f"{config['crop_size']}×{config['crop_size']}, {description['step']:,} updates, {data.get('name')}"
    return words if error is None else f"{words}, {error:.2f} % RMS error on held-out crops"


def _unit_words(units: str, prepared: PreparedScan) -> str:
    """Say what the numbers of a completion mean."""
    if units == "scan":
        return "in the intensities of the scan, their mean fitted to the scanned pixels"
    if prepared.span is None:
        return "normalised: -1 is the darkest pixel of the field, 1 the brightest, as far as the network can guess them"
    return f"normalised: -1 stands for {prepared.span.low:.6g}, 1 for {prepared.span.high:.6g}"
