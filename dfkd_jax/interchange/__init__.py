"""PyTorch in: `torch_file` reads weights without executing anything, `torch_layouts` names them."""
