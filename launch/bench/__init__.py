"""Measuring on this machine: training beside the peers, data, saving, generation. Every figure in
docs/performance.md comes from here.
"""
