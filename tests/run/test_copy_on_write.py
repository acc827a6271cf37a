"""Large tensors are put back without a copy, unless they were written to."""

from __future__ import annotations

import gc
from typing import Any

import torch
from modules import Classifier, split_digits
from torch import Tensor, nn

from lightning_influence.run.unchanged import unchanged

ROWS = 2**15  # of 64 floats: eight megabytes


class Averaging(Classifier):
    """Keeps an average of its weights in parameters that do not train, as momentum encoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(ROWS, 64), requires_grad=False)
        self.untouched = nn.Parameter(torch.randn(ROWS, 64), requires_grad=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.table.data[3:19].mul_(0.9).add_(self.net[0].weight.detach(), alpha=0.1)
        return nn.functional.cross_entropy(self.net(batch[0] + self.table[:1] + self.untouched[:1]), batch[1])


def copies_of(module: Averaging) -> int:
    """Tensors like the large parameters, besides them."""
    gc.collect()
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    alike = [o for o in gc.get_objects() if type(o) is Tensor and o.shape == (ROWS, 64)]
    return len({t.untyped_storage().data_ptr() for t in alike} - own)


def test_only_what_is_written_to_is_copied_and_everything_put_back() -> None:
    module, batch = Averaging(), split_digits(8, 4)[0].tensors
    before = {k: (p.data_ptr(), p.detach().clone()) for k, p in module.named_parameters()}
    already = copies_of(module)
    with unchanged(module):
        assert copies_of(module) == already
        for _ in range(2):
            module.training_step(batch, 0).backward()
        assert copies_of(module) == already + 1, "the table's"
        module.untouched.requires_grad_(True)
        assert not torch.equal(module.table, before["table"][1])
    for k, p in module.named_parameters():
        assert p.data_ptr() == before[k][0]
        assert torch.equal(p, before[k][1])
        assert p.grad is None
    assert not module.untouched.requires_grad


def test_derivatives_of_derivatives_under_the_watch() -> None:
    """Modes of torch lie above each other: vmap over forward mode over backward mode gives what it gives without."""
    module, batch = Averaging(), split_digits(8, 4)[0].tensors
    parameters = {k: p.detach() for k, p in module.net.named_parameters()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(torch.func.functional_call(module.net, values, (batch[0],)), batch[1])

    def product(direction: dict[str, Tensor]) -> Any:
        return torch.func.jvp(torch.func.grad(loss), (parameters,), (direction,))[1]

    directions = {k: torch.randn(3, *p.shape) for k, p in parameters.items()}
    expected = torch.func.vmap(product)(directions)
    with unchanged(module):
        found = torch.func.vmap(product)(directions)
    for k, value in expected.items():
        torch.testing.assert_close(found[k], value)
