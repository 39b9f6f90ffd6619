"""Images larger than those a network was trained on: patches without training, one method a file."""
