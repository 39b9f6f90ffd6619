"""Guidance: rules that combine branches. `Between(0.2, 0.9, Rescale(0.7, CFG(5)))` nests."""
