"""Starts `tritonserver` on a model repository, with whichever installation the machine has.

installation    where the server, its Python backend and its stub are
backend_folder  one folder with the server's backends and ours
preflight       what must hold before anything starts
shared_memory   whether /dev/shm is large enough
health          what an image's health check runs
server          the process: start, ready, drain, stop
cli             `python -m trident_serving`
"""
