"""Experts on many devices: which round a choice travels in (`rounds`), and one round's way there and back (`exchange`).

Knows arrays and the mesh, no modules.
"""
