"""How a model learns from text: a recipe's config comes in, checkpoints and a published folder go out.

run.py wires one pretraining run: `prepare` on the driver, then `train` on every rank.

    config        what a recipe may say, typed and validated
    data          text -> tokenizer -> token shards -> packed rows; row i follows from (data, seed, i) alone
    engine        one optimizer step over all ranks: DeepSpeed's ZeRO behind a few methods
    train.py      the only training loop: step, record, judge, evaluate, save
    session.py    what every kind of run does around the loop: start an attempt, resume, load rows, describe
    checkpoint    the engine's state to storage in one transaction, and back at any number of ranks
    monitor       what a run writes about itself: metrics, events, where each rank is, requests to stop
    publish       a checkpoint to a folder that stock classes load, verified before it gets its name
    storage       disks and object stores behind one protocol

initial_model.py says where a run starts (new weights or a published folder), evaluate.py scores held-out
text, and distributed.py is the only place that knows how ranks meet. finetune/ uses all of it, with examples
in place of text.
"""
