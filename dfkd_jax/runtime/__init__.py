"""What knows nothing of distillation: devices, processes, random keys, files, fields and errors."""
