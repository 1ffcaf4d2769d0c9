"""Text and token ids: tokenizers, templates, and what is tried out before it is trusted."""
