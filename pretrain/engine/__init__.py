"""One optimizer step over all ranks, on DeepSpeed's ZeRO.

    auto.py               `auto` in the engine settings, resolved for all ranks before anything is made
    optimizer.py, muon.py which parameters are updated how; the learning rate of each step
    fp8.py, compile.py    what changes in the model before DeepSpeed takes it
    sequence_parallel.py  the ranks that share rows, and this rank's slice of them
    engine.py             `start_engine`, and `Engine`: train_step, evaluate, generate, slices, load
    zero/                 DeepSpeed: its configuration, its step, and where parameters lie in its flat tensors
    spikes.py             the limits of a step, and what a bad step leads to (pretrain/train.py)
    memory_estimate.py    bytes and seconds that a run will need (`trifold plan`)

In come a model, its settings and micro batches. Out go a `StepResult` per step, losses and
texts of evaluations, and the state as slices that any world size and ZeRO stage loads again.
"""
