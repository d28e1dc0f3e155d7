"""How curves look, in the figures and on the page."""

# Okabe & Ito's palette, told apart with every common colour blindness; reordered for contrast.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#8a8a8a"  # the baseline
LABELS = {
    "loss": "loss (nats per token)",
    "bpb": "bits per byte",
    "accuracy": "token accuracy",
    "tokens": "training tokens",
    "steps": "optimizer steps",
    "flops": "training FLOPs",
    "seconds": "training seconds",
}
