"""Tasks of lm-eval for runs and pretrained models, and paired comparisons of their items."""
