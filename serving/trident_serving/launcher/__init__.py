"""Starts `tritonserver` on a model repository, with whichever installation the machine has.

installation    where the server, its Python backend and its stub are
backend_folder  one folder with the server's backends and ours
preflight       what must hold before anything starts
http            questions to a server of this machine
server          the process: start, ready, drain, stop
cli             `python -m trident_serving`
"""
