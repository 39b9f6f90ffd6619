"""What the command line asks for beyond a prompt, a door a file: checks that need no torch, then a changed plan."""
