"""Colors and axis labels of the figures and the page."""

# Okabe & Ito's palette, distinguishable with every common color blindness, in the order of its
# contrast, and two more. One color per curve.
COLORS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#6A3D9A",
    "#8C510A",
)
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
UNITS = {"loss": "nats", "bpb": "bits per byte", "accuracy": "of tokens"}
