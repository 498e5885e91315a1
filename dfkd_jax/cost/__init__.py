"""What a step costs: time by the clock, work and memory by the compiler."""
