"""What a model's activations look like before and after rotation, and what quantizing them loses."""
