"""The pool of KV blocks: where extents lie, which blocks are whose, and everybody's share."""
