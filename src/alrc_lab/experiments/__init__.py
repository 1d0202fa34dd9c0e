"""The experiments: each one readable file, from settings over data and model to metrics. Here are only their names."""

EXPERIMENTS = {
    "cifar10-supersampling": "alrc_lab.experiments.cifar10_supersampling",
    "partial-stem": "alrc_lab.experiments.partial_stem",
}
"""Name of each experiment on the command line, and its module."""

STUDIES = {"table1": "alrc_lab.experiments.table1"}
"""Name of each study - many runs that answer one question - and its module."""

DESCRIPTIONS = {
    "partial-stem": "complete micrographs from a twentieth of their pixels, with and without ALRC (paper, section IV)",
    "cifar10-supersampling": "restore images from half their resolution, with and without ALRC (paper, section III)",
    "table1": "does ALRC lower errors where training is unstable, and nowhere else? (paper, Table 1)",
}
"""One line about each."""

PRESETS = {
    "table1": {
        "smoke": "seconds: all five batch-1 cells, tiny, to see that everything works; the numbers mean nothing",
        "quick": "minutes on two cores: batch 1, an eighth of the width, enough updates and seeds to see the effect",
        "variants": "minutes: like quick with 8 seeds, ALRC's default rule beside the authors' library, n = 3",
        "paper": "the published protocol: 31 cells, 10 seeds, 100,000 iterations each at full width",
    }
}
"""Sizes of each study, and what each costs."""
