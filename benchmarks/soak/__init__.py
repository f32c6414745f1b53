"""`make soak`: a quarter of an hour of the traffic that a server gets in production, with every answer verified.

answers   the good requests and what their answers must be
calls     makes good requests, as other clients do: with tritonclient and plain HTTP
refusals  bad requests over gRPC        hostile   bad requests and nonsense over HTTP
gateway   good and bad requests through the gateway, and callers of it that hang up
faults    callers that cancel, hang up or are killed
workers   the processes that make the traffic
watch     memory, threads, files and shared memory of the server's processes
verdict   decides whether a series is flat
session   one run from its beginning to its end        report   writes its results
"""
