"""What a GGUF file says of text: its tokens, how text is cut into them, and where turns end."""
