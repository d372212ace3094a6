"""Command lines of fewstep as text, for "next:" lines and pages: they can be pasted into a shell."""

from __future__ import annotations

import shlex

from fewstep.base.urls import shown


def command(name: str, *arguments: object, **options: object) -> str:
    """Returns ``fewstep NAME ARGUMENTS --OPTION VALUE ...``, quoted for a shell.

    Options without a value (``None`` or ``False``) are left out, ``True`` is a flag, a list gives the
    option once for each of its values, and numbers are written shortly (``7.5``, not ``7.500``).

    Arguments:
        name: The command, for example ``"sample"`` or ``"plan show"``.
        arguments: Its positional arguments.
        options: Its options, with underscores for dashes; ``n`` is ``-n``.

    Example:
        >>> command("sample", "my model", recipe="best-5.json", class_labels="0,1", out="samples")
        "fewstep sample 'my model' --recipe best-5.json --class-labels 0,1 --out samples"
    """
    words = ["fewstep", *name.split(), *(_text(a) for a in arguments)]
    for key, value in options.items():
        option = f"-{key}" if len(key) == 1 else f"--{key.replace('_', '-')}"
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if one is True:
                words.append(option)
            elif one is not None and one is not False:
                words += [option, _text(one)]
    return shlex.join(words)


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return shown(str(value))
