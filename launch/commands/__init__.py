"""What each command does, apart from its options (launch/cli.py, jobs_cli.py).

A resolved recipe comes in. `run` is the driver of every training run: it reconciles the recipe with the run
folder, shows progress, stops with a save on a signal, and trains here or on Ray. `pretrain` and `finetune`
add what they prepare and their tables of results; `finetune` also evaluates and generates with published
models. `plan` estimates what a run will need, and compares that with what it did need.
"""
