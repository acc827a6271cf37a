"""Per-sample gradients out of the training backward pass: no second forward, no second backward.

A forward hook keeps a layer's input, a hook on its output gives the output gradient, and the layer's
rule turns both into the shares of its parameters (docs/method.md, "Where a trajectory comes from").
"""

from lightning_influence.capture import convolution, embedding, linear, normalization  # noqa: F401 (register rules)
from lightning_influence.capture.hooks import GradientCapture, freeze_batch_norm, refuse_batch_norm, refuse_compiled

__all__ = ["GradientCapture", "freeze_batch_norm", "refuse_batch_norm", "refuse_compiled"]
