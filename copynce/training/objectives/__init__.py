"""What a training optimises: a model, its losses and their own state; the trainer knows none of them by name."""
