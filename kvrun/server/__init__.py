"""JOB: HTTP in, engine requests out: Text Generation Inference's API and OpenAI's on one engine."""
