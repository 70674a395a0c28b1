"""The command `compress`: its verbs, one file each, and what every one of them does when it fails or is interrupted.

Exit codes: 0 done; 1 the run failed (a file, the numbers, memory, a bug); 2 the command line or the recipe is wrong;
130 Ctrl-C, 143 SIGTERM, 129 SIGHUP; 141 whoever read our output closed it.

`compress --help` must answer at once: the files of the verbs import what they need inside their functions.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import traceback
from typing import Annotated, Any

import typer

from compress.cli.bench import bench
from compress.cli.chat import chat
from compress.cli.doctor import doctor
from compress.cli.evaluate import evaluate
from compress.cli.export import export
from compress.cli.generate import generate
from compress.cli.inspect import inspect
from compress.cli.methods import methods
from compress.cli.options import State
from compress.cli.plan import plan
from compress.cli.push import push
from compress.cli.recipes import recipes
from compress.cli.report import report
from compress.cli.run import run
from compress.cli.signals import Ended, raised
from compress.cli.tasks import tasks
from compress.errors import CompressError, RecipeError

FAILED, WRONG_USE = 1, 2
BY_SIGNAL = 128  # + the signal's number, as shells have it

app = typer.Typer(
    name="compress",
    rich_markup_mode=None,  # plain help: drawing it with rich takes longer than everything else together
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(short_help="compress a checkpoint and measure the result")(run)
app.command(short_help="what a run would do: layers, bytes, memory, time")(plan)
app.command("eval", short_help="perplexity, fidelity to the original, and benchmarks")(evaluate)
app.command(short_help="the benchmarks that eval knows")(tasks)
app.command(short_help="the report of a result again, and its page")(report)
app.command(short_help="tokens per second and memory, beside the original")(bench)
app.command(short_help="let a model go on from a prompt")(generate)
app.command(short_help="talk with a model")(chat)
app.command(short_help="write a result in the formats of servers and other libraries")(export)
app.command(short_help="publish a result on the Hub")(push)
app.command(short_help="method, representation and bytes of each layer")(inspect)
app.command(short_help="the methods that a recipe can name, and their settings")(methods)
app.command(short_help="the recipes that come with the package")(recipes)
app.command(short_help="whether this machine has what is needed")(doctor)


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="print the version")] = False
) -> None:
    """Compress language models after training, block by block; measure what it cost; run the result.

    \b
    Try:  compress recipes
          compress plan --recipe demo
          compress run --recipe demo --out out/demo
          compress generate out/demo --prompt "It was a dark night"
    """
    if version:
        from compress import __version__

        print(__version__)  # noqa: T201
    elif context.invoked_subcommand is None:
        print(context.get_help())  # noqa: T201


def main(arguments: list[str] | None = None) -> int:
    """Run one command line. Returns: the exit code (see the top of this file)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    State.debug = False
    quiet_libraries()
    share_the_machine()
    try:
        with raised():
            code = typer.main.get_command(app).main(args=arguments, prog_name="compress", standalone_mode=False)
            sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except Ended as ended:
        if ended.number == signal.SIGPIPE:
            _drop_output()
        else:
            _say("interrupted" if ended.number == signal.SIGINT else f"ended by {ended}")
        return BY_SIGNAL + ended.number
    except BrokenPipeError:
        _drop_output()
        return BY_SIGNAL + signal.SIGPIPE
    except Exception as error:
        return _failed(error)


def _failed(error: Exception) -> int:
    """Say what went wrong, in one line if it is anything but a bug of ours. Returns: the exit code."""
    if State.debug:
        traceback.print_exc()
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # what typer finds wrong with a command line
        context: Any = getattr(error, "ctx", None)
        command = context.command_path if context else "compress"
        _say(f"error: {_one_line(error.format_message()).rstrip('.')}; see: {command} --help")
        return WRONG_USE
    if isinstance(error, CompressError):
        _say(f"error: {_one_line(str(error))}")
        return WRONG_USE if isinstance(error, RecipeError) else FAILED
    said = _out_of_something(error)
    if said:
        _say(f"error: {said}")
        return FAILED
    if not State.debug:
        traceback.print_exc()
    _say(f"error: this is a bug in compress-llm, not yours ({type(error).__name__}): report it with the lines above")
    return FAILED


def _out_of_something(error: Exception) -> str | None:
    """One line for what the machine could not give: memory, disk, a file that it lets us touch. None: not of that kind."""
    text = _one_line(str(error))
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return (
            f"out of memory ({text[:200] or 'host memory'}): give the same command with a smaller --activation-memory, or for "
            f"a GPU --device cpu (finished blocks are kept), or begin anew with a smaller calibration.batch_size or fewer samples"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({text}): free some space and give the same command again; finished blocks are kept"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EMFILE):
        return f"{error.filename or 'a file'}: {error.strerror}; mend that and give the same command again"
    return None


def quiet_libraries() -> None:
    """Other packages' log lines and bars between ours help nobody. Set by the user, they stay."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def share_the_machine() -> None:
    """What torch's libraries read from the environment when they are loaded. Set by the user, it stays."""
    # Threads that wait for work spin: beside another busy process a run took 5 times as long and as much CPU time.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Huge pages for large tensors: a third of the page faults, less memory lost between tensors.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody may be there to read it
        print(line, file=sys.stderr, flush=True)  # noqa: T201


def _drop_output() -> None:
    """Python flushes stdout at exit, and complains if nobody reads it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
