"""Which device to run on."""

import torch


def resolve_device(device: str) -> str:
    """A torch device name out of "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        ValueError: CUDA is asked for and not there, or another name.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return device
    if device == "cuda" or (device.startswith("cuda:") and device[5:].isdigit()):
        if not torch.cuda.is_available() or int(device[5:] or 0) >= torch.cuda.device_count():
            raise ValueError(f"device {device!r}: PyTorch sees {torch.cuda.device_count()} CUDA GPUs here; use --device cpu or auto")
        return device
    raise ValueError(f"device {device!r}; allowed are auto, cpu, cuda, cuda:N")
