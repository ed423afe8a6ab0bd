"""`trifold compare`: trains several models on the same rows (`compare`), probes each on held-out sentences
(`probes`: losses by position, attention, speed), keeps what was measured (`measured`) and draws one HTML
report (`report`).
"""
