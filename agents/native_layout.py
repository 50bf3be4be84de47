"""How the compiled step's matrices lie in memory: known to who packs and to who multiplies."""

# Columns of a matrix are stored in panels of LANES, and padded to whole GROUPs.
LANES, GROUP = 16, 64
