"""Feed-forward blocks and the linear layers that they are made of."""
