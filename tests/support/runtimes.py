"""The runtime of one process, which most tests need: `single` in float32, and in float64."""

import dataclasses

import fabricfn as ff

RT = ff.Runtime(world=ff.World(), precision=ff.Precision(), strategy=ff.strategies.single())
RT64 = dataclasses.replace(RT, precision=ff.Precision.parse("64-true"))
