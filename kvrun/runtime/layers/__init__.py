"""JOB: the parts families are composed of."""
