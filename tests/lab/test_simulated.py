"""The simulated micrographs: physics against crystal data, statistics and a multislice; the cache against accidents."""

import hashlib
import itertools
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import tifffile

from alrc_lab.data import DataError, microscope, simulated
from alrc_lab.data.crystals import (
    CRYSTALS,
    Field,
    blurred,
    carbon,
    crystal,
    particle,
    substitute,
    unit_cell,
    whole_atoms,
)
from alrc_lab.data.microscope import Optics, Recording, cross_section, detect, scan_places, scattered_share
from alrc_lab.data.simulated import draw_contact_sheet, simulate, simulated_micrographs, write_micrographs
from alrc_lab.data.specimens import SCENES

SIZE = 80


@pytest.fixture
def rng():
    return np.random.default_rng(5)


@pytest.fixture(autouse=True)
def user_cache(monkeypatch, tmp_path):
    """An empty user cache, so that no test reads or writes the real one."""
    folder = tmp_path / "user"
    monkeypatch.setattr(simulated, "user_cache_dir", lambda name: str(folder / name))
    return folder / "alrc" / "simulated"


@pytest.fixture
def said():
    return []


@pytest.fixture(scope="module")
def micrographs():
    """One of each scene, small."""
    return [simulate(index, SIZE) for index in range(len(SCENES))]


# --- the images --------------------------------------------------------------------------------------------------


def assert_plausible(image):
    """Check that an image is one that a detector could have given."""
    assert image.dtype == np.float32
    assert np.isfinite(image).all()
    values, counts = np.unique(image, return_counts=True)
    assert len(values) > 100
    assert counts.max() < image.size / 10
    low, middle, high = np.percentile(image, (1, 50, 99))
    assert low < middle < high
    assert image.max() - middle < 20 * (high - low)


def test_every_scene_gives_a_plausible_micrograph(micrographs):
    for item in micrographs:
        assert item.image.shape == (SIZE, SIZE)
        assert 0.005 < item.pixel_nm < 1.5
        assert_plausible(item.image)
    assert len({item.name for item in micrographs}) == len(micrographs)


@pytest.mark.parametrize("wrong", ["constant", "not finite", "double", "two values", "one hot pixel"])
def test_an_implausible_image_is_reported(wrong):
    image = np.random.default_rng(0).normal(5, 1, (SIZE, SIZE)).astype(np.float32)
    if wrong == "constant":
        image[:] = 1
    elif wrong == "not finite":
        image[3, 4] = np.nan
    elif wrong == "double":
        image = image.astype(float)
    elif wrong == "two values":
        image = (image > 5).astype(np.float32)
    else:
        image[0, 0] = 1e6
    with pytest.raises(AssertionError):
        assert_plausible(image)


def correlation(a, b):
    return np.corrcoef(a.ravel(), b.ravel())[0, 1]


def test_neighbours_and_rounds_and_seeds_differ(micrographs):
    images = [item.image for item in micrographs]
    images += [simulate(len(SCENES), SIZE).image, simulate(0, SIZE, seed=1).image]
    assert max(abs(correlation(a, b)) for a, b in itertools.combinations(images, 2)) < 0.7
    assert correlation(images[0], images[0]) > 0.7


def test_made_twice_is_made_equal(micrographs):
    for index in range(0, len(SCENES), 5):
        again = simulate(index, SIZE)
        assert again.image.tobytes() == micrographs[index].image.tobytes()
        assert again[::2] == micrographs[index][::2]


# --- the physics -------------------------------------------------------------------------------------------------


def strongest_spacing(image, pixel):
    """Return the period of the strongest lattice fringe, in the unit of `pixel`, from a parabola about the peak."""
    size = len(image)
    window = np.hanning(size)
    power = np.log(np.abs(np.fft.fft2((image - image.mean()) * np.outer(window, window))) + 1e-12)
    frequency = np.fft.fftfreq(size, pixel)
    radius = np.hypot(frequency[:, None], frequency)
    at = np.unravel_index(np.argmax(np.where(radius > 0.1, power, -np.inf)), power.shape)
    found = []
    for axis in (0, 1):
        before, peak, after = (
            power[tuple(np.add(at, step * np.eye(2, dtype=int)[axis]) % size)] for step in (-1, 0, 1)
        )
        found.append(frequency[at[axis]] + 0.5 * (before - after) / (before - 2 * peak + after) / size / pixel)
    return 1 / np.hypot(*found)


