"""Which training samples helped or hurt a model, for runs of PyTorch Lightning."""
