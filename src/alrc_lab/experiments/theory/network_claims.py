"""The claims of E4, and those of E6 about the endpoints of E4."""

from __future__ import annotations

from typing import Any

from alrc_lab.experiments.theory.criteria import Claim, Criterion, estimate
from alrc_lab.experiments.theory.network_setting import KINDS, Config, Setting, settings_of

_OUTSIDE = ("agc_last", "alrc")


def _words(setting: Setting, kind: str) -> str:
    """Say what a setting is."""
    limit = "" if setting.key == "none" else f"{'n' if setting.key == 'alrc' else 'λ'} = {setting.threshold:g}, "
    batch = "" if setting.batch == 1 else f"batch {setting.batch}, "
    return f"{limit}{batch}{kind} noise"


def _trio(what: str, first: str, name: str) -> tuple[str, str, str]:
    """Return the keys of an estimate and its interval."""
    return f"{what}_{first}_{name}", f"{what}_low_{name}", f"{what}_high_{name}"


def _of_setting(setting: Setting, kind: str, config: Config) -> list[Claim]:
    """Return the claims about one setting."""
    name = f"{setting.name}_{kind}"
    is_read = setting.key in ("norm", "agc", "none") and setting.batch == 1
    is_ours = setting.key in _OUTSIDE
    found: list[Claim] = []
    if setting.batch == 1:
        value, low, high = _trio("field", "median", name)
        found.append(
            Claim(
                f"E4-field-{name}",
                setting.key,
                "Training converges to weights at which the scaled mean gradient, E[g/c], is zero.",
                estimate("median ‖E[g/c]‖ at N ÷ at 0", (value, low, high), f"n_{name}"),
                [Criterion(high, "<", config.vanished), Criterion(f"doubling_{name}", "<", 1.0)],
                [
                    Criterion(low, ">", config.vanished),
                    Criterion(f"doubling_{name}", ">=", 1.0),
                    Criterion("steps", ">=", config.patience),
                ],
                "inference" if is_ours else "read",
                "" if is_ours else "Theorem 1",
                _words(setting, kind),
                not is_ours,
                reading="with the moments of the last step" if setting.key == "alrc" else "",
            )
        )
    value, low, high = _trio("gradient", "median", name)
    p_value = None if setting.key == "none" else f"paired_p_{name}_holm"
    against = [Criterion(low, ">", config.vanished)]
    if p_value:
        against.append(Criterion(p_value, "<", config.alpha))
    found.append(
        Claim(
            f"E4-gradient-{name}",
            setting.key,
            "Because c > 0, the mean gradient itself is zero where training ends.",
            estimate("median ‖E[g]‖ at N ÷ at 0", (value, low, high), f"n_{name}", p=p_value),
            [Criterion(high, "<", config.vanished)],
            against,
            "read" if is_read else "inference",
            "Discussion after Theorem 1" if is_read else "",
            _words(setting, kind),
            not is_ours,
            "must be consistent" if setting.key == "none" and setting.batch == 1 else None,
            "" if not is_ours else "above 0: biased as the theory's methods are",
        )
    )
    return found


def _of_endpoints(setting: Setting, kind: str, config: Config) -> list[Claim]:
    """Return E6's claims about the endpoints of one setting."""
    name = f"{setting.name}_{kind}"
    is_ours = setting.key in _OUTSIDE
    found: list[Claim] = []
    for what, sentence, label in (
        ("saddles", "The endpoint usually is a local minimum of the mean loss.", "share with a negative curvature"),
        ("unstable", "The endpoint is a stable equilibrium of the mean field.", "share with an unstable direction"),
    ):
        value, low, high = _trio(what, "share", name)
        is_read = what == "saddles" and not is_ours
        found.append(
            Claim(
                f"E6-{what}-{name}",
                setting.key,
                sentence,
                estimate(label, (value, low, high), f"n_{name}", places=3),
                [Criterion(low, "<=", config.minima), Criterion(value, "<=", config.minima)],
                [Criterion(low, ">", config.minima)],
                "read" if is_read else "inference",
                "Discussion after Theorem 1" if is_read else "",
                _words(setting, kind),
                not is_ours,
                "must be consistent" if setting.key == "none" else None,
            )
        )
    if setting.key in ("none", "norm"):
        value, low, high = _trio("scaled_slope", "median", name)
        found.append(
            Claim(
                f"E6-scaled-{name}",
                setting.key,
                "The endpoint minimises the average scaled loss, E[ℓ/c], in a local sense.",
                estimate("median ‖∇E[ℓ/c]‖ at N ÷ ‖E[g/c]‖ at 0", (value, low, high), f"n_{name}"),
                [Criterion(high, "<", config.vanished)],
                [Criterion(low, ">", config.vanished)],
                "read",
                "abstract",
                _words(setting, kind),
                control="must be consistent" if setting.key == "none" else None,
            )
        )
    return found


def claims(config: Config) -> list[dict[str, Any]]:
    """Return the claims of E4, then those of E6 that need its endpoints, as study.json holds them."""
    settings = settings_of(config)
    own = [claim for kind in KINDS for setting in settings for claim in _of_setting(setting, kind, config)]
    ends = [
        claim
        for kind in KINDS
        for setting in settings
        if setting.is_first and setting.batch == 1
        for claim in _of_endpoints(setting, kind, config)
    ]
    return [claim.to_json("E4") for claim in own] + [claim.to_json("E6", "E4") for claim in ends]
