"""OpenVINO GenAI's continuous batching, driven through pipes; see `_peers.py` for the protocol.

Run by its Python: `python openvino_peer.py MODEL.gguf NUM_THREADS`. The precisions of
activations and of the KV cache are OpenVINO's own choice for the machine, but for what the
environment variable OPENVINO_PROPERTIES says, as a JSON object.

Where oneDNN is held to AVX2 (ONEDNN_MAX_CPU_ISA=AVX2) on a processor with AVX-512 BF16, it takes
`{"INFERENCE_PRECISION_HINT": "f32"}`: OpenVINO chooses by the processor, and oneDNN can't compute
what it chose. Its attention is not oneDNN's, and is held to nothing.
"""

import json
import os
import sys

import numpy as np
import openvino as ov
import openvino_genai as genai

model, num_threads = sys.argv[1], int(sys.argv[2])
scheduler = genai.SchedulerConfig()
scheduler.cache_size = 1  # GB
scheduler.enable_prefix_caching = False
properties = {"INFERENCE_NUM_THREADS": num_threads}
properties |= json.loads(os.environ.get("OPENVINO_PROPERTIES", "{}"))
pipeline = genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)
print(json.dumps({"ready": True}), flush=True)
num_requests = 0
for line in sys.stdin:
    request = json.loads(line)
    config = genai.GenerationConfig()
    config.max_new_tokens = request["max_tokens"]
    config.ignore_eos = True
    config.do_sample = False
    handles = []
    for prompt in request["prompts"]:
        num_requests += 1
        ids = ov.Tensor(np.array([prompt], dtype=np.int64))
        handles.append(pipeline.add_request(num_requests, ids, config))
    while pipeline.has_non_finished_requests():
        pipeline.step()
        events = []
        for index, handle in enumerate(handles):
            while handle.can_read():
                count = sum(len(output.generated_ids) for output in handle.read().values())
                events.append(f"{index} {count}\n")
        sys.stdout.write("".join(events))
        sys.stdout.flush()
    print("end", flush=True)
