"""What a model is: torch only, no disk, no ranks."""
