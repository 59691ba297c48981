"""JOB: many LoRA adapters in one batch: their files, where they are kept, which rows use which."""
