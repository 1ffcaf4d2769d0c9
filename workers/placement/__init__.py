"""Where a model's weights are when they are computed with."""
