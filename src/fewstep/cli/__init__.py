"""The command line: ``fewstep``. Its commands are imported when they are called.

Nothing here, and nothing at the top of a command's module, imports torch or numpy, so that
``fewstep --help`` starts fast.
"""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Group, Parameter

from fewstep import __version__
from fewstep.base.interrupts import Terminated, raise_on_sigterm
from fewstep.base.messages import message_of
from fewstep.cli._common import Flag, fail, is_verbose, set_verbosity
from fewstep.cli._remote import local_arguments


def app() -> App:
    """Returns the application."""
    application = App(
        name="fewstep",
        help="Sample from any pretrained diffusion model in few network evaluations.",
        version=__version__,
        suppress_keyboard_interrupt=False,
        result_action="return_value",
    )
    for name, module, function, text in (
        ("sample", "sample", "sample", "Draw samples from a model."),
        ("fit", "fit", "fit", "Measure which sampler suits a model best."),
        ("tune", "tune", "tune", "Search a sampler of few evaluations for a model."),
        (
            "compare",
            "compare",
            "compare",
            "Compare samplers at several budgets: a report.",
        ),
        (
            "analyze",
            "analyze",
            "analyze",
            "Find where a model's error comes from and which sampler suits it.",
        ),
        ("demo", "demo", "demo", "Compare samplers on an embedded model: a table and a picture."),
        ("record", "record", "record", "Record trajectories of a model, to distill from."),
        ("distill", "distill", "distill", "Distill a model into one evaluation."),
        ("train", "train", "train", "Train a small diffusion model on your images."),
        ("plan", "plan", "plan_app", "Read, check, compare and make plans (samplers as data)."),
        (
            "recipe",
            "recipe",
            "recipe_app",
            "Show, check, import and export recipes and tables of levels.",
        ),
        ("verify", "verify", "verify", "Check whether files and folders of fewstep are whole."),
        ("studio", "studio", "studio", "Show samplers side by side on a page in the browser."),
        ("solvers", "listing", "solvers", "List the solvers, or describe one."),
        ("grids", "listing", "grids", "List the time grids, or describe one."),
        ("models", "listing", "models", "List the embedded models."),
    ):
        application.command(f"fewstep.cli.{module}:{function}", name=name, help=text)
    application.meta.suppress_keyboard_interrupt = False
    application.register_install_completion_command()
    application.meta.group_parameters = Group("Every command", sort_key=9)

    @application.meta.default
    def launch(  # pyright: ignore[reportUnusedFunction]
        *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        quiet: Flag = False,
        verbose: Flag = False,
    ) -> Any:
        """Run a command.

        Args:
            tokens: The command and its arguments.
            quiet: Print neither progress nor words, only errors.
            verbose: Print the log too, and tracebacks of errors.
        """
        set_verbosity(quiet=quiet, verbose=verbose)
        return application(list(tokens), exit_on_error=False, print_error=False)

    return application


def run(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit code.

    0 is success, 1 a negative result (a damaged plan, plans that differ), 2 a user's mistake, 3 a
    result that is worse than its start, 130 an interruption (Ctrl-C) and 143 a termination (SIGTERM).
    With ``FEWSTEP_TRACEBACK=1`` mistakes are raised instead of printed.
    """
    raising = os.environ.get("FEWSTEP_TRACEBACK") == "1"
    try:
        with local_arguments(arguments) as words:
            result = app().meta(words, exit_on_error=False, print_error=False)
        sys.stdout.flush()
    except KeyboardInterrupt as stop:
        command, saved = shlex.join(["fewstep", *arguments]), getattr(stop, "saved", None)
        hint = (
            f"{saved}; to resume: {command}" if saved else f"nothing was saved; again: {command}"
        )
        fail(f"interrupted: {hint}", kind="stopped")
        return 143 if isinstance(stop, Terminated) else 130
    except BrokenPipeError:
        # The reader of the pipe closed it, as `head` does; Python would print an error again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (CycloptsError, ValueError, TypeError, OSError) as error:
        if raising:
            raise
        if is_verbose():
            traceback.print_exc()
        fail(message_of(error))
        return 2
    except (RuntimeError, MemoryError) as error:
        from fewstep.base.memory import is_out_of_memory

        if raising or not is_out_of_memory(error):
            raise
        if is_verbose():
            traceback.print_exc()
        fail(
            f"out of memory: {message_of(error):.300}; give fewer at once (--batch-size, the batch_size of a "
            "recipe or setting, a smaller --size), or another --device. What was finished is saved, and "
            "the same command resumes it"
        )
        return 2
    finally:
        set_verbosity()
    return result if isinstance(result, int) else 0


def main() -> None:
    """Runs the command line of the process."""
    raise_on_sigterm()
    code = run(sys.argv[1:])
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # destructors of connections may wait forever
    sys.exit(code)
