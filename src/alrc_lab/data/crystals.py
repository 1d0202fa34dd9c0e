"""Place the atoms of the simulated micrographs: crystals with faults, metal particles, amorphous carbon, rough edges.

A specimen is a list of clouds of points. Lengths are in Å, x and y count from the centre of the field, the
beam runs along z. ASE gives unit cells and clusters. Knows nothing of microscopes; what is made of it is specimens.py.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

Floats = NDArray[np.floating[Any]]
Height = Callable[[Floats, Floats], Floats]

MARGIN_A = 8.0  # atoms just outside the field shine into it
MARGIN_PIXELS = 24  # the same where pixels are large
CARBON_PER_A3 = 0.1  # amorphous, 2 g/cm³
CARBON_RMS_A = 0.1
LAYER_A = 1.0  # "a single layer", for crystals whose cell is one


class Cloud(NamedTuple):
    """Hold points of one vibration amplitude: where they are, of which element, and how many atoms each stands for."""

    xyz_A: Floats  # noqa: N815 - the unit's own letter
    """Shape (n, 3)."""
    number: NDArray[np.int64]
    """Atomic numbers, shape (n,)."""
    atoms: Floats
    """Shape (n,): 1, or a density times a volume where atoms are too small to be told apart."""
    rms_A: float  # noqa: N815
    """Root mean square thermal displacement along one axis."""


class Field(NamedTuple):
    """Say how large a square field of view is, and its pixels."""

    side: float
    """Å."""
    pixel: float
    """Å."""


# ------------------------------------------------------------------------------------------------------- unit cells


def _bulk(symbols: str, structure: str, **cell: Any) -> Callable[[], Any]:
    """Defer `ase.build.bulk`, so that ASE is loaded only where a crystal is built."""

    def make() -> Any:
        from ase.build import bulk

        return bulk(symbols, structure, **cell)

    return make


def _perovskite(formula: str, edge: float) -> Callable[[], Any]:
    """Defer a cubic ABO3 cell."""

    def make() -> Any:
        from ase import Atoms

        places = [(0, 0, 0), (0.5, 0.5, 0.5), (0.5, 0.5, 0), (0.5, 0, 0.5), (0, 0.5, 0.5)]
        return Atoms(formula, scaled_positions=places, cell=[edge] * 3)

    return make


def _rutile() -> Any:
    """Return the cell of rutile."""
    from ase import Atoms

    u = 0.305
    oxygen = [(u, u, 0), (-u, -u, 0), (0.5 + u, 0.5 - u, 0.5), (0.5 - u, 0.5 + u, 0.5)]
    return Atoms("Ti2O4", scaled_positions=[(0, 0, 0), (0.5, 0.5, 0.5), *oxygen], cell=[4.594, 4.594, 2.959])


def _dichalcogenide(formula: str, edge: float, thickness: float) -> Callable[[], Any]:
    """Defer one layer of the 2H form."""

    def make() -> Any:
        from ase.build import mx2

        return mx2(formula, "2H", a=edge, thickness=thickness, vacuum=5.0)

    return make


def _graphene() -> Any:
    """Return the cell of graphene."""
    from ase.build import graphene

    return graphene(a=2.461, vacuum=5.0)


CRYSTALS: dict[str, tuple[Callable[[], Any], float]] = {
    "Si": (_bulk("Si", "diamond", a=5.431, cubic=True), 0.076),
    "GaAs": (_bulk("GaAs", "zincblende", a=5.653, cubic=True), 0.08),
    "GaN": (_bulk("GaN", "wurtzite", a=3.189, c=5.185), 0.06),
    "Au": (_bulk("Au", "fcc", a=4.078, cubic=True), 0.085),
    "Pt": (_bulk("Pt", "fcc", a=3.924, cubic=True), 0.065),
    "W": (_bulk("W", "bcc", a=3.165, cubic=True), 0.045),
    "MgO": (_bulk("MgO", "rocksalt", a=4.212, cubic=True), 0.065),
    "CeO2": (_bulk("CeO2", "fluorite", a=5.411, cubic=True), 0.065),
    "SrTiO3": (_perovskite("SrTiO3", 3.905), 0.08),
    "TiO2": (_rutile, 0.07),
    "graphene": (_graphene, 0.06),
    "MoS2": (_dichalcogenide("MoS2", 3.16, 3.13), 0.07),
    "WSe2": (_dichalcogenide("WSe2", 3.282, 3.34), 0.07),
}
"""Makers of unit cells with measured lattice constants, and rms thermal displacements at 293 K, rounded, in Å."""


@cache
def unit_cell(name: str) -> tuple[Any, float]:
    """Return the ASE unit cell of a crystal in `CRYSTALS`, not to be changed, and its rms displacement in Å."""
    make, rms = CRYSTALS[name]
    return make(), rms


# --------------------------------------------------------------------------------------------------- building blocks


def relief(rng: np.random.Generator, side: float, scale: float) -> Height:
    """Draw a smooth random height over the field: mean 0, variance about 1, features of size `scale` in Å."""
    count = int(np.ceil(1.6 * side / scale)) + 5
    grid, centre = 1.6 * rng.standard_normal((count, count)), (count - 1) / 2

    def height(x: Floats, y: Floats) -> Floats:
        at = np.stack([y.ravel(), x.ravel()]) / scale + centre
        return map_coordinates(grid, at, order=3, mode="nearest").reshape(x.shape)

    return height


def edge(rng: np.random.Generator, side: float, roughness: float, vacuum: float = 0.4) -> Height:
    """Draw a rough line that cuts off up to `vacuum` of the field; return the signed distance from it, in Å."""
    angle, offset = rng.uniform(0, 2 * np.pi), (rng.uniform(0.1, vacuum) - 0.5) * side
    slow, fast = relief(rng, side, side / 4), relief(rng, side, max(side / 20, 4.0))

    def distance(x: Floats, y: Floats) -> Floats:
        return x * np.cos(angle) + y * np.sin(angle) - offset + roughness * (slow(x, y) + 0.4 * fast(x, y))

    return distance


def keep(cloud: Cloud, is_kept: NDArray[np.bool_]) -> Cloud:
    """Return some of a cloud's points."""
    return Cloud(cloud.xyz_A[is_kept], cloud.number[is_kept], cloud.atoms[is_kept], cloud.rms_A)


