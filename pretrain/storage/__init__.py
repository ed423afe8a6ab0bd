"""Files that a run can rely on: complete or absent, durable, and created by one of many.

storage.py turns a name of a recipe (a path or a URL) into a StoragePath; storage_path.py is the Protocol,
disk.py and object_store.py are its two implementations. On them stand safetensors_file.py (tensors as file
buffers, and range reads) and, in other packages, checkpoints, leases and the reading of corpora.
For files of this machine alone, atomic.py replaces a file or a folder in one step, and jsonl.py appends to
and reads JSON lines (metrics.jsonl, events.jsonl).
"""
