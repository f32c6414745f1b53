"""How well served models do on a file of examples with references: `trident-export evaluate --dataset`.

datasets   reads the examples
asking     asks a server for its answers, through the client
measures   what answers are worth, as statistics of each example whose sums make a figure
intervals  bootstrap intervals, and whether two variants differ
report     one evaluation, from the file to the tables
"""
