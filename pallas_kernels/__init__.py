"""Kernels, one folder an operation: `api` picks the backend, `reference` is the oracle in plain JAX. `benchmark` checks
and times them all."""
