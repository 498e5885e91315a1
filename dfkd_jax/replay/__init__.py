"""What is kept of generated images, and comes back: memory bank and generative memory.

`scheme` is the role, `schemes` the table of those there are.
"""
