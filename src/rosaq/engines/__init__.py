"""What runs a checkpoint: adapters to transformers and others, none of which is patched or forked."""