FRINGES = {
    # Cube edges over the root of h² + k² + l²; hexagonal ones times √3/2.
    ("SrTiO3", (0, 0, 1)): [3.905, 3.905 / np.sqrt(2)],
    ("Si", (1, -1, 0)): [5.431 / np.sqrt(3), 5.431 / 2],
    ("Au", (0, 0, 1)): [4.078 / 2],
    ("Pt", (1, -1, 0)): [3.924 / np.sqrt(3), 3.924 / 2],
    ("W", (1, 1, 1)): [3.165 / np.sqrt(2)],
    ("CeO2", (1, -1, 0)): [5.411 / np.sqrt(3), 5.411 / 2],
    ("graphene", (0, 0, 1)): [2.461 * np.sqrt(3) / 2],
    ("MoS2", (0, 0, 1)): [3.16 * np.sqrt(3) / 2],
}


def film(rng, name, zone):
    """Look at a crystal with a good probe through a scan that drifts; return counts and the pixel size in Å."""
    field, recording = Field(256 * 0.18, 0.18), Recording(dose=1, jitter=0.2, drift=0.004)
    thickness = 1.0 if zone == (0, 0, 1) and name in ("graphene", "MoS2") else 40.0
    share = scattered_share(
        [crystal(rng, field.side, name, zone, thickness)], Optics(), field, scan_places(rng, 256, recording)
    )
    return detect(rng, share, recording._replace(dose=100 / share.max())), field.pixel


@pytest.mark.parametrize(("name", "zone"), FRINGES, ids=str)
def test_lattice_spacings_are_those_of_the_crystal(rng, name, zone):
    found = strongest_spacing(*film(rng, name, zone))
    assert min(abs(found / true - 1) for true in FRINGES[name, zone]) < 0.02


def test_the_spacing_check_can_fail(rng):
    image, pixel = film(rng, "Au", (0, 0, 1))
    assert abs(strongest_spacing(image, 1.05 * pixel) / (4.078 / 2) - 1) > 0.02


@pytest.mark.parametrize("name", CRYSTALS)
def test_crystals_have_the_density_of_their_cell(rng, name):
    cell, _ = unit_cell(name)
    side = 60.0
    is_layer = name in ("graphene", "MoS2", "WSe2")
    found = crystal(rng, side, name, (0, 0, 1), 1.0 if is_layer else 50.0, tilt_mrad=0)
    extent = 2 * np.abs(found.xyz_A[:, :2]).max()
    lattice = np.asarray(cell.cell.array)
    area, volume = np.linalg.norm(np.cross(lattice[0], lattice[1])), abs(np.linalg.det(lattice))
    expected = len(cell) * (extent**2 / area if is_layer else extent**2 * 50 / volume)
    assert len(found.number) == pytest.approx(expected, rel=0.06)
    assert set(found.number) == set(cell.numbers)


@pytest.mark.parametrize("fault", ["stacking", "twin", ""])
def test_faults_keep_neighbours_at_the_bond_length(rng, fault):
    from scipy.spatial import KDTree

    found = crystal(rng, 30, "Au", (1, -1, 0), 30, across=(1, 1, 1), fault=fault).xyz_A
    inner = found[np.abs(found - found.mean(0)).max(1) < 9]
    distance, _ = KDTree(found).query(inner, 13)
    bond = 4.078 / np.sqrt(2)
    assert np.allclose(distance[:, 1:], bond, rtol=1e-6)
    shifted = found + np.where(found[:, :1] > found[:, 0].mean(), [0.3, 0, 0], 0)  # the twin of this check
    assert not np.allclose(KDTree(shifted).query(inner, 13)[0][:, 1:], bond, rtol=1e-6)


