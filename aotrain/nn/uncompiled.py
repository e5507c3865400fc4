"""scaled_linear outside of compiled graphs, for weights that FSDP2 gathers as codes. Importing this loads Dynamo.

A compiled graph would keep the codes and scales it was traced with, or use those of forward where FSDP2 has gathered
other ones for backward. So torch.compile breaks the graph at such a layer and compiles what lies between them.
"""

import torch

from aotrain.ops import scaled_linear

uncompiled_scaled_linear = torch.compiler.disable(scaled_linear)
