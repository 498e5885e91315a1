"""Where generated images come from: `role` says what a synthesizer is, `adversarial` is one."""