def test_atomic_contrast_follows_the_atomic_number():
    numbers = np.array([6, 8, 14, 22, 38, 42, 78, 79])
    sigma = np.array([cross_section(int(z), 0.075, 200.0, 70.0, 200.0) for z in numbers])
    assert (np.diff(sigma) > 0).all()
    exponent = np.polyfit(np.log(numbers), np.log(sigma), 1)[0]
    assert 1.6 < exponent < 2.0  # Rutherford's law is 2; screening lowers it
    assert cross_section(79, 0.075, 60.0, 70.0, 200.0) > sigma[-1]
    # Unscreened and at rest, a carbon atom would scatter by Rutherford's law: at high angles it nearly does.
    wavelength, gamma = 0.0250793, 1.391390
    rutherford = 4 * np.pi * (6 * gamma / (2 * np.pi**2 * 0.529177)) ** 2 / 4 * wavelength**2
    q = np.array([150, 200]) * 1e-3 / wavelength
    closed = rutherford * (1 / q[0] ** 2 - 1 / q[1] ** 2)
    assert cross_section(6, 10.0, 200.0, 150.0, 200.0) == pytest.approx(closed, rel=0.1)


def test_heavier_columns_and_crystals_are_brighter(rng):
    field, optics = Field(40.0, 0.2), Optics(source_rms_A=0.3)
    mean = {}
    for name in ("graphene", "MoS2", "WSe2"):
        mean[name] = scattered_share([crystal(rng, 40, name, (0, 0, 1), 1.0)], optics, field).mean()
    assert mean["graphene"] < mean["MoS2"] < mean["WSe2"]
    film = crystal(rng, 40, "SrTiO3", (0, 0, 1), 40, angle=0.0, tilt_mrad=0)
    share = scattered_share([film], optics, field)

    def at(number):
        xy = film.xyz_A[(film.number == number) & (np.abs(film.xyz_A[:, :2]).max(1) < 15)][:, :2]
        index = np.rint(xy / 0.2 + (200 - 1) / 2).astype(int)
        return share[index[:, 1], index[:, 0]].mean()

    assert at(38) > at(22) > 1.5 * share.mean()
    lighter = substitute(rng, film, 38, 12, 1.0)
    assert scattered_share([lighter], optics, field).mean() < share.mean()
    assert len(substitute(rng, film, 38, 0, 1.0).number) == (film.number != 38).sum()


def test_vacuum_is_darker_than_crystal_and_thicker_is_brighter(rng):
    field = Field(40.0, 0.2)
    thin, thick = (crystal(rng, 40, "Si", (1, -1, 0), t, tilt_mrad=0, angle=0.0) for t in (30, 120))
    half = thick._replace(atoms=(thick.xyz_A[:, 0] > 0).astype(float))
    share = scattered_share([half], Optics(), field)
    assert share[:, :85].mean() < 0.02 * share[:, 115:].mean()
    ratio = scattered_share([thick], Optics(), field).mean() / scattered_share([thin], Optics(), field).mean()
    assert 3 < ratio < 4.1


def test_one_atom_is_where_it_is_and_as_bright_as_its_cross_section():
    field, optics = Field(30.0, 30 / 200), Optics()
    share = scattered_share([whole_atoms(np.array([[1.0, -4.0, 0.0]]), [47], 0.08)], optics, field)
    assert share.sum() * field.pixel**2 == pytest.approx(cross_section(47, 0.08, 200.0, 70.0, 200.0), rel=0.02)
    row, column = (np.indices(share.shape) * share).reshape(2, -1).sum(1) / share.sum()
    assert (row, column) == pytest.approx((99.5 - 4 / field.pixel, 99.5 + 1 / field.pixel), abs=0.3)


def test_the_image_of_an_atom_does_not_depend_on_where_it_falls_between_pixels():
    field = Field(30.0, 30 / 150)
    peaks = []
    for x in (0.0, 0.05, 0.1):
        places = np.array([[[74.5]], [[74.5 + x / 0.2]]])
        atom = whole_atoms(np.array([[x, 0.0, 0.0]]), [79], 0.08)
        peaks.append(scattered_share([atom], Optics(), field, places).item())
    assert peaks == pytest.approx([peaks[0]] * 3, rel=0.01)


def test_defocus_and_source_blur_the_image(rng):
    film, field = crystal(rng, 30, "SrTiO3", (0, 0, 1), 30), Field(30.0, 0.2)
    sharp = scattered_share([film], Optics(), field).std()
    for worse in (Optics(defocus_A=120), Optics(source_rms_A=0.7), Optics(semiangle_mrad=9), Optics(broad=0.5)):
        assert scattered_share([film], worse, field).std() < 0.8 * sharp


