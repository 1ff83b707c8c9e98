"""Plumbing: the engine here, what the policy meets in world/, what a run tells in report/.

The programs in the two rooms have one short name each: `python -m utils.plot` is report/plot.py.
"""

import utils.errors  # noqa: F401  before all that takes long: from here on Ctrl-C is one line

__path__ += [f"{__path__[0]}/{room}" for room in ("world", "report")]
