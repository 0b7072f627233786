"""One colour, one meaning, over all charts of a report."""

# time
COMPUTE, EXPOSED, OVERLAPPED = "#3b6ea5", "#d9822b", "#f0d9b5"
RECOMPUTED, REPEATED = "#b5395f", "#e5a3b5"
# memory: states in greens, values of the step in purples, the host in greys
PARAMETERS, GRADIENTS, OPTIMIZER = "#1b5e4b", "#4f9d7e", "#a5d3bf"
KEPT, TRANSIENT = "#6d54a3", "#c9bbe3"
BUFFERS, OFFLOADED, ON_HOST = "#6f6a62", "#a8a29a", "#d8d3cb"
# actions of a pipeline
FORWARD, BACKWARD, WEIGHT = "#2b8c96", "#8a6d1f", "#d3bd7a"
