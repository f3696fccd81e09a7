"""Pipeline schedules as data: who works on which micro-batch and when (`schedule`), by method (`schedules`); what they
cost and move (`account`), beside published `formulas`; and as `text`.

What runs them: layers are cut into `stages`; a schedule becomes `tables` that one program for all ranks looks up, the
`executor`; `placement` brings weights from where they are stored to the ranks that compute with them. The model's own
stages are in `training.pipelined`.
"""
