"""What is kept of generated images, and how it comes back."""
