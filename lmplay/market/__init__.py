"""What experiments that simulate a market share: the order book, data sources, messages, the simulator, the scores.

Times are nanoseconds since midnight, prices whole ticks, sizes whole lots.
"""
