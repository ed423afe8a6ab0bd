"""Published folders: what stock Hugging Face classes load, written from a run and read from anybody.

A run goes out through publish.py: it picks a checkpoint, published_folder.py and weights.py write the files,
carried.py adds what the initial folder held beside the model, model_card.py the README. verify.py then opens
the result with the stock class: file_checks.py compares files, settings and tokenizer, parity.py logits,
gradients and generated text; only after that the folder gets its name. lora_adapter.py writes a run's
adapters alone. A folder comes in through published_folder.py (`load_model`, `open_tokenizer`), which reads
safetensors only and runs no code (pretrain/storage/foreign_files.py); describe.py prints what would be read.
"""
