"""Data-free knowledge distillation in JAX/Flax: learning to retain while acquiring."""
