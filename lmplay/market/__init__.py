"""Simulate an exchange: order book, data, messages, sampler, scores. A plugin of lmplay.

Times are nanoseconds since midnight, prices integer ticks, sizes integer lots.
"""
