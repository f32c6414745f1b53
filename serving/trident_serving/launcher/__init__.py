"""Starts `tritonserver` on a model repository, from the installation that the machine has.

installation    where the server, its Python backend and its stub are
backend_folder  one folder with the server's backends and ours
preflight       checks before a server starts
http            HTTP to a server of this machine
shared_memory   whether /dev/shm is large enough
health          what an image's health check runs
admin_key       the key of a server's administration
temporary_folder the launcher's folder, and what killed ones have left
repository_view the models that the server sees
server          the process and its folders: start and end
server_log      what it prints, without noise
control         calls to it with the admin key
failures        which models could not be loaded
processes       reads and changes processes of Linux
supervisor      runs the server from start to end: watches, restores, drains
process_watch   finds backend processes that have died or hang
gateway         the process of the gateway beside the server
care            slow work on threads of its own: health checks, models that are loaded again
local           a private server on free ports, for tests and benchmarks
cli             `python -m trident_serving`
"""
