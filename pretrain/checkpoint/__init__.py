"""Checkpoints as transactions: complete and valid, or not there, whatever dies when.

In come each rank's slices (slice.py) and the run's state (state.py), saved by the holder of a lease
(lease.py: one generation for each attempt). saving.py runs each save in a thread: writing.py writes every
rank's tensors and manifest, then rank 0 the table of slices and the marker, in the format of format.py;
retention.py deletes what need not stay. Out come the newest checkpoint whose every byte verifies, and ranges
of its tensors for any number of ranks (checkpoint.py).
"""
