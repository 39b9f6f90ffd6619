"""What the command line asks for beyond a prompt, one door a file: each checks what it is given without torch, then changes a plan."""
