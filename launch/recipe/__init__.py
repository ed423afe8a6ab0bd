"""Recipes: a YAML file and overrides become one typed, validated config.

`reader` reads the YAML, merges what it extends, applies overrides and `${TRIFOLD_...}`; `schema` is the type
of the result, made of the settings of pretrain/ and finetune/ plus the cluster's; `errors` turns each invalid
key into one sentence. `changes` compares a config with its run folder and rejects what would make it another
run.
"""
