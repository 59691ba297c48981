"""JOB: conversations on the screen."""
