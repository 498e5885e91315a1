"""One run: `setup` parses a configuration once, `epochs` runs it, `train` keeps it in a folder.

`distill` is the same for networks in memory. Around them teacher, checkpoints, records and figures.
"""