def test_particles_and_carbon_are_what_was_asked_for(rng):
    for _ in range(12):
        found = particle(rng, "Pt", 15.0, is_on_axis=False).xyz_A
        assert 8 < np.linalg.norm(found, axis=1).max() < 24
    found = carbon(rng, 60, lambda x, y: np.full_like(x, 40.0))
    assert len(found.number) == pytest.approx(0.1 * 76**2 * 40, rel=0.06)
    cloud = blurred(Field(400.0, 4.0), lambda x, y: np.full_like(x, 100.0), 14, 0.05, 0.076)
    share = scattered_share([cloud], Optics(source_rms_A=3.0), Field(400.0, 4.0))
    expected = -np.expm1(-5 * cross_section(14, 0.076, 200.0, 70.0, 200.0))
    assert share == pytest.approx(np.full((100, 100), expected), rel=1e-4)


def multislice_profile(semiangle_mrad):
    """Scan over SrTiO3 [001], 20 Å thick, with abTEM's multislice algorithm and two frozen-phonon configurations."""
    import abtem

    atoms = unit_cell("SrTiO3")[0].repeat((4, 4, 5))
    with abtem.config.set({"fft": "numpy", "diagnostics.progress_bar": False}):
        phonons = abtem.FrozenPhonons(atoms, num_configs=2, sigmas=0.08, seed=1)
        line = abtem.LineScan(start=(3.905, 3.905), end=(5.8575, 5.8575), gpts=10, endpoint=True)
        probe = abtem.Probe(energy=200e3, semiangle_cutoff=semiangle_mrad)
        potential = abtem.Potential(phonons, sampling=0.05, slice_thickness=2)
        found = probe.scan(potential, scan=line, detectors=abtem.AnnularDetector(70, 180), lazy=False)
    return np.asarray(found.array)


def incoherent_profile(semiangle_mrad):
    """Ask this package for the same line, from a Sr to a Ti column."""
    cell, rms = unit_cell("SrTiO3")
    atoms = cell.repeat((12, 12, 5))
    cloud = whole_atoms(atoms.positions - (4 * 3.905, 4 * 3.905, 0), atoms.numbers, rms)
    optics = Optics(semiangle_mrad=semiangle_mrad, source_rms_A=0.0, outer_mrad=180)
    line = np.linspace(0, 3.905 / 2, 10) / 0.15 + 49.5
    return scattered_share([cloud], optics, Field(15.0, 0.15), np.stack([line, line])[:, None])[0]


def test_agrees_with_a_multislice_where_the_specimen_is_thin():
    true, found = multislice_profile(25), incoherent_profile(25)
    assert correlation(true, found) > 0.98
    assert found.mean() == pytest.approx(true.mean(), rel=0.3)
    assert correlation(true, incoherent_profile(9)) < 0.95


# --- the detector ------------------------------------------------------------------------------------------------


def test_counts_are_those_of_poisson(rng):
    counts = detect(rng, np.full((400, 400), 0.02), Recording(dose=500))
    assert counts.mean() == pytest.approx(10, rel=0.01)
    assert counts.var() == pytest.approx(counts.mean(), rel=0.03)
    assert (counts == np.rint(counts)).all()
    scaled = detect(rng, np.full((400, 400), 0.02), Recording(dose=500, gain=3.0, offset=7.0))
    assert scaled.mean() == pytest.approx(37, rel=0.01)
    assert scaled.var() == pytest.approx(9 * 10, rel=0.03)


def test_the_statistics_check_can_fail(rng):
    counts = detect(rng, np.full((400, 400), 0.02), Recording(dose=500, afterglow=0.3))
    assert counts.mean() == pytest.approx(10, rel=0.02)
    assert counts.var() != pytest.approx(counts.mean(), rel=0.03)
    noisy = detect(rng, np.full((400, 400), 0.02), Recording(dose=500, readout=2.0))
    assert noisy.var() == pytest.approx(14, rel=0.03)
    flickering = detect(rng, np.full((400, 400), 0.02), Recording(dose=500, flicker=0.1))
    assert flickering.mean(axis=1).std() > 2 * noisy.mean(axis=1).std()


def test_a_scan_without_faults_visits_the_grid(rng):
    assert (scan_places(rng, 8, Recording(dose=1)) == np.indices((8, 8))).all()
    places = scan_places(rng, 512, Recording(dose=1, jitter=0.3, drift=0.005)) - np.indices((512, 512))
    assert np.hypot(*places).max() < 512 * 0.005 + 2
    assert places[1].std(axis=1).max() < 1e-9  # a row moves as a whole
    assert np.diff(places[1][:, 0]).std() > 0.1


