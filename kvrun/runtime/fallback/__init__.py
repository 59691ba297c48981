"""JOB: any other architecture: transformers' modelling code on our paged attention."""
