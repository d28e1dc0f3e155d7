"""Classification: labels that a model gives to prompts, and how good they are."""
