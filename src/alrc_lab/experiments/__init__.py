"""The experiments: each one readable file, from settings over data and model to metrics. Here are only their names."""

EXPERIMENTS = {
    "cifar10-supersampling": "alrc_lab.experiments.cifar10_supersampling",
    "partial-stem": "alrc_lab.experiments.partial_stem",
}
"""Name of each experiment on the command line, and its module."""

STUDIES = {
    "table1": "alrc_lab.experiments.table1",
    "unstable-lr": "alrc_lab.experiments.unstable_lr",
    "batch-size": "alrc_lab.experiments.batch_size",
    "partial-stem": "alrc_lab.experiments.partial_stem_study",
    "theory": "alrc_lab.experiments.theory.study",
}
"""Name of each study - many runs that answer one question - and its module."""

DESCRIPTIONS = {
    "partial-stem": "complete micrographs from a twentieth of their pixels: does ALRC help? (paper, section IV)",
    "cifar10-supersampling": "restore images from half their resolution, with and without ALRC (paper, section III)",
    "theory": "does clipped gradient descent do what is proved of it, and what does clipping do to the solution?",
    "table1": "does ALRC lower errors where training is unstable, and nowhere else? (paper, Table 1)",
    "unstable-lr": "does ALRC make leaps of the error fewer and lower at too high a rate? (the authors' figure)",
    "batch-size": "does ALRC help less, the more examples an update averages?",
}
"""One line about each."""

PRESETS = {
    "table1": {
        "smoke": "seconds: all five batch-1 cells, tiny, to see that everything works; the numbers mean nothing",
        "quick": "minutes on two cores: batch 1, an eighth of the width, enough updates and seeds to see the effect",
        "variants": "minutes: like quick with 8 seeds, ALRC's default rule beside the authors' library, n = 3",
        "medium": "a night on two cores: all 31 cells, 3 to 8 seeds, a quarter of the width, 10,000 iterations each",
        "paper": "the published protocol: 31 cells, 10 seeds, 100,000 iterations each at full width",
    },
    "unstable-lr": {
        "smoke": "seconds: all twelve cells, tiny, to see that everything works; the numbers mean nothing",
        "quick": "half an hour on two cores with --pack 0: a quarter of the width, 20,000 updates, 5 seeds",
        "paper": "the authors' protocol, with 5 seeds: 100,000 updates at full width",
    },
    "batch-size": {
        "smoke": "seconds: batch sizes 1 and 4, tiny, to see that everything works; the numbers mean nothing",
        "quick": "half an hour on two cores with --pack 0: batch sizes 1 to 16, an eighth of the width, 5 seeds",
        "full": "for a GPU: batch sizes 1 to 64, full width and length, 10 seeds",
    },
    "partial-stem": {
        "smoke": "seconds: four conditions of two tiny runs, to see that everything works; the numbers mean nothing",
        "quick": "an hour and a half on two cores: crops of 96, a quarter of the width, 10,000 updates, 5 seeds",
        "stem-128": "a night on two cores: crops of 128, all blocks at a quarter of the width, 20,000 updates, 5 seeds",
        "stem-256": "for a GPU: crops of 256, full width, 50,000 updates, 5 seeds",
        "paper": "for GPUs: crops of 512, full width, the published 500,000 updates, 5 seeds",
    },
    "theory": {
        "smoke": "seconds: all eight experiments with a handful of seeds, to see that everything works; proves nothing",
        "quick": "two minutes on two idle cores: E0 to E7 with all seeds that the protocol asks for",
        "full": "half an hour on two cores: 3,000 seeds for stability, ten times the steps for convergence",
    },
}
"""Sizes of each study, and what each costs."""
