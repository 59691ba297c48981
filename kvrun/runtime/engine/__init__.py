"""JOB: who runs when."""
