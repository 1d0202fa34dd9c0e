"""Look at atoms with a scanning probe: the incoherent image, the scan's wavering, the detector's numbers.

Each atom scatters its own share of the probe's intensity into the annular detector, whatever its neighbours do. abTEM
gives atomic scattering factors and the probe. docs/simulated-data.md says what that leaves out.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.fft import next_fast_len
from scipy.ndimage import map_coordinates
from scipy.signal import lfilter

from alrc_lab.data.crystals import MARGIN_A, MARGIN_PIXELS, Cloud, Field, Floats

_FINE_A = 0.14  # atoms are placed on a grid at least this fine, which errs by less than 1 % of a peak
_ATOMS_UP_TO_A = 1.0  # larger pixels do not resolve them
_BROAD_RMS_A = 2.5  # of the part of the beam that has been scattered out of its column


class Optics(NamedTuple):
    """Say how the probe is formed and which angles are detected."""

    energy_kv: float = 200.0
    semiangle_mrad: float = 24.0
    defocus_A: float = 0.0  # noqa: N815 - the unit's own letter
    spherical_A: float = 0.0  # noqa: N815
    """Third-order spherical aberration, C30."""
    astigmatism_A: float = 0.0  # noqa: N815
    astigmatism_angle: float = 0.0
    """Radians."""
    source_rms_A: float = 0.35  # noqa: N815
    """Gaussian blur by the source's size and fast instabilities."""
    broad: float = 0.0
    """Share of the signal that a thick specimen has spread over neighbouring columns, 0 to 1."""
    inner_mrad: float = 70.0
    outer_mrad: float = 200.0


class Recording(NamedTuple):
    """Say what the scan and the detector do to the signal."""

    dose: float
    """Electrons that the beam brings to a pixel."""
    gain: float = 1.0
    """Units of the image for each electron detected."""
    offset: float = 0.0
    """Units of the image without a beam."""
    readout: float = 0.0
    """Standard deviation of the noise of the electronics, in electrons."""
    afterglow: float = 0.0
    """Share of a pixel's signal that arrives in the next one, 0 to below 1."""
    flicker: float = 0.0
    """Relative standard deviation of the beam current from row to row."""
    jitter: float = 0.0
    """Standard deviation of a row's place along itself, in pixels."""
    drift: float = 0.0
    """Sideways displacement of the last row, as a share of the field."""


@cache
def cross_section(number: int, rms_A: float, energy_kv: float, inner_mrad: float, outer_mrad: float) -> float:  # noqa: N803
    """Integrate what one vibrating atom scatters into the annular detector, by abTEM's scattering factors.

    2πλ² ∫ γ²f(q)² (1 − exp(−4π²u²q²)) q dq: thermal diffuse scattering of an atom that vibrates by itself (Einstein's
    model). Over the periodic table it grows nearly as Z^1.7.

    Args:
        number: Atomic number.
        rms_A: Root mean square displacement u along one axis, in Å.
        energy_kv: Of the beam, in kV.
        inner_mrad: Inner angle of the detector.
        outer_mrad: Outer angle of the detector.

    Returns:
        The cross-section in Å².

    References:
        Pennycook and Jesson, Ultramicroscopy 37 (1991) 14; scattering factors of Lobato and Van Dyck (2014).
    """
    from abtem.core.energy import energy2wavelength, relativistic_mass_correction
    from abtem.parametrizations import LobatoParametrization
    from ase.data import chemical_symbols

    wavelength = energy2wavelength(energy_kv * 1e3)
    q = np.linspace(inner_mrad, outer_mrad, 400) * 1e-3 / wavelength
    at_rest = LobatoParametrization().scattering_factor(chemical_symbols[number])(q**2)
    factor = relativistic_mass_correction(energy_kv * 1e3) * at_rest
    diffuse = -np.expm1(-4 * (np.pi * rms_A * q) ** 2)
    return float(2 * np.pi * wavelength**2 * np.trapezoid(factor**2 * diffuse * q, q))


def scattered_share(specimen: Sequence[Cloud], optics: Optics, field: Field, places: Floats | None = None) -> Floats:
    """Return the share of the beam that reaches the detector at each point of a scan.

    The atoms' cross-sections, smeared by thermal vibration, are convolved with the probe's intensity; a sum s, in Å²
    per Å², becomes 1 − exp(−s), since no electron is scattered away twice.

    Args:
        specimen: Atoms, in Å from the centre of the field.
        optics: Of the microscope.
        field: Its side over its pixel is the number of pixels across, an even number.
        places: Rows and columns that are visited, in pixels, shape (2, n, m); None for the square grid.

    Returns:
        From 0 to 1, float64, shape (side, side) in pixels or (n, m).
    """
    size = round(field.side / field.pixel)
    over = 1 if field.pixel > _ATOMS_UP_TO_A else int(np.ceil(field.pixel / _FINE_A))
    fine = field.pixel / over
    margin = MARGIN_PIXELS if field.pixel > _ATOMS_UP_TO_A else int(np.ceil((MARGIN_A + 2) / fine))
    count = _even_fast_length(size * over + 2 * margin)
    frequency = np.meshgrid(np.fft.fftfreq(count, fine), np.fft.rfftfreq(count, fine), indexing="ij")
    square = frequency[0] ** 2 + frequency[1] ** 2
    total = np.zeros(square.shape, complex)
    for rms in sorted({cloud.rms_A for cloud in specimen}):
        placed = np.zeros((count, count))
        for cloud in specimen:
            if cloud.rms_A == rms:
                _place(placed, cloud, optics, fine)
        total += np.fft.rfft2(placed) * np.exp(-2 * (np.pi * rms) ** 2 * square)
    total *= _transfer(optics, count, fine, square)
    if field.pixel <= _ATOMS_UP_TO_A:  # sharing an atom out over four grid points is a blur of its own: take it back
        total /= (np.sinc(frequency[0] * fine) * np.sinc(frequency[1] * fine)) ** 2
    strength = np.fft.irfft2(total, (count, count)) / fine**2
    if places is None:
        places = np.stack(np.meshgrid(np.arange(size), np.arange(size), indexing="ij")).astype(float)
    at = (places - (size - 1) / 2) * over + (count - 1) / 2
    return -np.expm1(-np.maximum(map_coordinates(strength, at, order=3, mode="nearest"), 0))


