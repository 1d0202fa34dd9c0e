"""The claims of E3, and what must be measured for and against them."""

from __future__ import annotations

from typing import Any

from alrc_lab.experiments.theory.bias_setting import Config, name_of
from alrc_lab.experiments.theory.criteria import Claim, Criterion, Statistic, estimate
from alrc_lab.experiments.theory.methods import written


def _slope(name: str, suffix: str = "") -> Statistic:
    """Return the statistic of the mean gradient at the ending."""
    keys = [f"gradient_{part}_{name}" for part in ("mean", "low", "high")]
    return estimate("E[g](θ_N) = mean θ_N − 1", keys, f"n_{name}", p=f"gradient_differs_p_{name}{suffix}")


def _claims_of_norm(config: Config) -> list[Claim]:
    """Return the claims about no method and Norm."""
    found: list[Claim] = []
    settings = [("none", None), *(("norm", threshold) for threshold in config.norm_thresholds)]
    for law in ("rare", "normal"):
        for key, threshold in settings:
            name = name_of(key, threshold, law)
            words = ("" if threshold is None else f"λ = {threshold:g}, ") + _WORDS[law]
            suffix = "_holm"
            found.append(
                Claim(
                    f"E3a-{name}",
                    key,
                    "Clipped gradient descent converges to weights at which the scaled mean gradient, E[g/c], is zero.",
                    Statistic(
                        "mean θ_N − θ*",
                        f"gap_mean_{name}",
                        f"gap_low_{name}",
                        f"gap_high_{name}",
                        f"equivalence_p_{name}{suffix}",
                        f"n_{name}",
                    ),
                    [Criterion(f"equivalence_p_{name}{suffix}", "<", config.alpha)],
                    [Criterion(f"gap_distance_{name}", ">", config.margin)],
                    "read",
                    "Theorem 1",
                    words,
                    control="must be consistent" if key == "none" else None,
                )
            )
            found.append(
                Claim(
                    f"E3b-{name}",
                    key,
                    "Because c > 0, where the scaled mean gradient is zero the mean gradient itself is zero.",
                    _slope(name, suffix),
                    [Criterion(f"gradient_zero_p_{name}{suffix}", "<", config.alpha)],
                    [
                        Criterion(f"gradient_distance_{name}", ">", config.margin),
                        Criterion(f"gradient_differs_p_{name}{suffix}", "<", config.alpha),
                    ],
                    "read",
                    "Discussion after Theorem 1",
                    words,
                    control="must be consistent" if law == "normal" or key == "none" else None,
                )
            )
    return found


_WORDS = {
    "rare": "x = 10 with probability 0.1, else 0",
    "normal": "symmetric: x normal with mean 1",
    "cauchy": "x Cauchy around 1: no mean",
    "exponential": "x exponential, mean 1",
    "lognormal": "x lognormal(σ = 1), mean 1",
}


def _claims_of_agc(config: Config) -> list[Claim]:
    """Return the claims about AGC, whose root is compared by its ratio because it is so near to zero."""
    found: list[Claim] = []
    for threshold in config.agc_thresholds:
        name = name_of("agc", threshold, "rare")
        words = f"λ = {threshold:g}, {_WORDS['rare']}"
        ratio = (f"ratio_median_{name}", f"ratio_low_{name}", f"ratio_high_{name}")
        arrived = Criterion(f"moving_{name}", "<", config.ratio)
        found += [
            Claim(
                f"E3a-{name}",
                "agc",
                "Adaptively clipped gradient descent converges to weights at which the scaled mean gradient is zero.",
                estimate("median θ_N ÷ θ*", ratio, f"n_{name}"),
                [Criterion(ratio[1], ">=", 1 - config.ratio), Criterion(ratio[2], "<=", 1 + config.ratio)],
                [arrived, Criterion(f"ratio_off_{name}", ">", config.ratio)],
                "read",
                "Theorem 1",
                words,
            ),
            Claim(
                f"E3b-{name}",
                "agc",
                "Because c > 0, where the scaled mean gradient is zero the mean gradient itself is zero.",
                _slope(name),
                [Criterion(f"gradient_zero_p_{name}", "<", config.alpha)],
                [arrived, Criterion(f"gradient_distance_{name}", ">", config.margin)],
                "read",
                "Discussion after Theorem 1",
                words,
            ),
        ]
    return found


