"""Restoration without training: operators that degrade images, and methods that undo them under a diffusion prior."""
