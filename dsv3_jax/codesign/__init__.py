"""What a model costs on hardware, from the same configuration and modules that run.

- Hardware: `hardware`, `links`, `local_machines`; one's own from files: `hardware_file`, `toml_fields`.
- Counts from the configuration: `counting`, `dense_models`, `memory`, `step_flops`, `step_buffers`, `step_traffic`,
  `traffic` (of the router's choices), `exchange`.
- What compilers say of pods that are not there: `pods`, `aot`, `fitting`, `kernels`, reading programs with `hlo` and
  `collectives`.
- Small models of what hardware could do: `contention`, `sm_tax`, `multicast`, `compression`, `ordering`, `failures`,
  `decode_limits`, `local_deployment`.
- Networks between nodes: `networks`. Time of whole steps, and layouts: `planning`.
"""
