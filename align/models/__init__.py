"""Models, quantization, adapters, tokenizers and the identity of a base."""
