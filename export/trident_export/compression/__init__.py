"""Smaller models from a Hugging Face model: pruning and distillation. What comes out is a Hugging Face folder again."""
