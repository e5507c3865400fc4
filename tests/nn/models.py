"""Linear layers of well-known models as (name, N, K), with torchtitan's names."""


def llama3(dim: int, kv_dim: int, hidden: int, layers: int) -> list[tuple[str, int, int]]:
    shapes = [("lm_head", 128256, dim)]
    for i in range(layers):
        shapes += [
            (f"layers.{i}.attention.qkv_linear.wqkv", dim + 2 * kv_dim, dim),
            (f"layers.{i}.attention.wo", dim, dim),
            (f"layers.{i}.feed_forward.w1", hidden, dim),
            (f"layers.{i}.feed_forward.w2", dim, hidden),
            (f"layers.{i}.feed_forward.w3", hidden, dim),
        ]
    return shapes


LLAMA3_8B = llama3(4096, 1024, 14336, 32)
LLAMA3_70B = llama3(8192, 1024, 28672, 80)
