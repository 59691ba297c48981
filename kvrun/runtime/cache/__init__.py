"""JOB: where keys, values and states are kept."""
