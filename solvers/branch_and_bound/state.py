"""What a node of the tree says of each input."""

FREE, ZERO, ONE = 0, 1, 2
"""Free, fixed as kept (x = 0), fixed as pruned (x = 1)."""
