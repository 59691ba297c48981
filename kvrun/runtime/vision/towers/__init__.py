"""JOB: one file per HF `model_type` of models that see images; its build(w) makes their eyes."""
