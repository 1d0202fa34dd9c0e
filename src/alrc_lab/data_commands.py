"""Say where data sets are, and fetch them: the commands `alrc data ...`, in the way of commands.py."""

from __future__ import annotations

from typing import Literal

from alrc_lab import data as data_sets
from alrc_lab.live import BytesView, finish, open_console, say


def show_data(*, json: bool = False) -> int:
    """Show where data sets are looked for, what was found there, and which place would be used.

    For example:

        alrc data status

    Args:
        json: Print one JSON document instead of text.
    """
    console = open_console(json)
    found = {"CIFAR-10": data_sets.data_status(), "micrographs": data_sets.micrograph_status()}
    for name, places in found.items():
        say(console, name)
        for place in places:
            mark = "→" if place["used"] else " "
            held = "made when first used" if place["where"] == "embedded" else "nothing"
            held = f"{place['images']:,} images, sha256 {place['sha256'][:12]}" if place["images"] else held
            say(console, f"{mark} {place['where']:<10} {held}" + (f" · {place['path']}" if place["path"] else ""))
            for remark in filter(None, (place["note"], place["error"])):
                say(console, f"    {remark}")
    return finish(json, {"places": found["CIFAR-10"], "micrographs": found["micrographs"]})


def fetch_data(name: Literal["cifar10"], *, json: bool = False) -> int:
    """Download a data set into the user cache: with checksum, and going on where it stopped.

    For example:

        alrc data fetch cifar10

    Args:
        name: Which data set.
        json: Print one JSON document instead of text.
    """
    console = open_console(json, shows_progress=True)
    with BytesView(console) as view:
        path = data_sets.fetch_cifar10(on_progress=view.update, on_message=lambda line: say(console, line))
    found = data_sets.load_cifar10(path)
    say(console, f"{name}: {found.summary()}")
    return finish(json, {"name": name, "path": str(path), "data": found.describe()})
