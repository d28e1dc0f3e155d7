"""Operations that experiments share, each next to the naive version that a test compares it with.

This file imports nothing, so that reading data does not need torch.
"""

IGNORE = -100
"""Target of a position that does not count in the loss."""