def _claims_of_alrc(config: Config) -> list[Claim]:
    """Return what is shown of ALRC, which the theory does not cover."""
    return [
        Claim(
            f"E3b-{name}",
            "alrc",
            "Where limited gradient descent ends, the mean gradient is zero.",
            _slope(name),
            [Criterion(f"gradient_zero_p_{name}", "<", config.alpha)],
            [Criterion(f"gradient_distance_{name}", ">", config.margin)],
            "inference",
            "",
            f"n = {threshold:g}, {_WORDS[law]}",
            scope=False,
            reading="the bias of θ when ALRC limits single examples; 0 would be none",
        )
        for threshold in config.alrc_thresholds
        for law in ("rare", "normal")
        for name in [name_of("alrc", threshold, law)]
    ]


def _claims_of_cauchy(config: Config) -> list[Claim]:
    """Return the claims about examples without a mean: clipping keeps the iterates together, no clipping does not."""
    found: list[Claim] = []
    settings = [("none", None), *(("norm", threshold) for threshold in config.norm_thresholds)]
    for key, threshold in [*settings, *(("alrc", threshold) for threshold in config.alrc_thresholds)]:
        name = name_of(key, threshold, "cauchy")
        keys = [f"beyond_1000_{part}_{name}" for part in ("share", "low", "high")]
        found.append(
            Claim(
                f"E3c-{name}",
                key,
                "Clipped gradient descent is numerically stable with high probability (x has no mean here).",
                estimate("share of runs with max |θ| > 1000", keys, f"n_{name}"),
                [Criterion(f"beyond_1000_high_{name}", "<", config.stable_below)],
                [Criterion(f"beyond_1000_low_{name}", ">", config.stable_below)],
                "inference",
                "",
                f"{'' if threshold is None else f'threshold {threshold:g}, '}{_WORDS['cauchy']}",
                key != "alrc",
                "must contradict" if key == "none" else None,
                "ALRC limits losses relative to what they were" if key == "alrc" else "",
            )
        )
    return found


def _claims_of_matched(config: Config) -> list[Claim]:
    """Return the claims at matched shares of limited examples."""
    found: list[Claim] = []
    for law in config.matched_laws:
        for wanted in config.matched_fractions:
            for key in ("norm", "agc", "alrc"):
                name = f"{key}_{law}_{written(wanted)}"
                keys = [f"bias_{part}_{name}" for part in ("mean", "low", "high")]
                found.append(
                    Claim(
                        f"E3m-{name}",
                        key,
                        "Where limited gradient descent ends, the mean gradient is zero.",
                        estimate("bias of θ in deviations of x", keys, f"n_bias_{name}", p=f"bias_zero_p_{name}_holm"),
                        [Criterion(f"bias_zero_p_{name}_holm", "<", config.alpha)],
                        [Criterion(f"bias_distance_{name}", ">", config.margin)],
                        "inference" if key == "alrc" else "read",
                        "" if key == "alrc" else "Discussion after Theorem 1",
                        f"{wanted:.0%} of the examples limited, {_WORDS[law]}",
                        key != "alrc",
                        reading="the bias at this share of limited examples" if key == "alrc" else "",
                    )
                )
    return found


def claims(config: Config) -> list[dict[str, Any]]:
    """Return the claims of E3 as study.json holds them."""
    parts = (_claims_of_norm, _claims_of_agc, _claims_of_alrc, _claims_of_cauchy, _claims_of_matched)
    return [claim.to_json("E3") for part in parts for claim in part(config)]
