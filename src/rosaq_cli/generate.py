"""`rosaq generate`."""

import math
import time
from typing import Annotated

import typer

from rosaq_cli.evaluate import check_counts
from rosaq_cli.screen import errors, show_json, silence_transformers


def generate(
    model: Annotated[str, typer.Argument(help="rosaq checkpoint, Hugging Face folder, .gguf file or hub id.", show_default=False)],
    prompt: Annotated[str, typer.Argument(help="Text to continue.", show_default=False)],
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="Factor that logits are divided by; 0: always the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the model's chat template.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (bfloat16 on the CPU, as stored on a GPU), float32, float16, bfloat16.")] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="Print text and speed as JSON, when all is generated.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Only the text; no speed at the end.")] = False,
) -> None:
    """Continue a prompt, token by token."""
    import torch
    from transformers import TextStreamer

    from rosaq.engines.loading import load_model

    silence_transformers()
    check_counts({"--max-tokens": max_tokens})
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it must be 0 or more, and finite")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed is {seed}; allowed are 0 to 2^64 - 1")
    if not prompt:
        raise ValueError("the prompt is empty; give at least one character")
    loaded, tokenizer = load_model(model, device, dtype, cpu_dtype=torch.bfloat16)
    if chat:
        if not tokenizer.chat_template:
            raise ValueError(f"{model}: the tokenizer has no chat template; leave --chat out")
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
    else:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
    room = loaded.config.max_position_embeddings - ids.shape[1]
    if max_tokens > room:
        context = loaded.config.max_position_embeddings
        raise ValueError(f"the prompt has {ids.shape[1]} tokens and the context {context}, so --max-tokens is at most {room}")
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    ids = ids.to(loaded.device)
    start = time.perf_counter()
    streamer = None if json_output else TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True)
    output = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, streamer=streamer, **sampling)
    seconds, count = time.perf_counter() - start, output.shape[1] - ids.shape[1]
    if json_output:
        text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        figures = {"tokens": count, "seconds": seconds, "tokens_per_second": count / seconds}
        show_json({"prompt": prompt, "text": text, **figures, "dtype": str(loaded.dtype), "device": str(loaded.device)})
    elif not quiet:
        errors.print(f"{count} tokens, {count / seconds:.1f} per second, {loaded.dtype}, {loaded.device}", style="dim")
