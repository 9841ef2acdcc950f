"""vLLM serves a rosaq checkpoint: `vllm serve CHECKPOINT`, with nothing but rosaq installed beside vLLM.

vLLM calls `register` through the entry point `vllm.general_plugins`, in the API server, the engine and every worker. All that
needs vLLM is in `vllm_layers.py`, so that this module can be imported where vLLM is not installed. Written for vLLM 0.24 (CUDA)
and 0.32 (CPU build).
"""


def register() -> None:
    """Make vLLM know the quantization method "rosaq"; a second call changes nothing."""
    from rosaq.engines.vllm_layers import register_with_vllm  # noqa: PLC0415  (vLLM is imported by who has it)

    register_with_vllm()
