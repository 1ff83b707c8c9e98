"""What the scripts stand on. Rooms: world/ has problems and verdicts, dialogue/ a user with a goal,
scale/ several processes and large models, report/ what a run tells.

The programs in the rooms have one short name each: `python -m utils.plot` is report/plot.py.
"""

__path__ += [f"{__path__[0]}/{room}" for room in ("report", "dialogue")]
