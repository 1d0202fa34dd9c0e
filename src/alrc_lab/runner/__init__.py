"""Run an entry point with a JSON config in a folder that survives kills, and many of them in parallel.

Knows nothing about what is computed: a run is "module:function", a config and a folder (docs/design/0002). Must not
import the experiments, the data, the report or a framework.
"""

from alrc_lab.runner import executors, packing
from alrc_lab.runner.attempt import available_cores, code_version, execute
from alrc_lab.runner.executors import sweep
from alrc_lab.runner.folder import RunState, inspect_run
from alrc_lab.runner.recording import FolderRecorder, MetricsWriter, read_metrics
from alrc_lab.runner.spec import RunSpec, prepare, read_study, write_study

__all__ = [
    "FolderRecorder",
    "MetricsWriter",
    "RunSpec",
    "RunState",
    "available_cores",
    "code_version",
    "execute",
    "executors",
    "inspect_run",
    "packing",
    "prepare",
    "read_metrics",
    "read_study",
    "sweep",
    "write_study",
]
