"""How the built-in model `tiny` is made: corpus, tokenizer, training, adapters, evaluation."""
