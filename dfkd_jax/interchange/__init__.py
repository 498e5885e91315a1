"""PyTorch in, students out."""
