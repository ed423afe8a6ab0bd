"""How a published model learns a task."""