def whole_atoms(xyz: Floats, number: Any, rms: float) -> Cloud:
    """Make a cloud of whole atoms."""
    return Cloud(xyz, np.asarray(number, np.int64), np.ones(len(xyz)), rms)


def crystal(
    rng: np.random.Generator,
    side: float,
    name: str,
    zone: tuple[int, int, int],
    thickness: float,
    *,
    across: tuple[int, int, int] = (1, 2, 4),
    fault: str = "",
    angle: float | None = None,
    tilt_mrad: float = 2.0,
) -> Cloud:
    """Fill a square field with a crystal seen along a zone axis.

    Args:
        rng: Draws the in-plane angle, the small tilt and the place of the origin.
        side: Side of the field in Å.
        name: A key of `CRYSTALS`.
        zone: The zone axis [uvw] in indices of the unit cell.
        thickness: Along the beam, in Å; `LAYER_A` keeps the atoms of one cell, for crystals that are one layer.
        across: A direction [uvw] laid along x before the rotation; the normal of the plane where a fault is.
        fault: "" for none; "stacking": the half x > 0 of an fcc crystal moved by a/6[11-2]; "twin": mirrored at x = 0.
        angle: In-plane rotation in radians; None draws one.
        tilt_mrad: Standard deviation of the tilt about x and about y.

    Returns:
        The atoms.
    """
    cell, rms = unit_cell(name)
    lattice = np.asarray(cell.cell.array)
    axis = _unit(np.asarray(zone) @ lattice)
    right = np.asarray(across) @ lattice
    right = _unit(right - (right @ axis) * axis)
    turn = np.stack([right, np.cross(axis, right), axis]).T
    radius = (side / 2 * (1.4 if fault else 1.0) + MARGIN_A) * np.sqrt(2) + 2
    xyz, number = _fill(cell.positions @ turn, cell.numbers, lattice @ turn, radius, thickness)
    if fault == "stacking":
        xyz = xyz + np.where(xyz[:, :1] > 0.1, np.array([1, 1, -2]) / 6 @ lattice @ turn, 0)
    elif fault == "twin":
        is_mirrored = xyz[:, 0] > 0.1
        is_kept = xyz[:, 0] > -0.1
        xyz = np.concatenate([xyz[is_kept], xyz[is_mirrored] * (-1, 1, 1)])
        number = np.concatenate([number[is_kept], number[is_mirrored]])
    origin = rng.uniform(-0.2, 0.2, 2) * side if fault else rng.uniform(-1, 1, 2)
    tilt = rng.normal(0, tilt_mrad * 1e-3, 2)
    in_plane = rng.uniform(0, 2 * np.pi)
    xyz = Rotation.from_euler("zxy", [in_plane if angle is None else angle, *tilt]).apply(xyz + np.append(origin, 0))
    is_inside = np.abs(xyz[:, :2]).max(axis=1, initial=0) < side / 2 + MARGIN_A
    return whole_atoms(xyz[is_inside], number[is_inside], rms)


def _unit(vector: Floats) -> Floats:
    """Return a vector at length one."""
    return vector / np.linalg.norm(vector)


