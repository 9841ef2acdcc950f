"""Talk to a checkpoint served by `rosaq serve`, with the OpenAI client.

In one shell:   rosaq serve llama2-int4 --port 8000
In another:     pip install openai
                python examples/chat.py "What is the capital of France?"       # one answer
                python examples/chat.py                                        # a conversation; an empty line ends it
                python examples/chat.py --complete "The capital of France is"  # for models without a chat template

Any other OpenAI client works as well: the server's address is http://localhost:8000/v1, the key is not looked at.
"""

import argparse
import sys
import time

from openai import APIConnectionError, OpenAI


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", help="what to say; without it, lines of standard input")
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--model", help="name that the server serves (default: the first it has)")
    parser.add_argument("--complete", action="store_true", help="continue the prompt as it is, without a chat template")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    return parser.parse_args()


def answer(client: OpenAI, model: str, messages: list[dict[str, str]], given: argparse.Namespace) -> str:
    """Stream the answer to standard output, with its speed on standard error, and return it."""
    sampling = {"model": model, "max_tokens": given.max_tokens, "temperature": given.temperature, "stream": True}
    begun, parts, first = time.perf_counter(), [], None
    if given.complete:
        stream = client.completions.create(prompt=messages[-1]["content"], **sampling)
    else:
        stream = client.chat.completions.create(messages=messages, **sampling)
    for event in stream:
        if event.choices:
            choice = event.choices[0]
            parts.append((choice.text if given.complete else choice.delta.content) or "")
            first = first or time.perf_counter()
            print(parts[-1], end="", flush=True)
    print()
    took = time.perf_counter() - begun
    print(
        f"first token after {(first or time.perf_counter()) - begun:.2f} s, {len(parts)} pieces, {len(parts) / took:.1f} per second", file=sys.stderr
    )
    return "".join(parts)


def main() -> None:
    """One answer, or a conversation."""
    given = options()
    client = OpenAI(base_url=given.url, api_key="not looked at")
    try:
        model = given.model or client.models.list().data[0].id
    except APIConnectionError:
        raise SystemExit(f"nothing answers at {given.url}; start it with: rosaq serve CHECKPOINT --port 8000") from None
    messages: list[dict[str, str]] = []
    for line in [given.prompt] if given.prompt else iter(lambda: input("> "), ""):
        messages.append({"role": "user", "content": line})
        messages.append({"role": "assistant", "content": answer(client, model, messages, given)})


if __name__ == "__main__":
    main()
