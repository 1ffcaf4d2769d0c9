"""In an instance: one batch to logits or to vectors, natively or by transformers' modules."""
