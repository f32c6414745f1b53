"""`make soak`: what a server goes through in production, in a quarter of an hour, with every answer verified.

answers   the good requests and what their answers must be
calls     makes them, as other people's clients do: tritonclient and plain HTTP
refusals  bad requests over gRPC        hostile   bad requests and nonsense over HTTP
faults    callers that cancel, hang up or are killed
workers   the processes that make the traffic
watch     memory, threads, files and shared memory of the server's processes
verdict   whether a series is flat
session   one run from its beginning to its end        report   what it writes
"""