def _even_fast_length(least: int) -> int:
    """Return the next even number whose Fourier transform is fast."""
    half = next_fast_len((least + 1) // 2, real=True)
    assert half is not None
    return 2 * half


def _place(grid: Floats, cloud: Cloud, optics: Optics, fine: float) -> None:
    """Add the atoms' cross-sections to the four grid points around each."""
    weight = np.zeros(len(cloud.number))
    for number in np.unique(cloud.number):
        sigma = cross_section(int(number), cloud.rms_A, optics.energy_kv, optics.inner_mrad, optics.outer_mrad)
        weight[cloud.number == number] = sigma
    weight *= cloud.atoms
    count = len(grid)
    place = cloud.xyz_A[:, 1::-1] / fine + (count - 1) / 2
    is_inside = (place >= 0).all(axis=1) & (place < count - 1).all(axis=1)
    place, weight = place[is_inside], weight[is_inside]
    corner = np.floor(place).astype(np.int64)
    part = place - corner
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        share = np.abs(1 - row - part[:, 0]) * np.abs(1 - column - part[:, 1])
        index = (corner[:, 0] + row) * count + corner[:, 1] + column
        grid += np.bincount(index, weight * share, count * count).reshape(count, count)


def _transfer(optics: Optics, count: int, fine: float, square: Floats) -> Floats | NDArray[np.complex128]:
    """Return the transfer function of abTEM's probe intensity, the source, and the spreading in a thick specimen."""
    source = np.exp(-2 * (np.pi * optics.source_rms_A) ** 2 * square)
    if fine > _ATOMS_UP_TO_A:
        return source
    import abtem

    aberrations = {
        "C10": -optics.defocus_A,
        "C30": optics.spherical_A,
        "C12": optics.astigmatism_A,
        "phi12": optics.astigmatism_angle,
    }
    # FFTW measures which of its algorithms is fastest here and now, and each rounds in its own way.
    with abtem.config.set({"fft": "numpy", "precision": "float64"}):
        probe = abtem.Probe(
            energy=optics.energy_kv * 1e3,
            semiangle_cutoff=optics.semiangle_mrad,
            gpts=count,
            sampling=fine,
            aberrations=aberrations,
        )
        intensity = np.asarray(probe.build(lazy=False).intensity().array, float)
    transfer = np.fft.rfft2(np.fft.ifftshift(intensity / intensity.sum()))
    return source * ((1 - optics.broad) * transfer + optics.broad * np.exp(-2 * (np.pi * _BROAD_RMS_A) ** 2 * square))


def detect(rng: np.random.Generator, share: Floats, recording: Recording) -> Floats:
    """Count electrons, and turn counts into the numbers that a detector's electronics would give.

    Args:
        rng: Draws the counts (Poisson), the flicker and the readout noise.
        share: Of the beam that reaches the detector, from 0 to 1; shape (rows, columns), scanned along rows.
        recording: Dose, gain, offset and imperfections.

    Returns:
        gain × (counts + noise) + offset, float64, the shape of `share`. With the defaults, the counts.
    """
    current = recording.dose * (1 + recording.flicker * rng.standard_normal((len(share), 1)))
    counts = rng.poisson(np.maximum(current, 0) * share).astype(float)
    if recording.afterglow:
        counts = np.asarray(lfilter([1 - recording.afterglow], [1, -recording.afterglow], counts, axis=1))
    noise = recording.readout * rng.standard_normal(share.shape)
    return recording.gain * (counts + noise) + recording.offset


def scan_places(rng: np.random.Generator, size: int, recording: Recording) -> Floats:
    """Return the rows and columns, in pixels, shape (2, size, size), that a drifting, trembling scan really visits."""
    row, column = np.meshgrid(np.arange(size), np.arange(size), indexing="ij")
    tremble = np.asarray(lfilter([0.8], [1, -0.6], rng.standard_normal(size))) * recording.jitter
    turn = rng.uniform(0, 2 * np.pi)
    slide = recording.drift * (row - size / 2)
    return np.stack([row + np.sin(turn) * slide, column + np.cos(turn) * slide + tremble[:, None]])
