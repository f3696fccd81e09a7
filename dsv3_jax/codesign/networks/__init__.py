"""Networks between nodes: topologies, what they cost, how long a message takes, and which rates flows share.

`Network` (graph) is what `fat_tree`, `slim_fly` and `dragonfly` build; `inventory` and `cost` count it, `latency`
times one message on it. `Cluster` puts nodes with NVLink on it; `patterns` make flows, `routing` and `optimal` lay
them on links, `max_min` shares the links' rates, `simulate` runs flows to their end. `nccl` and `deepep` measure as
those programs do; `losses` takes parts away.
"""
