"""Models and tokenizers that other people trained, through the transformers library."""
