"""JOB: a model's name -> a local folder."""
