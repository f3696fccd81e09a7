"""Experts on many devices: which round a choice travels in (`rounds`), who sends what where in a round (`plan`), and
the rows' way there and back (`exchange`, by a `transport`).

Replicas of experts for serving are planned beside that: where they lie (`replicas`), how they follow the load
(`rebalancing`), and which one a token goes to (`replica_choice`).

Knows arrays, number formats and the mesh, no modules.
"""
