"""The loop, the loss, the schedule, what an epoch is made of, a run on disk, its state and weights."""
