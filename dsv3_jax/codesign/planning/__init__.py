"""What a step takes on hardware that need not be here, and which layout to choose for it.

`rates` has the measured speeds that all predictions rest on, `operations` what a layer does, `layers` how long that
takes, `pipelined` and `flat` a training step with and without pipeline stages, `serving` prefill and decode. `training`
and `serving_plans` search layouts; `verdict` says what binds.
"""
