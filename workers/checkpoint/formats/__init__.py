"""The formats that checkpoints come in, each read tensor by tensor."""
