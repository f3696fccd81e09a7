"""What a step takes on hardware that need not be here, and which layout to choose for it.

`rates` has the measured speeds that all predictions rest on, `operations` what a layer does, `layers` how long that and
its exchanges take, `update` the optimizer, `pipelined` stages and their schedules; `predict` puts a training step of a
`layout` together, and `search` looks for the best. `serving` does the same for prefill and decode.
"""
