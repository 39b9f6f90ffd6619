"""Faster by computing less: patches of the network, one method a file."""
