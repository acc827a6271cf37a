"""``python -m lightning_influence``, as under ``torchrun``."""

import sys

from lightning_influence.cli import main

sys.exit(main())
