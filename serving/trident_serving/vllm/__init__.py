"""Text generation that vLLM computes, behind the same requests, answers and text side as `trident_serving.generation`.

interpreter  which Python has vLLM
translation  a checked request -> what vLLM is asked; what it can't do is refused
worker       the program in vLLM's interpreter; it imports nothing of this package
process      that program as a child process, lines of JSON both ways
engine       hands answers to it and takes tokens from it; starts it again when it dies
service      all of these for one model folder
"""
