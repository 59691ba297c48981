"""JOB: measure, beside the limit of the machine."""
