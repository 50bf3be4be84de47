"""Sequence mixers: the scan, the cells, the residual stack."""