# --- the cache ---------------------------------------------------------------------------------------------------


def ask(folder, said, count=2, size=64, seed=0):
    return simulated_micrographs(count, size, seed, folder, on_message=said.append)


def same(a, b):
    return all(x[0] == y[0] and x[1].tobytes() == y[1].tobytes() for x, y in zip(a, b, strict=True))


def test_made_once_said_once_kept_and_read(monkeypatch, tmp_path, said):
    first = ask(tmp_path, said)
    assert len(said) == 1
    assert "simulating 2 micrographs of 64×64" in said[0]
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".lock", ".npz"]
    monkeypatch.setattr(simulated, "simulate", None)
    second = ask(tmp_path, said)
    assert len(said) == 1
    assert same(first, second)
    second[0][1][:] = 0
    assert same(first, ask(tmp_path, said))
    with pytest.raises(TypeError):  # the twin: what is not in the cache is made
        ask(tmp_path, said, seed=1)


def test_a_longer_list_begins_with_the_shorter_one(tmp_path, said):
    assert same(ask(tmp_path, said, count=1), ask(tmp_path, said, count=2)[:1])


def test_settings_versions_and_code_have_files_of_their_own(monkeypatch, tmp_path):
    keys = {simulated._key(*settings) for settings in [(2, 64, 0), (3, 64, 0), (2, 66, 0), (2, 64, 1)]}
    monkeypatch.setattr(simulated, "version", lambda name: version(name) + ".1")
    keys.add(simulated._key(2, 64, 0))
    monkeypatch.undo()
    monkeypatch.setattr(simulated, "_SOURCES", ("crystals.py",))
    keys.add(simulated._key(2, 64, 0))
    assert len(keys) == 6
    monkeypatch.undo()
    assert simulated._key(2, 64, 0) in keys
    folder = Path(simulated.__file__).parent
    text = "".join((folder / name).read_text(encoding="utf-8") for name in simulated._SOURCES)
    used = {f"{name}.py" for name in re.findall(r"^from alrc_lab\.data\.(\w+) import", text, flags=re.MULTILINE)}
    assert used - set(simulated._SOURCES) == {"image_set.py"}  # the type of the errors


@pytest.mark.parametrize("damage", ["cut", "a bit", "empty", "text", "other shape", "no name", "pickled"])
def test_a_damaged_file_is_made_again_and_said(tmp_path, said, damage):
    first = ask(tmp_path, said)
    [file] = tmp_path.glob("*.npz")
    data = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(data[:-3000])
    elif damage == "a bit":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "text":
        file.write_text("hello")
    elif damage == "other shape":
        np.savez(file, names=["a", "b"], images=np.zeros((2, 32, 32), np.float32), pixel_nm=[1.0, 1.0])
    elif damage == "no name":
        np.savez(file, images=np.zeros((2, 64, 64), np.float32))
    else:
        np.savez(file, names=np.array([{}, {}]), images=np.zeros((2, 64, 64), np.float32), pixel_nm=[1.0, 1.0])
    assert same(first, ask(tmp_path, said))
    assert "is damaged" in said[1]
    assert str(file) in said[1]
    assert len(said) == 3
    assert same(first, ask(tmp_path, said))
    assert len(said) == 3


def test_an_interrupted_write_leaves_nothing(monkeypatch, tmp_path, said):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(simulated.np, "savez", stop)
    with pytest.raises(KeyboardInterrupt):
        ask(tmp_path, said)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.dist
def test_two_processes_at_once_make_it_once(tmp_path):
    code = (
        "import sys, hashlib; from alrc_lab.data.simulated import simulated_micrographs as make;"
        "print(hashlib.sha256(b''.join(i.tobytes() for _, i in make(2, 64, 0, sys.argv[1]))).hexdigest())"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [process.communicate() for process in both]
    here = b"".join(simulate(index, 64).image.tobytes() for index in range(2))  # and to the last bit as it is made here
    assert answers[0][0].strip() == answers[1][0].strip() == hashlib.sha256(here).hexdigest()
    assert sum(error.count("simulating") for _, error in answers) == 1
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".lock", ".npz"]


