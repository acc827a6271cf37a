"""The mathematics on tensors: optimizers, removal, curvature, and the sweep that makes scores of them.

Nothing here knows of a module, a file or a trainer.
"""
