"""What can be trained: one short file each."""
