"""JOB: quantize a model layer by layer, with text to look at or without, and say what it costs."""
