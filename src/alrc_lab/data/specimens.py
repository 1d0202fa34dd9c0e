"""List the specimens that are simulated: films, edges, sheets, interfaces, grains, particles and single atoms.

Each entry of `SCENES` draws a new specimen of its kind every time it is asked.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.spatial import KDTree

from alrc_lab.data.crystals import (
    CARBON_PER_A3,
    CARBON_RMS_A,
    LAYER_A,
    Cloud,
    Field,
    Floats,
    Height,
    blurred,
    carbon,
    crystal,
    edge,
    keep,
    particle,
    relief,
    substitute,
    whole_atoms,
)

Build = Callable[[np.random.Generator, Field], list[Cloud]]


class Scene(NamedTuple):
    """Name one kind of specimen, and say how it is usually looked at."""

    name: str
    build: Build
    pixel_A: tuple[float, float] = (0.12, 0.26)  # noqa: N815
    energy_kv: tuple[float, ...] = (200.0, 300.0)
    counts: tuple[float, float] = (6.0, 150.0)
    """Range of electrons detected in a bright pixel."""


def _uneven(rng: np.random.Generator, side: float, found: Cloud) -> Cloud:
    """Let the thickness of a film vary slowly, by changing how many atoms each atom stands for."""
    slow, slope = relief(rng, side, side / 1.5), rng.uniform(0.0, 0.25)
    weight = 1 + slope * slow(found.xyz_A[:, 0], found.xyz_A[:, 1])
    return found._replace(atoms=found.atoms * np.maximum(0.3, weight))


def _skin(rng: np.random.Generator, side: float) -> Cloud:
    """Cover a film with the amorphous remains of its preparation."""
    cloudy, level = relief(rng, side, side / 7), rng.uniform(10, 60)
    return carbon(rng, side, lambda x, y: level * np.maximum(0.2, 1 + 0.3 * cloudy(x, y)))


def _film(name: str, zone: tuple[int, int, int], thickness: tuple[float, float], fault: str = "") -> Build:
    """Fill the field with one crystal."""

    def build(rng: np.random.Generator, field: Field) -> list[Cloud]:
        across = (1, 1, 1) if fault else (1, 2, 4)
        found = crystal(rng, field.side, name, zone, rng.uniform(*thickness), across=across, fault=fault)
        return [_uneven(rng, field.side, found), _skin(rng, field.side)]

    return build


def _edge(name: str, zone: tuple[int, int, int], thickest: tuple[float, float]) -> Build:
    """End a crystal in a rough wedge, with a few nanometres of amorphous carbon along its edge."""

    def build(rng: np.random.Generator, field: Field) -> list[Cloud]:
        side, most = field.side, rng.uniform(*thickest)
        distance, slope = edge(rng, side, rng.uniform(1, 5)), rng.uniform(0.8, 2.5)
        found = crystal(rng, side, name, zone, most)
        local = np.minimum(most, 20 + slope * distance(found.xyz_A[:, 0], found.xyz_A[:, 1]))
        found = keep(found, (local > 20) & (found.xyz_A[:, 2] < local))
        skin, rough = rng.uniform(4, 14), relief(rng, side, side / 8)

        def deposit(x: Floats, y: Floats) -> Floats:
            d = distance(x, y)
            return (1 + 0.4 * rough(x, y)) * np.where(d > 0, 15.0, np.maximum(0, 15 * (1 + d / skin)))

        return [_uneven(rng, side, found), carbon(rng, side, deposit)]

    return build


def _sheet(name: str, vacancy: tuple[int, float], dopant: tuple[int, int, float], *, is_torn: bool) -> Build:
    """Spread one atomic layer, with vacancies and foreign atoms, torn or whole, and specks of carbon."""

    def build(rng: np.random.Generator, field: Field) -> list[Cloud]:
        found = crystal(rng, field.side, name, (0, 0, 1), LAYER_A, tilt_mrad=30)
        found = substitute(rng, found, vacancy[0], 0, vacancy[1])
        found = substitute(rng, found, *dopant)
        if is_torn:
            found = keep(found, edge(rng, field.side, 3.0)(found.xyz_A[:, 0], found.xyz_A[:, 1]) > 0)
        dirt = relief(rng, field.side, field.side / 5)
        return [found, carbon(rng, field.side, lambda x, y: np.maximum(0, 9 * (dirt(x, y) - 1.1)))]

    return build


def _twisted(rng: np.random.Generator, field: Field) -> list[Cloud]:
    """Lay a layer of WSe2 over one of MoS2 at a small angle, the upper one ending within the field."""
    angle = rng.uniform(0, 2 * np.pi)
    lower = crystal(rng, field.side, "MoS2", (0, 0, 1), LAYER_A, angle=angle)
    upper = crystal(rng, field.side, "WSe2", (0, 0, 1), LAYER_A, angle=angle + rng.uniform(0.05, 0.3))
    return [lower, keep(upper, edge(rng, field.side, 2.0)(upper.xyz_A[:, 0], upper.xyz_A[:, 1]) > 0)]


def _interface(name: str, zone: tuple[int, int, int], pairs: tuple[tuple[int, int], ...]) -> Build:
    """Exchange elements on one side of a slightly mixed interface between two crystals of one lattice."""

    def build(rng: np.random.Generator, field: Field) -> list[Cloud]:
        found = crystal(rng, field.side, name, zone, rng.uniform(50, 160))
        distance = edge(rng, field.side, 0.8, 0.7)(found.xyz_A[:, 0], found.xyz_A[:, 1])
        for old, new in pairs:
            found = substitute(rng, found, old, new, np.clip(distance / rng.uniform(2, 6) + 0.5, 0, 1))
        return [_uneven(rng, field.side, found), _skin(rng, field.side)]

    return build


def _grains(name: str) -> Build:
    """Tile the field with grains, each near a zone axis and turned its own way, some far from any."""

    def build(rng: np.random.Generator, field: Field) -> list[Cloud]:
        seeds = KDTree(rng.uniform(-0.6, 0.6, (rng.integers(5, 10), 2)) * field.side)
        thickness, grains = rng.uniform(40, 90), []
        wobble = relief(rng, field.side, field.side / 10)
        for grain in range(seeds.n):
            zone = [(1, 1, 0), (0, 0, 1), (1, 1, 1), (1, 1, 2), (3, 4, 7)][rng.integers(5)]
            found = crystal(rng, field.side, name, zone, thickness * rng.uniform(0.8, 1.2), tilt_mrad=8)
            place = found.xyz_A[:, :2] + 1.5 * wobble(found.xyz_A[:, 0], found.xyz_A[:, 1])[:, None]
            grains.append(keep(found, seeds.query(place)[1] == grain))
        return [*grains, _skin(rng, field.side)]

    return build


def _support(rng: np.random.Generator, field: Field, thickness: float, *, is_torn: bool) -> tuple[Cloud, Height]:
    """Make a carbon film of uneven thickness, ending in the field or not; also return its thickness."""
    uneven, cloudy = relief(rng, field.side, field.side / 2.5), relief(rng, field.side, field.side / 9)
    distance, fine = edge(rng, field.side, 0.08 * field.side, 0.4), relief(rng, field.side, field.side / 22)

    def height(x: Floats, y: Floats) -> Floats:
        level = thickness * np.maximum(0.15, 1 + 0.3 * uneven(x, y) + 0.15 * cloudy(x, y) + 0.08 * fine(x, y))
        return level * np.clip(distance(x, y) / (0.4 * field.side), 0, 1) ** 0.7 if is_torn else level

    return carbon(rng, field.side, height), height


def _particles(name: str, count: tuple[int, int], radius: tuple[float, float], *, is_on_axis: bool) -> Build:
    """Scatter metal particles over amorphous carbon."""

    def build(rng: np.random.Generator, field: Field) -> list[Cloud]:
        support, _ = _support(rng, field, rng.uniform(60, 200), is_torn=False)
        clouds, spread = [support], 0.45 if count[1] > 2 else 0.12
        for _ in range(rng.integers(*count, endpoint=True)):
            size = min(rng.uniform(*radius), 0.38 * field.side)
            found = particle(rng, name, size, is_on_axis=is_on_axis)
            place = np.append(rng.uniform(-spread, spread, 2) * field.side, 0)
            clouds.append(found._replace(xyz_A=found.xyz_A + place))
        return clouds

    return build


def _single_atoms(number: int, per_nm2: float, *, is_torn: bool) -> Build:
    """Scatter single heavy atoms, and a few small rafts of them, over a carbon film."""

    def build(rng: np.random.Generator, field: Field) -> list[Cloud]:
        support, height = _support(rng, field, rng.uniform(150, 350), is_torn=is_torn)
        count = max(3, rng.poisson(per_nm2 * field.side**2 / 100))
        xy = rng.uniform(-0.5, 0.5, (count, 2)) * field.side
        rafts = rng.uniform(-0.5, 0.5, (3, 1, 2)) * field.side + rng.normal(0, 3, (3, 8, 2))
        xy = np.concatenate([xy, rafts.reshape(-1, 2)])
        xy = xy[height(xy[:, 0], xy[:, 1]) > 5]
        return [support, whole_atoms(np.insert(xy, 2, 0, axis=1), np.full(len(xy), number), 0.1)]

    return build


def _lamella(rng: np.random.Generator, field: Field) -> list[Cloud]:
    """Show the edge of a silicon lamella under a layer of platinum, at low magnification."""
    side, level = field.side, rng.uniform(400, 900)
    distance = edge(rng, side, 0.01 * side)
    uneven, bend = relief(rng, side, side / 2), rng.uniform(0.05, 0.3) * side

    def silicon(x: Floats, y: Floats) -> Floats:
        d = distance(x, y)
        return level * (d > 0) * (0.7 + 0.4 * np.clip(d / side, 0, 1) + 0.05 * uneven(x, y))

    def platinum(x: Floats, y: Floats) -> Floats:
        d = distance(x, y)
        return 0.06 * level * ((d < 0) & (d > -bend)) * (1 + 0.1 * uneven(x, y))

    return [blurred(field, silicon, 14, 0.05, 0.076), blurred(field, platinum, 78, 0.066, 0.065)]


def _dispersion(rng: np.random.Generator, field: Field) -> list[Cloud]:
    """Show gold particles on the edge of a carbon film, at low magnification."""
    side = field.side
    uneven, distance = relief(rng, side, side / 3), edge(rng, side, 0.05 * side)
    radius = rng.lognormal(np.log(0.022 * side), 0.4, rng.integers(30, 110))
    centre = rng.uniform(-0.55, 0.55, (len(radius), 2)) * side
    is_held = distance(centre[:, 0], centre[:, 1]) > 0

    def film(x: Floats, y: Floats) -> Floats:
        return 400.0 * (distance(x, y) > 0) * np.maximum(0.2, 1 + 0.2 * uneven(x, y))

    def gold(x: Floats, y: Floats) -> Floats:
        found = np.zeros_like(x)
        for r, (a, b) in zip(radius[is_held], centre[is_held], strict=True):
            found += 2 * np.sqrt(np.maximum(0, r**2 - (x - a) ** 2 - (y - b) ** 2))
        return found

    return [blurred(field, film, 6, CARBON_PER_A3, CARBON_RMS_A), blurred(field, gold, 79, 0.059, 0.085)]


SCENES: tuple[Scene, ...] = (
    Scene("SrTiO3 [001]", _film("SrTiO3", (0, 0, 1), (40, 200))),
    Scene("Pt particles on carbon", _particles("Pt", (5, 14), (8, 20), is_on_axis=False), (0.22, 0.36)),
    Scene("Au [110] edge", _edge("Au", (1, -1, 0), (60, 160))),
    Scene("MoS2 with vacancies", _sheet("MoS2", (16, 0.05), (42, 74, 0.02), is_torn=False), (0.12, 0.2), (60.0, 80.0)),
    Scene("Si [110]", _film("Si", (1, -1, 0), (60, 250)), (0.1, 0.2)),
    Scene("Pt atoms on carbon", _single_atoms(78, 0.9, is_torn=True), (0.18, 0.32), (200.0,)),
    Scene("Au [110] twin", _film("Au", (1, -1, 0), (40, 120), "twin"), (0.1, 0.2)),
    Scene("silicon lamella under platinum", _lamella, (4.0, 12.0)),
    Scene("GaAs [110]", _film("GaAs", (1, -1, 0), (60, 220)), (0.1, 0.2)),
    Scene("Au particle on carbon", _particles("Au", (1, 1), (20, 38), is_on_axis=True), (0.16, 0.24)),
    Scene("CeO2 [110] edge", _edge("CeO2", (1, -1, 0), (60, 160))),
    Scene("graphene edge", _sheet("graphene", (6, 0.01), (6, 14, 0.006), is_torn=True), (0.1, 0.16), (60.0,), (5, 40)),
    Scene("LaAlO3 on SrTiO3 [001]", _interface("SrTiO3", (0, 0, 1), ((38, 57), (22, 13)))),
    Scene("Pt [110] stacking fault", _film("Pt", (1, -1, 0), (40, 120), "stacking"), (0.1, 0.2)),
    Scene("gold on carbon, low magnification", _dispersion, (3.0, 9.0)),
    Scene("WSe2 on MoS2, twisted", _twisted, (0.14, 0.28), (60.0, 80.0), (6, 60)),
    Scene("TiO2 [001] edge", _edge("TiO2", (0, 0, 1), (60, 200))),
    Scene("Au grains", _grains("Au"), (0.14, 0.24)),
    Scene("GaN [11-20]", _film("GaN", (1, 1, 0), (60, 200))),
    Scene("Re atoms on carbon, low dose", _single_atoms(75, 1.5, is_torn=False), (0.12, 0.24), (80.0, 200.0), (4, 20)),
    Scene("AlAs on GaAs [110]", _interface("GaAs", (1, -1, 0), ((31, 13),)), (0.12, 0.24)),
    Scene("W [111]", _film("W", (1, 1, 1), (40, 160)), (0.1, 0.18)),
    Scene("MgO [001] edge", _edge("MgO", (0, 0, 1), (80, 250))),
    Scene("Pt particles, on axis", _particles("Pt", (3, 7), (12, 24), is_on_axis=True), (0.16, 0.28)),
)
"""What is simulated, in this order, over and over with other numbers drawn."""
