"""Runs as jobs of a Ray cluster, and the check of a cluster.

`jobs` submits, follows, stops and resumes runs through the cluster's job server. `doctor` runs on a node: it
asks every node for its facts (`node_facts`, which imports only the standard library), times an all-reduce and
the shared storage, and `findings` turns the facts into sentences.
"""
