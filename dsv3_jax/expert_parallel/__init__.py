"""Experts on many devices: which round a choice travels in (`rounds`), who sends what where in a round (`plan`), and
the rows' way there and back (`exchange`, by a `transport`).

Knows arrays, number formats and the mesh, no modules.
"""
