"""Pipeline schedules as values: which rank runs which stage on which microbatch, and when."""
