"""From a checkpoint to a model with its weights: files, linear layers, quantization."""
