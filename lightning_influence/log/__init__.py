"""An append-only store of named tensors that survives being killed at any moment.

    manifest.json                       readable; what the store is of
    rank-0/index.jsonl                  one line per complete entry, with its checksum
    rank-0/step-00000000.safetensors    the tensors of a step
    rank-0/NAME.safetensors             a named artifact

An entry is first written under another name, renamed, and then gets its line in the index; an entry without a
complete line does not count. A line holds the checksum of its file's header, and the header those of its
tensors, so one tensor is read, and verified, without reading another. Nothing is ever unpickled, and
neither reader nor writer follows a link, so a store from a stranger cannot make them touch a file outside it.
"""
