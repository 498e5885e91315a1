"""What is kept of generated images, and comes back: memory bank, generative memory and pool.

`scheme` is the role, `schemes` the table of those there are.
"""
