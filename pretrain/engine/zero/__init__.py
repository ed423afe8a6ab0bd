"""DeepSpeed's ZeRO, and what is replaced in it.

start_deepspeed.py  import it without its side effects, and start it on a model
settings.py         the configuration that it is started with
zero1_step.py       the fused step at stage 1 (with the list of private names)
step_guard.py       limits on DeepSpeed's own step, at stages 2 and 3 and with offload
slices.py           this rank's share of weights and moments, read and written by parameter name
"""
