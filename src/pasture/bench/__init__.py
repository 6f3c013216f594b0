"""The benchmark: real text, real clients, several systems in turn on one machine, medians and ratios.

Measures through public HTTP APIs alone, so pasture is a system like any other here. Imports nothing of pasture but its
errors; `isolated.py` is the one exception that touches `llama_cpp`, because it is the baseline the others are compared with.
"""
