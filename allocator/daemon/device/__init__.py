"""One device: what each request does, over cores that are pure and a backend that is not."""
