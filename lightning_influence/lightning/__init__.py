"""The faces that Lightning sees: a callback that records, a datamodule that selects."""
