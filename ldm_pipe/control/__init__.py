"""Pictures that steer: patches that add to the features of the network, one method a file."""
