"""JOB: functions on tensors; each file is the plain-torch twin of a kernel in `triton/`."""
