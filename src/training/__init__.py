"""The training loop: losses, schedules, the batches of an epoch, run folders, checkpoints and saved states."""
