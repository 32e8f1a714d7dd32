"""easyrm: train Llama reward models on preference pairs, on TPU pods, in JAX."""

__version__ = "0.1.0"
