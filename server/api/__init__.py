"""HTTP: from connections to requests for tokens, and from tokens to answers."""
