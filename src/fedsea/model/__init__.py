"""Pure tensors: cutting a Hugging Face decoder into segments, adapters, optimizers."""
