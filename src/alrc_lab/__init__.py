"""The laboratory: data sets, experiments, a runner and a report. `alrc` itself never imports it."""
