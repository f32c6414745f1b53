"""How many replicas traffic needs, from what one was measured to do: `trident-plan`.

curve       what one replica does, as it was measured
traffic     what comes, and how soon it is to be answered
capacity    the model: queues, and the least number of replicas that is enough
simulation  the same replicas, request by request, to check the model by
cli         the command
"""
