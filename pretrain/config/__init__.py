"""The keys of a recipe as typed, frozen values; each file checks its own values, and builds nothing.

    training.py      what every run of the loop shares: optimizer, schedule, engine, checkpoints, bad steps
    objectives.py    the objectives, and mixtures of them
    pretraining.py   a pretraining run: both of these, data, tokenizer, stages, the origin of the model

launch/recipe/ reads them from YAML and explains mistakes; finetune/config.py builds on training.py.
"""
