"""Starts `tritonserver` on a model repository, with whichever installation the machine has.

installation    where the server, its Python backend and its stub are
backend_folder  one folder with the server's backends and ours
preflight       what must hold before anything starts
http            questions to a server of this machine
shared_memory   whether /dev/shm is large enough
health          what an image's health check runs
admin_key       the key of a server's administration
repository_view the models that the server sees
server          the process and its folders: start and end
server_log      what it prints, without noise
control         what is asked of it with the admin key
failures        which models could not be loaded
processes       what Linux tells of processes, and lets one do to them
supervisor      from start to end: watches, restores, drains
process_watch   which backend processes have died or hang
care            what takes its time meanwhile: health checks, models that are loaded again
local           a server of one's own on free ports, for tests and measurements
cli             `python -m trident_serving`
"""
