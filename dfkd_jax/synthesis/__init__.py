"""Where generated images come from."""
