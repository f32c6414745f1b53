"""What `make bench` compares Trident with, each library in a process and an environment of its own.

interface      what every peer can do; the types
trident        Trident's engine in the benchmark's process, and its server
environments   builds the environments that environments.toml lists
process        a peer in a process of its own: what it can't do becomes a sentence
child          the program of such a process, which imports nothing of Trident
programs/      the libraries, one module each
"""
