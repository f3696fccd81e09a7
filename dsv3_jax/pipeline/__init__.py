"""Pipeline schedules as data: who works on which micro-batch and when (`schedule`), by method (`schedules`); what they
cost and move (`account`), beside published `formulas`; and as `text`."""
