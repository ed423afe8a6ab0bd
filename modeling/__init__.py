"""Models, with torch alone: no disk, no ranks, no text.

A ModelConfig (config.py) describes one model of any family. `build` (transformer.py) makes it: embeddings,
one or two stacks of blocks (block.py, with attention.py and position.py) or of recurrent layers (recurrent/),
and a head (heads.py). The model takes a Batch of packed rows (batch.py) and returns losses or logits.
sequence_parallel.py lets ranks share rows; lora.py adds adapters.

On a model stand generation/ (prompts to continuations) and huggingface/ (stock configs and tensors, both
ways). Before there is a model, flops.py counts its parameters and FLOPs, and activation_memory.py its memory.
"""