def test_the_users_cache_is_used_and_not_needed(monkeypatch, user_cache, capsys):
    first = simulated_micrographs(1, 64)
    assert list(user_cache.glob("*.npz"))
    assert capsys.readouterr().err.count("\n") == 1
    user_cache.parent.rename(user_cache.parent.with_name("aside"))
    user_cache.parent.write_text("a file where a folder should be")
    assert same(first, simulated_micrographs(1, 64))
    assert "cannot be kept" in capsys.readouterr().err


# --- errors and files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"count": 0}, "count is 0: use a whole number from 1"),
        ({"count": 2.0}, "count is 2.0"),
        ({"count": True}, "count is True"),
        ({"size": 62}, "size is 62: use a whole number from 64"),
        ({"size": 129}, "size is 129: use an even number"),
        ({"seed": -1}, "seed is -1: use a whole number from 0"),
        ({"seed": "a"}, "seed is 'a'"),
    ],
)
def test_impossible_settings_are_named(tmp_path, settings, complaint):
    with pytest.raises(DataError, match=complaint):
        simulated_micrographs(**{"count": 1, "size": 64, "cache_dir": tmp_path, **settings})
    assert not list(tmp_path.iterdir())


def test_a_cache_folder_that_is_a_file_is_an_error(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(DataError, match=f"cache_dir {file} cannot be used"):
        simulated_micrographs(1, 64, cache_dir=file)


def test_a_missing_package_is_said_plainly(monkeypatch, tmp_path, said):
    monkeypatch.setattr(simulated, "_PACKAGES", ("numpy", "no-such-package"))
    with pytest.raises(DataError, match=r"no-such-package: pip install 'alrc\[lab\]'"):
        ask(tmp_path, said)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "abtem", None)
    with pytest.raises(DataError, match=r"pip install 'alrc\[lab\]'"):
        simulate(0, 64)


def test_files_carry_the_pixel_size(tmp_path, user_cache):
    files = write_micrographs(tmp_path / "out", 2, 64)
    assert [file.name for file in files] == ["000_SrTiO3_001.tif", "001_Pt_particles_on_carbon.tif"]
    for index, file in enumerate(files):
        expected = simulate(index, 64)
        with tifffile.TiffFile(file) as tiff:
            assert tiff.asarray().tobytes() == expected.image.tobytes()
            assert tiff.imagej_metadata["unit"] == "nm"
            pixels, length = tiff.pages[0].tags["XResolution"].value
            assert length / pixels == pytest.approx(expected.pixel_nm, rel=1e-5)
    (tmp_path / "in the way").write_text("x")
    with pytest.raises(DataError, match="in the way"):
        write_micrographs(tmp_path / "in the way", 2, 64)


def test_the_command_writes_files_and_a_sheet(tmp_path, capsys):
    assert (
        simulated.main([str(tmp_path / "out"), "--count", "2", "--size", "64", "--sheet", str(tmp_path / "a.png")]) == 0
    )
    assert len(list((tmp_path / "out").glob("*.tif"))) == 2
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "2 micrographs in" in capsys.readouterr().out
    assert simulated.main([str(tmp_path / "out"), "--size", "5"]) == 1
    assert "error: size is 5" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        simulated.main([])
    with pytest.raises(DataError, match=r"b\.png cannot be written"):
        draw_contact_sheet(tmp_path / "nowhere" / "b.png", 2, 64)


def test_nothing_heavy_is_loaded_before_it_is_needed():
    code = (
        "import sys, alrc_lab.data.simulated; print(sorted({'abtem', 'ase', 'matplotlib', 'torch'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_abtem_settings_are_left_as_they_were():
    import abtem

    before = {key: abtem.config.get(key) for key in ("fft", "precision")}
    microscope.scattered_share([whole_atoms(np.zeros((1, 3)), [6], 0.1)], Optics(), Field(20.0, 0.2))
    assert {key: abtem.config.get(key) for key in ("fft", "precision")} == before


@pytest.mark.slow
def test_all_of_them_are_made_in_two_minutes_of_cpu(tmp_path, said):
    before = os.times()
    found = simulated_micrographs(cache_dir=tmp_path, on_message=said.append)
    after = os.times()
    assert after.user + after.system - before.user - before.system < 120
    assert len(found) == 48
    for _, image in found:
        assert image.shape == (512, 512)
        assert_plausible(image)
