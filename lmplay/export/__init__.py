"""Take a trained model home: folded, as a folder for transformers, or as GGUF, and verified."""
