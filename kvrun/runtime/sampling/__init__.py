"""JOB: logits -> tokens."""
