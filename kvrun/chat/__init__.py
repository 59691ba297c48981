"""JOB: a conversation, without a screen."""
