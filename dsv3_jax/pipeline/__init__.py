"""Pipeline schedules as data: who works on which micro-batch and when (`schedule`), by method (`schedules`)."""