def _fill(basis: Floats, number: Any, lattice: Floats, radius: float, thickness: float) -> tuple[Floats, Any]:
    """Repeat a unit cell over a disc about the origin, for a thickness from z = 0, or once where that is a layer."""
    low, high = (0.0, thickness) if thickness > LAYER_A else (basis[:, 2].min(), basis[:, 2].max() + 0.1)
    corners = np.array([(x, y, z) for x in (-radius, radius) for y in (-radius, radius) for z in (low, high)])
    index = corners @ np.linalg.inv(lattice)
    axes = [np.arange(np.floor(a) - 2, np.ceil(b) + 2) for a, b in zip(index.min(0), index.max(0), strict=True)]
    nodes = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3) @ lattice
    reach = np.linalg.norm(basis, axis=1).max() + 1
    is_near = (nodes[:, 2] > low - reach) & (nodes[:, 2] < high + reach)
    nodes = nodes[is_near & (np.hypot(nodes[:, 0], nodes[:, 1]) < radius + reach)]
    xyz = (nodes[:, None] + basis).reshape(-1, 3)
    is_inside = (xyz[:, 2] > low - 1e-6) & (xyz[:, 2] < high - 1e-6) & (np.hypot(xyz[:, 0], xyz[:, 1]) < radius)
    return xyz[is_inside], np.tile(number, len(nodes))[is_inside]


def carbon(rng: np.random.Generator, side: float, height: Height) -> Cloud:
    """Lay amorphous carbon of a given local thickness (Å) under the field: one atom at random in each of many cells."""
    step = CARBON_PER_A3 ** (-1 / 3)
    count = int(np.ceil((side + 2 * MARGIN_A) / step))
    corner = np.stack(np.meshgrid(np.arange(count), np.arange(count), indexing="ij"), axis=-1).reshape(-1, 2) * step
    corner -= count * step / 2
    layers = int(np.ceil(height(corner[:, 0], corner[:, 1]).max(initial=0) / step))
    found = [np.empty((0, 3))]
    for layer in range(layers):
        xyz = np.insert(corner, 2, layer * step, axis=1) + step * rng.random((len(corner), 3))
        found.append(xyz[xyz[:, 2] < height(xyz[:, 0], xyz[:, 1])])
    xyz = np.concatenate(found)
    return whole_atoms(xyz, np.full(len(xyz), 6), CARBON_RMS_A)


def substitute(rng: np.random.Generator, cloud: Cloud, old: int, new: int, share: float | Floats) -> Cloud:
    """Replace a share of one element's atoms by another element; 0 leaves vacancies."""
    is_hit = (cloud.number == old) & (rng.random(len(cloud.number)) < share)
    changed = cloud._replace(number=np.where(is_hit, new, cloud.number))
    return keep(changed, changed.number > 0)


def particle(rng: np.random.Generator, name: str, radius: float, *, is_on_axis: bool) -> Cloud:
    """Cut a truncated octahedron or take an ASE multiply twinned cluster, centred, of about the given radius in Å."""
    from ase.cluster import Decahedron, Icosahedron, Octahedron

    cell, rms = unit_cell(name)
    bond = cell.cell.lengths()[0] / np.sqrt(2)
    kind = rng.integers(5)
    if kind == 0:
        shells = max(2, round(radius / bond))
        cluster = Icosahedron(name, shells + 1, latticeconstant=cell.cell.lengths()[0])
    elif kind == 1:
        length = max(2, round(1.1 * radius / bond))
        cluster = Decahedron(name, length, max(1, length // 2), 1, latticeconstant=cell.cell.lengths()[0])
    else:
        length = max(4, round(2.4 * radius / bond))
        cut = max(1, round(length * rng.uniform(0.22, 0.33)))
        cluster = Octahedron(name, length, cut, latticeconstant=cell.cell.lengths()[0])
    xyz = cluster.positions - cluster.positions.mean(axis=0)
    if is_on_axis:
        is_along_110 = kind > 1 and rng.random() < 0.5
        onto = Rotation.from_euler("zy", [-45, -90] if is_along_110 else [0, 0], degrees=True)
        turn = Rotation.from_euler("zxy", [rng.uniform(0, 2 * np.pi), *rng.normal(0, 0.01, 2)]) * onto
    else:
        turn = Rotation.from_quat(rng.standard_normal(4))
    return whole_atoms(turn.apply(xyz), np.full(len(xyz), cluster.numbers[0]), rms)


def blurred(field: Field, height: Height, number: int, per_A3: float, rms: float) -> Cloud:  # noqa: N803
    """Stand for material of a given local thickness without telling atoms apart: one point a pixel."""
    count = round(field.side / field.pixel) + 2 * MARGIN_PIXELS
    line = (np.arange(count) - (count - 1) / 2) * field.pixel
    x, y = (a.ravel() for a in np.meshgrid(line, line))
    atoms = np.maximum(height(x, y), 0) * per_A3 * field.pixel**2
    return Cloud(np.stack([x, y, np.zeros_like(x)], axis=1), np.full(len(x), number), atoms, rms)
