"""JOB: token ids in, token ids out."""
