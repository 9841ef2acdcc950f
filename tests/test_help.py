"""The command line as a person and a script meet it: help, completion, JSON, colours, exit codes."""

import inspect
import json
import os
import pty
import re
import subprocess
import sys
import typing

import pytest
import typer

from rosaq_cli.app import EPILOG, app
from test_cli import cli  # noqa: F401  (a fixture)

UNITS = ("Bits", "Channels", "channels", "indow", "Token", "token", "Seed", "Pass", "Factor", "Use ", "GPUs", "Runs", "GiB", "blocks", "Processes")
PROGRAM = [sys.executable, "-c", "from rosaq_cli.app import main; main()"]  # without torch


def commands(group=None, name=()):
    """(name, command) of every command."""
    group = group or typer.main.get_command(app)
    for key, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*name, key))
        else:
            yield " ".join((*name, key)), command


def options():
    return [(name, option) for name, command in commands() for option in command.params if option.param_type_name == "option" and not option.hidden]


def numbers():
    """(command, option's name) of the options that take a number."""
    for name, command in commands():
        for key, kind in typing.get_type_hints(inspect.unwrap(command.callback)).items():
            if {int, float} & {kind, *typing.get_args(kind)}:
                yield name, key


def test_help_fits_a_screen_and_names_every_command():
    done = subprocess.run([*PROGRAM, "--help"], capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "80"})
    assert 24 <= done.stdout.count("\n") <= 40
    for panel in ("Quantize", "Check and measure", "Run"):
        assert f"─ {panel} ─" in done.stdout
    top = typer.main.get_command(app)
    for name, command in top.commands.items():
        line = next(line for line in done.stdout.splitlines() if line.startswith(f"│ {name} "))
        assert command.short_help in line and command.short_help.endswith("."), line  # whole, on one line


def test_every_option_says_what_it_counts_and_its_default():
    counted = set(numbers())
    assert {("quantize", "samples"), ("quantize", "bits"), ("generate", "temperature")} <= counted
    for name, option in options():
        where = f"{name} {option.opts[0]}"
        assert option.help and option.help.endswith("."), where
        if getattr(option, "is_flag", False) or type(option.default) is bool:
            continue
        assert option.required or option.default not in (None, []) or isinstance(option.show_default, str), f"{where}: no default is shown"
        if (name, option.name) in counted:
            assert any(unit in option.help for unit in UNITS), f"{where}: no unit in {option.help!r}"


def test_scripts_find_json_and_quiet_everywhere():
    flags = {name: {flag for _, option in options() if _ == name for flag in option.opts} for name, _ in commands()}
    assert len(flags) >= 13
    without = {name for name in flags if "--json" not in flags[name]}
    assert without == {"serve"}  # the process becomes vLLM
    assert {name for name in flags if "--quiet" not in flags[name]} == {"serve", "recipes", "benchmark kernels"}  # these show nothing but results


def test_generate_and_export_as_json(cli, saved, text_file, tmp_path):  # noqa: F811
    sizes = ["--samples", 2, "--seq-len", 32, "--salient", 16, "--salient-per-head", 4, "--salient-down", 16, "--group-size", 16, "--device", "cpu"]
    assert cli("quantize", saved("llama"), "-o", tmp_path / "q", "--calibration", text_file, "--quiet", *sizes) == (0, "", "")
    code, out, err = cli("generate", tmp_path / "q", "hello", "--max-tokens", 5, "--json", "--device", "cpu")
    found = json.loads(out)
    assert (code, err) == (0, "") and found["tokens"] == 5 and found["prompt"] == "hello" and isinstance(found["text"], str)
    assert found["tokens_per_second"] == pytest.approx(5 / found["seconds"])
    code, out, err = cli("export", tmp_path / "q", "-o", tmp_path / "dense", "--json")
    assert (code, err) == (0, "") and json.loads(out)["bytes"] == sum(file.stat().st_size for file in (tmp_path / "dense").iterdir())


def completed(shell_words):
    words = {"COMP_WORDS": shell_words, "COMP_CWORD": str(len(shell_words.split(" ")) - 1), "_ROSAQ_COMPLETE": "complete_bash"}
    code = "import sys; sys.argv = ['rosaq']\nfrom rosaq_cli.app import app\ntry: app(prog_name='rosaq')\nfinally: assert 'torch' not in sys.modules"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **words}).stdout.split()


def test_the_shell_completes_commands_options_and_recipes():
    assert completed("rosaq q") == ["quantize"]
    assert "--max-memory" in completed("rosaq quantize --ma")
    assert completed("rosaq quantize --recipe rosaq-int") == ["rosaq-int3", "rosaq-int4"]


def on_a_terminal(command, **environment):
    """What a command writes where standard output and error are a terminal."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(command, stdout=follower, stderr=follower, stdin=follower, env={**os.environ, "TERM": "xterm", **environment})
    os.close(follower)
    written = b""
    while True:
        try:
            part = os.read(leader, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        written += part
    process.wait()
    os.close(leader)
    return written.decode()


COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-9]")


def test_colours_are_for_terminals_that_want_them():
    command = [sys.executable, "-c", "from rosaq_cli.app import _say; _say('wrong', ValueError())"]
    clean = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
    assert COLOUR.search(on_a_terminal(command))
    assert "wrong" in on_a_terminal(command, NO_COLOR="1") and not COLOUR.search(on_a_terminal(command, NO_COLOR="1"))
    piped = subprocess.run(command, capture_output=True, text=True, check=True, env=clean)
    assert piped.stderr == "rosaq: wrong\n"


def test_exit_codes_are_those_that_help_states(cli):  # noqa: F811
    assert [int(code) for code in re.findall(r"\b\d+\b", EPILOG)] == [0, 1, 2, 130, 143]
    for code, words in ((0, ["recipes", "--json"]), (1, ["verify", "nothing-here"]), (2, ["verify", "nothing-here", "--colour"]), (2, ["dance"])):
        assert cli(*words)[0] == code  # 130 and 143: test_faults.py
