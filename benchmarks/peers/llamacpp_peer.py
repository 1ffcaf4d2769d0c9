"""llama.cpp's own HTTP server, from the package `xllamacpp`; its URL is the first line of stdout.

Run by that package's Python: `python llamacpp_peer.py MODEL.gguf NUM_THREADS NUM_SLOTS CONTEXT`.
CONTEXT is in tokens for all slots together. Ends with its standard input.
"""

import sys

import xllamacpp

model, num_threads, num_slots, context = sys.argv[1], *map(int, sys.argv[2:])
params = xllamacpp.CommonParams()
params.model.path = model
params.n_ctx = context
params.n_parallel = num_slots
params.cont_batching = True
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = num_threads
params.cache_ram_mib = 0
params.ui = False
params.port = 0
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
