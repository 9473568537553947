"""Calibration: measure the machine at hand and fit the parameters of the cost model to what was measured.

`kernels`, `transfers` and `host` measure (with torch), `launch` runs them on several processes, `samples` is what they
hand back, `fit` turns samples into parameters and `write` parameters into profile files. The parts that need no torch
do not import it.
"""
